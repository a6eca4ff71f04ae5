"""Runs whose averages are bfloat16."""

from __future__ import annotations

import pytest
import torch

import fastsae
from fastsae import TrainConfig, Trainer
from tests.conftest import EMULATED, emulated
from tests.train.test_fused_classes import CLASSES, build, rows


def trainer(name="TopK", adam_dtype="bfloat16", **settings) -> Trainer:
    torch.manual_seed(1)
    sae = build(name, torch.float32)
    settings = {"compute_dtype": "float32", "lr": 3e-3, "steps": 12, **settings}
    config = TrainConfig(
        batch_size=50, dead_after_tokens=60, progress=False, sparsity_warmup_steps=0,
        adam_dtype=adam_dtype, **settings,
    )  # fmt: skip
    return Trainer(sae, rows(sae), config)


def state_of(sae) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in sae.state_dict().items()}


def same(one, other) -> bool:
    return all(torch.equal(t, other[name]) for name, t in one.items())


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_trains_about_as_well(name) -> None:
    losses = []
    for dtype in ("float32", "bfloat16"):
        t = trainer(name, dtype, log_every=1)
        losses.append([row["loss"] for row in t.fit().history])
    whole, rounded = losses
    assert whole != rounded
    assert rounded[-1] == pytest.approx(whole[-1], rel=0.1)


def test_what_is_stored() -> None:
    t = trainer("skip")
    t.prepare()
    state = t._update.state_dict()
    for kind in ("exp_avg", "exp_avg_sq"):
        dtypes = {name: average.dtype for name, average in state[kind].items()}
        assert dtypes["W_enc_rows"] == dtypes["W_dec"] == torch.bfloat16
        assert dtypes["b_enc"] == dtypes["b_dec"] == torch.float32


@pytest.mark.parametrize("name", ["TopK", "CLT"])
def test_a_resumed_run_has_the_same_bits(name, tmp_path) -> None:
    whole = trainer(name, out=tmp_path / "whole", checkpoint_every=5, keep_checkpoints=3)
    want = state_of(whole.fit().sae)
    at = min(p for p in (tmp_path / "whole" / "checkpoints").iterdir() if p.is_dir())
    again = trainer(name, out=tmp_path / "again")
    assert same(state_of(again.fit(resume=at).sae), want)
    other = trainer(name, "float32", out=tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"expected adam_dtype = 'bfloat16' as in .*, got 'float32'"
    ):
        other.fit(resume=at)


def test_the_seed_says_how_averages_are_rounded() -> None:
    found = []
    for seed in (0, 0, 1):
        t = trainer(seed=seed)
        t.prepare(rows(t.sae))
        for batch in rows(t.sae).split(50):
            t.step(batch)
        found.append({"exp_avg": t._update.exp_avg["W_dec"].clone(), **state_of(t.sae)})
    assert same(found[0], found[1])
    assert not torch.equal(found[0]["exp_avg"], found[2]["exp_avg"])


def test_layers_round_by_bits_of_their_own(monkeypatch) -> None:
    seeds, step = [], fastsae.ops.sparse_adam_step_

    def watched(*arguments, **options):
        seeds.append(options["rounding_seed"])
        return step(*arguments, **options)

    monkeypatch.setattr(fastsae.ops, "sparse_adam_step_", watched)
    trainer("CLT", seed=3, steps=2).fit()
    assert seeds == [3 << 16, 3 << 16 | 1, 3 << 16 | 2] * 2


@pytest.mark.skipif(EMULATED is None, reason="built without FASTSAE_EMULATION=ON")
@pytest.mark.parametrize("name", ["TopK", "skip", "CLT"])
def test_the_kernels_of_cuda_train_alike(name) -> None:
    want = trainer(name).fit().final["loss"]
    with emulated("sparse_adam_step_"):
        assert trainer(name).fit().final["loss"] == pytest.approx(want, rel=1e-2)


def test_what_is_not_covered_is_refused() -> None:
    for settings, expected in (
        (
            {"optimizer": "adam_mini"},
            r"optimizer='adam' with adam_dtype='bfloat16', got 'adam_mini",
        ),
        ({"optimizer": "sgd_sai"}, r"optimizer='adam' with adam_dtype='bfloat16', got 'sgd_sai'"),
        ({"mesh": (1, 2)}, r"mesh=None with adam_dtype='bfloat16', got \(1, 2\)"),
        ({"update": "autograd"}, r"a fused update with adam_dtype='bfloat16', got 'autograd'"),
        ({"adam_dtype": "float16"}, r"adam_dtype in float32, bfloat16, got 'float16'"),
    ):
        with pytest.raises(ValueError, match=f"TrainConfig: expected {expected}"):
            trainer(**settings)
    t = trainer()
    t.sae.double()
    with pytest.raises(
        ValueError, match=r"adam_dtype='float32', because the parameters are torch.f"
    ):
        t.prepare(rows(t.sae))
    t = trainer("CLT")
    t.config.clip_grad_norm = 1.0
    with pytest.raises(
        ValueError, match=r"adam_dtype='float32', because clip_grad_norm needs the n"
    ):
        t.prepare()
