"""The examples run as a user would start them, and do what they say."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from fastsae.analysis import IOITask
from tests.analysis.words import Words, answering_model
from tests.models.tiny import CharTokenizer, tiny_model

FOLDER = Path(__file__).parents[2] / "examples"


def run(name: str):
    return runpy.run_path(str(FOLDER / name))["main"]()


def test_train_two() -> None:
    assert all(fvu < 0.3 for fvu in run("train_two.py").values())


def test_op_in_your_code() -> None:
    first, last = run("op_in_your_code.py")
    assert last < 0.5 * first


def test_load_and_steer() -> None:
    moved = run("load_and_steer.py")
    assert 0 < moved["spliced"] < moved["steered"]


def test_steer() -> None:
    pytest.importorskip("transformers")
    main = runpy.run_path(str(FOLDER / "steer.py"))["main"]
    curve, texts = main(tiny_model(), CharTokenizer(), "resid_post.1", contexts=40)
    assert next(row.value for row in curve.of("latent", "logit")) == 0
    assert len(curve.controls) == len(texts) == 3


def test_ioi() -> None:
    pytest.importorskip("transformers")
    main = runpy.run_path(str(FOLDER / "ioi.py"))["main"]
    task = IOITask(Words(), names=["Mary", "John", "Anne", "Tom"])
    model = answering_model(task)
    found = main(model, task, "resid_post.2", fit=120, n=16)
    assert found["supervised: sufficiency"] > 0.9
    assert found["edit of IO, supervised: success"] == 1
    assert found["edit of IO, nothing: success"] < 0.5


def test_attribute_attention() -> None:
    """That sums of attributions are pre-activations is asserted inside, here and below."""
    pytest.importorskip("transformers")
    main = runpy.run_path(str(FOLDER / "attribute_attention.py"))["main"]
    found = main(tiny_model(), CharTokenizer(), layer=1, contexts=60, d_sae=64)
    assert found.by_head.shape == (2, len(found.tokens))
    assert found.by_upstream.shape == (len(found.upstream), len(found.tokens))
    assert float(found.by_weight.sum()) == pytest.approx(1)
    assert found.pre_activation > 0


def test_transcoder_circuit() -> None:
    pytest.importorskip("transformers")
    main = runpy.run_path(str(FOLDER / "transcoder_circuit.py"))["main"]
    found = main(tiny_model(), CharTokenizer(), layers=(0, 2), contexts=60, d_sae=64)
    weights = [weight for _, weight in found.connected]
    assert weights == sorted(weights, reverse=True)
    assert found.pre_activation > 0
    assert 0 <= found.overlap <= 1


def test_de_embed() -> None:
    pytest.importorskip("transformers")
    main = runpy.run_path(str(FOLDER / "de_embed.py"))["main"]
    found = main(tiny_model(), CharTokenizer(), contexts=60, d_sae=32)
    assert set(found) == {0, 1}
    assert all(0.5 < f.auc <= 1 for f in found.values())
    assert found[0].auc == found[0].auc_embedding
    assert found[1].auc != found[1].auc_embedding


def test_every_example_is_tested_and_starts_by_itself() -> None:
    tested = {"train_two.py", "op_in_your_code.py", "load_and_steer.py", "steer.py", "ioi.py"}
    tested |= {"attribute_attention.py", "transcoder_circuit.py", "de_embed.py"}
    tested |= {"ordered_dropout.py", "jepa_influence.py", "tree_gate.py", "quick_selection.py"}
    assert {path.name for path in FOLDER.glob("*.py")} == tested
    command = [sys.executable, str(FOLDER / "op_in_your_code.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "->" in done.stdout
