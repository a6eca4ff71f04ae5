"""circuit-tracer's layout, written and read again; tests/interop/peers has what it wrote itself."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fastsae
from fastsae.interop import circuit_tracer
from fastsae.nn import (
    BatchTopKTranscoder,
    JumpReLUSAE,
    JumpReLUTranscoder,
    ReLUSAE,
    ReLUTranscoder,
    Transcoder,
)

PEERS = Path(__file__).parent / "peers" / "circuit_tracer"
D, N = 12, 32
HOOKS = ("ln2.hook_normalized", "hook_mlp_out")


def transcoder(cls=JumpReLUTranscoder, skip: bool = False, d_out: int = D, **kwargs):
    torch.manual_seed(0)
    sae = cls(d_in=D, d_out=d_out, d_sae=N, skip=skip, **kwargs)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        if isinstance(sae, JumpReLUTranscoder):
            sae.log_threshold.uniform_(-3, 0)
    return sae.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("cls", [ReLUTranscoder, JumpReLUTranscoder])
def test_a_layer_comes_back(tmp_path, cls, skip, dtype):
    sae = transcoder(cls, skip).to(dtype)
    file = tmp_path / "layer_3.safetensors"
    circuit_tracer.write(sae, file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    again = fastsae.load(file)
    assert type(again) is cls
    x = torch.randn(20, D).to(dtype)
    if cls is JumpReLUTranscoder:  # its logs are rounded once more
        torch.testing.assert_close(again.threshold, sae.threshold, rtol=3e-7, atol=0)
        again.log_threshold.data = sae.log_threshold.data
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again(x), sae(x))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("cls", [ReLUTranscoder, JumpReLUTranscoder])
def test_a_file_has_the_layout_of_circuit_tracer(tmp_path, cls, skip):
    circuit_tracer.write(transcoder(cls, skip), tmp_path / "layer_0.safetensors")
    name = ("jumprelu" if cls is JumpReLUTranscoder else "relu") + ("_skip" if skip else "")
    theirs = load_file(PEERS / name / "layer_0.safetensors")
    ours = load_file(tmp_path / "layer_0.safetensors")
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_a_set_comes_back(tmp_path):
    saes = {0: transcoder(ReLUTranscoder, True), 1: transcoder(JumpReLUTranscoder, True)}
    circuit_tracer.write_set(saes, tmp_path / "set", "owner/name: with a colon", *HOOKS)
    names = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert names == ["config.yaml", "layer_0.safetensors", "layer_1.safetensors"]
    assert yaml.safe_load((tmp_path / "set" / "config.yaml").read_text()) == {
        "model_name": "owner/name: with a colon",
        "model_kind": "transcoder_set",
        "feature_input_hook": HOOKS[0],
        "feature_output_hook": HOOKS[1],
        "scan": None,
    }
    again = fastsae.load(tmp_path / "set", layer=1)
    assert type(again) is JumpReLUTranscoder
    assert again.metadata == {
        "model_name": "owner/name: with a colon",
        "hook_name": f"blocks.1.{HOOKS[0]}",
        "hook_name_out": f"blocks.1.{HOOKS[1]}",
    }
    x = torch.randn(5, D)
    torch.testing.assert_close(again(x), saes[1](x))
    with pytest.raises(ValueError, match=r"^load: expected layer= one of the layers 0 to 1"):
        fastsae.load(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match=r"^load: .* layer_7.safetensors, found layers 0"):
        fastsae.load(tmp_path / "set", layer=7)


@pytest.mark.parametrize("cls", [Transcoder, BatchTopKTranscoder, ReLUSAE, JumpReLUSAE])
def test_what_the_file_has_no_place_for_is_refused(tmp_path, cls):
    sae = cls(D, N) if cls in (ReLUSAE, JumpReLUSAE) else transcoder(cls, k=4)
    with pytest.raises(ValueError, match=f"^save: .* got {cls.__name__}; .* read as ReLU$"):
        circuit_tracer.write(sae, tmp_path / "layer_0.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_is_no_set_is_refused(tmp_path):
    relu, skip = transcoder(ReLUTranscoder), transcoder(ReLUTranscoder, True)
    for saes, message in (
        ({}, "without a gap"),
        ({1: relu}, "without a gap"),
        ({0: relu, 1: skip}, "all with a skip or none"),
        ({0: transcoder(ReLUTranscoder, d_out=D + 1)}, "as wide as the input"),
    ):
        with pytest.raises(ValueError, match=f"^save: .*{message}"):
            circuit_tracer.write_set(saes, tmp_path / "set", "owner/name", *HOOKS)
    assert not (tmp_path / "set").exists()
    circuit_tracer.write_set({0: relu, 1: relu}, tmp_path / "set", "owner/name", *HOOKS)
    with pytest.raises(ValueError, match=r"^save: .* no other layers, .* got layer_1.safetensors"):
        circuit_tracer.write_set({0: relu}, tmp_path / "set", "owner/name", *HOOKS)


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "layer_0.safetensors"
    circuit_tracer.write(transcoder(), file)
    before = file.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(circuit_tracer, "publish", full)
    with pytest.raises(RuntimeError, match=r"^save: .*No space left on device"):
        circuit_tracer.write(transcoder(ReLUTranscoder), file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_layer_loads_without_pyyaml_and_a_set_says_what_to_install(tmp_path, monkeypatch):
    folder = shutil.copytree(PEERS / "relu", tmp_path / "relu")
    assert fastsae.load(folder / "layer_1.safetensors").metadata["hook_name"].startswith("blocks.1")
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert fastsae.load(folder / "layer_1.safetensors").metadata == {}
    with pytest.raises(ModuleNotFoundError, match=r"^load: .* pip install pyyaml$"):
        fastsae.load(folder, layer=0)


def test_folders_of_others_with_a_config_yaml_are_not_taken_for_sets(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {class_path: somewhere}\n")
    assert not circuit_tracer.matches(tmp_path)
