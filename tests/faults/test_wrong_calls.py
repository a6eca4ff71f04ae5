"""Wrong calls: one line that says what was expected and what came, and nothing is destroyed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsae
from fastsae import TrainConfig, Trainer, nn, ops
from fastsae.cli import main
from fastsae.data import ActivationStore, harvest
from fastsae.eval import evaluate, fvu
from fastsae.types import SparseActs
from tests.faults.workloads import digest
from tests.models.tiny import DOCUMENTS, CharTokenizer, tiny_model

NAN = float("nan")
X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
W = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
CODE = SparseActs(torch.ones(40, 2), torch.zeros(40, 2, dtype=torch.int32), None, 16)
CLASSES = (
    nn.TopKSAE, nn.BatchTopKSAE, nn.FeatureChoiceSAE, nn.JumpReLUSAE, nn.GatedSAE, nn.ReLUSAE,
    nn.GroupMaxSAE, nn.SampledSAE, nn.HierarchicalTopKSAE, nn.GradientSAE,
)  # fmt: skip


def sae() -> nn.TopKSAE:
    return nn.TopKSAE(8, 16, k=2)


def fit(**settings: Any) -> Any:
    given = {"batch_size": 8, "steps": 2, "progress": False} | settings
    return Trainer(sae(), X, TrainConfig(**given)).fit()


def constructors() -> list[Callable[[], Any]]:
    """Return wrong calls of the classes."""
    calls: list[Callable[[], Any]] = []
    for cls in CLASSES:
        for sizes in ((0, 16), (8, -1), (8.5, 16), ("8", 16), (None, 16), (8, True)):
            calls.append(lambda cls=cls, sizes=sizes: cls(*sizes, 2))
        calls.append(lambda cls=cls: cls(8, 16, 2, dtype=torch.int64))
        calls.append(lambda cls=cls: cls(8, 16, -1))
        calls.append(lambda cls=cls: cls(8, 16, 17))
        calls.append(lambda cls=cls: cls(8, 16, NAN))
    return calls


def settings() -> list[Callable[[], Any]]:
    """Return wrong values of every setting."""
    wrong: dict[str, list[Any]] = {
        "batch_size": [0, -1, 2.5, "8", True],
        "steps": [0, -3, 2.5, NAN],
        "epochs": [0, -1.0, NAN, float("inf"), "1", None],
        "lr": [0.0, -1e-3, NAN, float("inf"), "1e-3"],
        "betas": [0.9, (0.9,), (0.9, 1.0), ("a", "b")],
        "eps": [0, NAN, None],
        "decay_fraction": [-0.1, 1.1, NAN],
        "warmup_steps": [-1, 0.5],
        "clip_grad_norm": [0, NAN, "1"],
        "optimizer": ["lion", None, 3],
        "update": ["fast", True],
        "compute_dtype": ["int8", torch.bfloat16],
        "dead_after_tokens": [0, 1.5],
        "normalize": [1, "yes", None],
        "b_dec_init": ["median", None],
        "weight_init": ["pca", None],
        "clip_outliers": [1, None],
        "sample_rows": [0, 1.5],
        "outlier_norm": [1.0, NAN],
        "seed": [-1, 2**32, 0.5],
        "log_every": [0, 1.5],
        "eval_every": [0, -1],
        "checkpoint_every": [0, 5, 1.5],
        "keep_checkpoints": [0, 0.5],
        "out": [3, b"x"],
        "tensorboard": [True, 1],
        "progress": ["yes"],
    }
    return [
        lambda name=name, value=value: TrainConfig(**{name: value})
        for name, values in wrong.items()
        for value in values
    ]


OPS: list[Callable[[], Any]] = [
    lambda: ops.topk(X, 0),
    lambda: ops.topk(X, 9),
    lambda: ops.topk(X, 2.0),  # type: ignore[arg-type]
    lambda: ops.topk(X.int(), 2),
    lambda: ops.topk([1.0], 1),  # type: ignore[arg-type]
    lambda: ops.topk(torch.tensor(1.0), 1),
    lambda: ops.batch_topk(X, -1),
    lambda: ops.batch_topk(X, NAN),
    lambda: ops.batch_topk(X, float("inf")),
    lambda: ops.batch_topk(X, "2"),  # type: ignore[arg-type]
    lambda: ops.batch_topk(X, 2, threshold_guess=0.5),  # type: ignore[arg-type]
    lambda: ops.feature_topk(X, -1),
    lambda: ops.feature_topk(X, 1.5),  # type: ignore[arg-type]
    lambda: ops.feature_topk(X, torch.ones(3, dtype=torch.int32)),
    lambda: ops.feature_topk(X, 2, capacity=1),
    lambda: ops.threshold_select(X, torch.tensor(0.0), -1),
    lambda: ops.threshold_select(X, torch.tensor(0.0), 10.5),  # type: ignore[arg-type]
    lambda: ops.threshold_select(X, torch.zeros(3), 10),
    lambda: ops.threshold_select(X, 0.0, 10),  # type: ignore[arg-type]
    lambda: ops.encode_topk(X, W.t(), None, 2),
    lambda: ops.encode_topk(X, W.double(), None, 2),
    lambda: ops.encode_topk(X, W, torch.zeros(3), 2),
    lambda: ops.encode_topk(X, W, None, 17),
    lambda: ops.encode_topk(X, W, None, 2, mask=torch.ones(16)),
    lambda: ops.encode_topk(X, W, None, 2, mask=torch.ones(3, dtype=torch.bool)),
    lambda: ops.encode_topk(X, W, None, 2, compute_dtype=torch.int8),
    lambda: ops.encode_batch_topk(X, W, None, -0.5),
    lambda: ops.encode_threshold(X, W, None, torch.tensor(0.0), 1.5),  # type: ignore[arg-type]
    lambda: ops.sparse_decode(CODE, W[:3]),
    lambda: ops.sparse_decode(CODE, W.double()),
    lambda: ops.sparse_decode(X, W),  # type: ignore[arg-type]
]

MODULES: list[Callable[[], Any]] = [
    lambda: sae()(torch.randn(3, 7)),
    lambda: sae()(X.double()),
    lambda: sae()([1.0]),  # type: ignore[arg-type]
    lambda: sae().encode_sparse(X[:, :3]),
    lambda: sae().decode(torch.zeros(2, 5)),
    lambda: sae().loss(X, X[:3]),
    lambda: nn.MatryoshkaSAE(8, 16, 2, groups=[3, 4]),
    lambda: nn.TopKSAE(8, 16, 2, aux="nothing"),
    lambda: nn.TopKSAE(8, 16, 2, auxk_alpha=-1),
    lambda: nn.Transcoder(8, 0, 16, 2),
    lambda: nn.CrossCoder(8, 0, 16, 2),
    lambda: Trainer(X, X),  # type: ignore[arg-type]
    lambda: Trainer(sae(), X[:, :3]),
    lambda: Trainer(sae(), X.int()),
    lambda: Trainer(sae(), 3),  # type: ignore[arg-type]
    lambda: Trainer(sae(), "text"),
    lambda: Trainer(sae(), X, {"lr": 1}),  # type: ignore[arg-type]
    lambda: Trainer(sae(), X, TrainConfig(batch_size=8), val=X[:0]),
    lambda: Trainer(sae(), X, TrainConfig(batch_size=41)),
    lambda: Trainer(sae()).step(X),
    lambda: Trainer(sae(), None, TrainConfig(steps=1)).prepare(),
    lambda: Trainer(sae(), None, TrainConfig(steps=1)).fit(),
    lambda: Trainer(sae(), X, TrainConfig(batch_size=8)).validate(),
    lambda: Trainer(sae(), X, TrainConfig(batch_size=8)).state_dict(),
    lambda: Trainer(sae(), X, TrainConfig(batch_size=8)).load_state_dict({}),
    lambda: Trainer(sae(), X * NAN, TrainConfig(batch_size=8)).fit(),
    lambda: Trainer(sae(), torch.ones(40, 8), TrainConfig(batch_size=8)).fit(),
    lambda: evaluate(sae(), X[:0]),
    lambda: evaluate(sae(), X * NAN),
    lambda: evaluate(sae(), 3),  # type: ignore[arg-type]
    lambda: fvu(X, X[:3]),
]


def paths(folder: Path) -> list[Callable[[], Any]]:
    """Return wrong calls that name files; `folder` holds an SAE, a run and a store."""
    model, tokens = tiny_model(), CharTokenizer()

    def harvested(**arguments: Any) -> Any:
        given = {"texts": DOCUMENTS, "sites": "resid_post.1", "out": folder / "new"} | arguments
        return harvest(model, tokens, **given)

    return [
        lambda: fastsae.load(folder / "none"),
        lambda: fastsae.load(folder),
        lambda: fastsae.load(folder / "file"),
        lambda: fastsae.save(sae(), folder / "file"),
        lambda: fastsae.save(sae(), folder / "file" / "below"),
        lambda: fastsae.verify(folder / "none"),
        lambda: fastsae.verify(folder),
        lambda: ActivationStore(folder / "none"),
        lambda: ActivationStore(folder / "sae"),
        lambda: ActivationStore(folder / "store", "mlp_out.0"),
        lambda: ActivationStore(folder / "store", split="test"),
        lambda: ActivationStore(folder / "store").batches(0),
        lambda: ActivationStore(folder / "store").rows(slice(0, 9, 2)),
        lambda: fit(out=folder / "run"),
        lambda: fit(out=folder / "sae"),
        lambda: fit(out=folder / "file"),
        lambda: fit(out=folder / "file" / "below"),
        lambda: Trainer(sae(), X + 1, TrainConfig(**RUN, out=folder / "run")).fit(resume=True),
        lambda: Trainer(sae(), X, TrainConfig(**RUN, lr=1e-9, out=folder / "run")).fit(resume=True),
        lambda: Trainer(sae(), X, TrainConfig(**RUN, out=folder / "run")).fit(resume="none"),
        lambda: harvested(out=folder / "store"),
        lambda: harvested(out=folder / "file"),
        lambda: harvested(texts=[]),
        lambda: harvested(texts="text"),
        lambda: harvested(texts=[3]),
        lambda: harvested(sites=[]),
        lambda: harvested(sites="resid_post.9"),
        lambda: harvested(sites="nowhere.1"),
        lambda: harvested(context=1),
        lambda: harvested(context=9999),
        lambda: harvested(batch_size=0),
        lambda: harvested(max_norm_ratio=NAN),
        lambda: harvested(dtype=torch.int16),
        lambda: harvested(meta={"x": X}),
        lambda: harvested(shard_rows=0),
        lambda: harvested(val_fraction=1.0),
        lambda: harvested(overwrite=True, texts=[], out=folder / "store"),
    ]


RUN = {"batch_size": 8, "steps": 2, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    fastsae.save(sae(), folder / "sae")
    fit(out=folder / "run")
    harvest(tiny_model(), CharTokenizer(), DOCUMENTS, "resid_post.1", folder / "store")
    (folder / "file").write_text("mine")
    return folder


def commands(folder: Path) -> list[list[str]]:
    """Return wrong command lines."""
    store, run, none = str(folder / "store"), str(folder / "run"), str(folder / "none")
    text = str(folder / "file")
    out = ["--out", str(folder / "new")]
    harvested = ["harvest", "--text", text, *out]
    return [
        [], ["nothing"], ["train"], ["train", store], ["train", none, *out],
        ["train", str(folder / "sae"), *out], ["train", store, *out, "--k", "0"],
        ["train", store, *out, "--k", "99999"], ["train", store, *out, "--arch", "vae"],
        ["train", store, *out, "--site", "mlp_in.0"], ["train", store, *out, "--epochs", "nan"],
        ["train", store, *out, "--lr", "x"], ["train", store, *out, "--lr", "-1"],
        ["train", store, *out, "--seed", "-1"], ["train", store, *out, "--device", "cuda:99"],
        ["train", store, *out, "--device", "abacus"], ["train", store, *out, "--option", "x"],
        ["train", store, *out, "--option", "nothing=3"], ["train", store, "--out", run],
        ["train", store, "--out", text], ["train", store, *out, "--batch-size", "999999"],
        ["train", store, "--out", run, "--resume"],
        ["train", store, "--out", run, "--resume-from", none],
        ["train", store, *out, "--arch", "transcoder"],
        ["train", store, *out, "--arch", "crosscoder"],
        ["train", store, "--out", str(folder / "sae")],
        ["eval"], ["eval", none, store], ["eval", str(folder / "sae"), none],
        ["eval", str(folder / "sae"), store, "--site", "mlp_in.9"],
        ["eval", str(folder / "sae"), store], ["eval", run, store, "--model", "x"],
        ["eval", run, store, "--split", "test"], ["inspect"], ["inspect", none],
        ["inspect", text], ["verify"], ["verify", none], ["verify", text],
        [*harvested], [*harvested, "--model", "./nomodel", "--site", "resid_post.1"],
        [*harvested, "--model", "/no/model", "--site", "resid_post.1"],
        [*harvested, "--model", none, "--site", "resid_post.1"],
        ["harvest", "--model", "smollm2", "--text", none, "--site", "resid_post.1", *out],
        ["demo", "--k", "0"], ["demo", "--steps", "3", "--epochs", "1"], ["demo", "--text", none],
    ]  # fmt: skip


def check(call: Callable[[], Any]) -> None:
    """Require one line in words of ours."""
    kinds = (ValueError, TypeError, RuntimeError, OSError)
    with pytest.raises(kinds) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text, text
    assert "expected" in text or "could not write" in text or "already holds" in text, text


@pytest.mark.parametrize("call", [*constructors(), *settings(), *OPS, *MODULES])
def test_a_wrong_call_is_one_line(call):
    check(call)


def test_wrong_paths_destroy_nothing(folder):
    before = digest(folder)
    for call in paths(folder):
        check(call)
        after = {name: v for name, v in digest(folder).items() if not name.startswith("new")}
        assert after == before


def test_wrong_commands_destroy_nothing(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    before = digest(folder)
    for argv in commands(folder):
        assert main(argv) in (1, 2), argv
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line]
        assert lines[-1].startswith("fastsae: "), (argv, err)
        assert not any("Traceback" in line for line in lines), (argv, err)
        assert len(lines) == 1, (argv, err)
        assert out == "", (argv, out)
        assert digest(folder) == before, argv


def test_there_are_two_hundred_of_them(folder):
    count = len(constructors()) + len(settings()) + len(OPS) + len(MODULES)
    assert count + len(paths(folder)) + len(commands(folder)) >= 200
    assert json.dumps(count)
