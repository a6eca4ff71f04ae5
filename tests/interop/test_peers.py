"""What other libraries wrote is read as they read it: same code, same reconstruction."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fastsae

PEERS = Path(__file__).parent / "peers"
CASES = sorted(path.parent for path in PEERS.glob("*/*/expected.safetensors"))
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-12}
ROUNDED = {"overcomplete/ra_jump": 1e-7}
"""Projected and rounded to float32 before it was saved; the peer projects it again, onto a delta
that is not in the file, which moves it by that rounding."""


def expectation(case: Path) -> dict[str, str]:
    """Return what a peer's case says of itself."""
    with safe_open(case / "expected.safetensors", "pt") as file:
        return file.metadata()


def name_of(case: Path) -> str:
    return f"{case.parent.name}/{case.name}"


def entrance(case: Path) -> Path:
    """Return what a user would give to `load`: the folder, or the only file in it."""
    others = [path for path in case.iterdir() if path.name != "expected.safetensors"]
    return others[0] if len(others) == 1 and others[0].is_file() else case


def options(case: Path, about: dict[str, str]) -> dict:
    """Return what the files do not say."""
    found = {}
    if "k" in about:
        found["k"] = int(about["k"])
    if "threshold" in about:
        found["threshold"] = float(about["threshold"])
    whole = "layers" in about or case.name.startswith("clt")
    if case.parent.name == "circuit_tracer" and not whole:
        found["layer"] = 0
    return found


def largest(difference: torch.Tensor, like: torch.Tensor) -> float:
    return float(difference.abs().max() / like.abs().max())


def check(sae, x, code, out, dtype, tolerance=None):
    """Compare with what the peer computed, relative to the largest number."""
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    with torch.no_grad():
        ours, y = sae.encode(x.to(dtype)), sae(x.to(dtype))
        rows = x.reshape(-1, sae.d_in).to(dtype)
        again = sae.reconstruct(rows, sae.encode_sparse(x.to(dtype))).reshape(y.shape)
    assert ours.shape == code.shape
    assert y.shape == out.shape
    assert torch.equal(ours != 0, code != 0)
    assert largest(ours - code, code) <= tolerance
    assert largest(y - out, out) <= tolerance
    assert torch.equal(again, y)


LOADED = [case for case in CASES if expectation(case)["loads"] == "yes"]
REFUSED = [case for case in CASES if expectation(case)["loads"] == "refuse"]
PICKLED = [case for case in LOADED if expectation(case).get("pickle") == "module"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", [c for c in LOADED if c not in PICKLED], ids=name_of)
def test_code_and_reconstruction_are_the_peers(case, dtype):
    about, want = expectation(case), load_file(case / "expected.safetensors")
    bits = "32" if dtype == torch.float32 else "64"
    code, out = want[f"code{bits}"], want[f"out{bits}"]
    given = options(case, about) | {"dtype": dtype}
    if about.get("normalize_decoder") == "False":
        pytest.skip("an option of the peer's loader; see test_norms_may_stay")
    if "layers" in about:
        for layer in range(int(about["layers"])):
            sae = fastsae.load(case, layer=layer, **given)
            check(sae, want["x"][layer], code[layer], out[layer], dtype)
        return
    tolerance = max(TOLERANCES[dtype], ROUNDED.get(name_of(case), 0))
    check(fastsae.load(entrance(case), **given), want["x"], code, out, dtype, tolerance)


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_what_cannot_be_represented_is_refused(case):
    with pytest.raises(ValueError, match=r"^load: ") as caught:
        fastsae.load(entrance(case), **options(case, expectation(case)))
    assert "\n" not in str(caught.value)
    assert "cannot be represented" in str(caught.value)


def test_there_are_cases_of_every_format():
    formats = {case.parent.name for case in CASES}
    assert formats == {path.name for path in PEERS.iterdir() if path.is_dir()}
    assert len(LOADED) > 150
    assert len(REFUSED) > 10


@pytest.mark.parametrize("case", [c for c in LOADED if c.parent.name == "saelens"], ids=name_of)
def test_a_saelens_folder_keeps_what_it_says_of_its_model(case):
    sae = fastsae.load(case)
    about = json.loads((case / "cfg.json").read_text())["metadata"]
    assert sae.metadata["hook_name"] == about["hook_name"]
    assert sae.metadata["model_name"] == about["model_name"]


@pytest.mark.parametrize("case", PICKLED, ids=name_of)
def test_a_whole_module_is_refused_unless_it_may_run_code(case):
    with pytest.raises(
        ValueError, match=r"^load: .* a whole module, .* allow_pickle=True"
    ) as caught:
        fastsae.load(entrance(case))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", PICKLED, ids=name_of)
def test_a_whole_module_is_read_with_its_library(case, dtype):
    pytest.importorskip("overcomplete")
    want, bits = load_file(case / "expected.safetensors"), "32" if dtype == torch.float32 else "64"
    sae = fastsae.load(entrance(case), dtype=dtype, allow_pickle=True)
    check(sae, want["x"], want[f"code{bits}"], want[f"out{bits}"], dtype)


def test_a_whole_module_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "overcomplete", None)
    with pytest.raises(ModuleNotFoundError, match=r"^load: .* pip install overcomplete$"):
        fastsae.load(PEERS / "overcomplete/sae_module/sae.pt", allow_pickle=True)


FACTS = {
    "circuit_tracer/relu": (
        "google/gemma-2-2b",
        "blocks.1.mlp.hook_in",
        "blocks.1.mlp.hook_out",
    ),
    "gemma_scope/v2": (
        "google/gemma-3-270m",
        "model.layers.5.pre_feedforward_layernorm.output",
        "model.layers.5.post_feedforward_layernorm.output",
    ),
    "llama_scope/jumprelu": (None, "blocks.15.hook_resid_post", None),
    "llama_scope/transcoder": (None, "blocks.15.hook_resid_post", "blocks.15.hook_mlp_out"),
    "llama_scope/r1_distill": (None, "blocks.15.hook_resid_post", None),
    "llamascopium/topk": (None, "blocks.5.hook_resid_post", None),
    "llamascopium/jumprelu_transcoder": (
        None,
        "blocks.5.hook_resid_post",
        "blocks.5.hook_mlp_out",
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_what_files_say_of_their_model_is_kept(name):
    layer = {"layer": 1} if name.startswith("circuit_tracer") else {}
    metadata = fastsae.load(PEERS / name, **layer).metadata
    got = tuple(metadata.get(key) for key in ("model_name", "hook_name", "hook_name_out"))
    assert got == FACTS[name]


def test_a_batch_topk_state_dict_takes_both_numbers(caplog):
    path = PEERS / "overcomplete/batch_topk/sae.pt"
    both = fastsae.load(path, k=4, threshold=0.8125)
    assert type(both).__name__ == "BatchTopKSAE"
    assert (both.k, float(both.threshold)) == (4, pytest.approx(0.8125, abs=1e-7))
    # Active at the threshold as well.
    assert float(both.threshold) < 0.8125
    assert not caplog.records
    fastsae.load(path)
    assert "does not say which latents stay active" in caplog.text
