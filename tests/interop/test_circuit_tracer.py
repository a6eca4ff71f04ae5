"""circuit-tracer's layout, written and read again; tests/interop/peers has what it wrote itself."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import fastsae
from fastsae.interop import circuit_tracer
from fastsae.nn import (
    BatchTopKCrossLayerTranscoder,
    BatchTopKTranscoder,
    CrossLayerTranscoder,
    JumpReLUCrossLayerTranscoder,
    JumpReLUSAE,
    JumpReLUTranscoder,
    ReLUCrossLayerTranscoder,
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


def clt(cls=JumpReLUCrossLayerTranscoder, decoders="full", dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    rank = 3 if decoders == "low_rank" else None
    sae = cls(D, 3, N, decoders=decoders, rank=rank, dtype=dtype, **kwargs)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        if cls is JumpReLUCrossLayerTranscoder:
            sae.log_threshold.uniform_(-3, 0)
        if cls is BatchTopKCrossLayerTranscoder:
            sae.threshold.copy_(torch.rand(sae.threshold.shape))
        if decoders == "tied":
            sae.output_scale.copy_(torch.tensor([0.5, 2.0, 3.0]))
    return sae.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cls", [ReLUCrossLayerTranscoder, JumpReLUCrossLayerTranscoder])
def test_a_cross_layer_transcoder_comes_back(tmp_path, cls, dtype):
    sae = clt(cls, dtype=dtype)
    fastsae.save(sae, tmp_path / "clt", format="circuit-tracer")
    names = [f"W_{kind}_{layer}.safetensors" for kind in ("dec", "enc") for layer in range(3)]
    assert sorted(path.name for path in (tmp_path / "clt").iterdir()) == names
    again = fastsae.load(tmp_path / "clt")
    assert type(again) is cls
    assert (again.d_model, again.n_layers, again.d_transcoder) == (D, 3, N)
    for name, tensor in sae.state_dict().items():
        if name == "log_threshold":  # its logs are rounded once more
            torch.testing.assert_close(again.log_threshold, tensor, rtol=1e-6, atol=1e-6)
            again.log_threshold.data = tensor
        elif name in ("W_enc_rows", "b_enc", "b_dec") or name.startswith("W_decs"):
            assert torch.equal(again.state_dict()[name], tensor), name
    x = torch.randn(20, 3 * D).to(dtype)
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again(x), sae(x))


@pytest.mark.parametrize("select", ["token", "layer"])
def test_a_batch_topk_is_written_with_the_threshold_that_it_has(tmp_path, select):
    sae = clt(BatchTopKCrossLayerTranscoder, k=4, select=select)
    fastsae.save(sae, tmp_path, format="circuit-tracer")
    again, x = fastsae.load(tmp_path), torch.randn(20, 3 * D)
    assert type(again) is JumpReLUCrossLayerTranscoder
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=0, atol=0)
    torch.testing.assert_close(again(x), sae(x), rtol=1e-6, atol=1e-6)
    sae.threshold.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"^save: expected a threshold of .* got none yet"):
        fastsae.save(sae, tmp_path, format="circuit-tracer")


@pytest.mark.parametrize("decoders", ["own", "tied", "low_rank"])
def test_other_decoders_are_written_in_full_and_loudly(tmp_path, decoders, caplog):
    sae = clt(decoders=decoders)
    fastsae.save(sae, tmp_path, format="circuit-tracer")
    assert f"no {decoders} decoders; written out in full, 2304 numbers for" in caplog.text
    again, x = fastsae.load(tmp_path), torch.randn(20, 3 * D)
    assert again.decoders == "full"
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again(x), sae(x), rtol=1e-5, atol=1e-5)


def test_a_cross_layer_folder_says_what_it_is_of(tmp_path):
    sae = clt()
    circuit_tracer.write_cross_layer(sae, tmp_path, "owner/name: with a colon", *HOOKS)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {
        "model_name": "owner/name: with a colon",
        "model_kind": "cross_layer_transcoder",
        "feature_input_hook": HOOKS[0],
        "feature_output_hook": HOOKS[1],
        "scan": None,
    }
    assert fastsae.load(tmp_path).metadata == {
        "model_name": "owner/name: with a colon",
        "hook_name": HOOKS[0],
        "hook_name_out": HOOKS[1],
    }
    theirs = {path.name: {k: v.shape for k, v in load_file(path).items()}
              for path in (PEERS / "clt_jumprelu").glob("W_*_1.safetensors")}  # fmt: skip
    assert {name: set(held) for name, held in theirs.items()} == {
        name: set(load_file(tmp_path / name)) for name in theirs
    }
    ours = load_file(tmp_path / "W_dec_1.safetensors")["W_dec_1"]
    assert [*ours.shape] == [N, 2, D]


def test_what_a_cross_layer_folder_has_no_place_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^save: .* got CrossLayerTranscoder; .* read as ReLU$"):
        fastsae.save(clt(CrossLayerTranscoder, k=4), tmp_path / "a", format="circuit-tracer")
    assert not (tmp_path / "a").exists()
    fastsae.save(clt(), tmp_path / "b", format="circuit-tracer")
    small = ReLUCrossLayerTranscoder(D, 2, N)
    with pytest.raises(ValueError, match=r"^save: .* hold no other layers, .* got W_enc_2 or"):
        fastsae.save(small, tmp_path / "b", format="circuit-tracer")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^save: expected a folder for a cross-layer transcoder"):
        fastsae.save(clt(), tmp_path / "file", format="circuit-tracer")


def _rewritten(file: Path, change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("W_enc_1", None, "^load: expected .* to hold W_enc_1.safetensors, found none$"),
        ("W_dec_2", None, "^load: expected .* to hold W_dec_2.safetensors, found none$"),
        ("W_enc_1", lambda t: {k: v for k, v in t.items() if k != "b_dec_1"},
         "^load: expected .* to hold b_dec_1, got"),
        ("W_enc_1", lambda t: {k: v for k, v in t.items() if k != "threshold_1"},
         "^load: expected layers of .* a threshold or none, all of them, got another in layer 1$"),
        ("W_enc_1", lambda t: t | {"W_skip_1": torch.ones(D, D)},
         "^load: .* cannot be represented: tensors that are none of a transcoder's: W_skip_1$"),
        ("W_enc_2", lambda t: t | {"threshold_2": -torch.ones(N)},
         "^load: .* cannot be represented: thresholds below 0, above which"),
        ("W_dec_1", lambda t: {"W_dec_1": torch.ones(N, 3, D)},
         r"^load: expected W_dec_1 to be floating \[32, 2, 12\] in .*, got torch.float32 \[32, 3,"),
        ("W_enc_0", lambda t: t | {"W_enc_0": torch.ones(N, D).int()},
         r"^load: expected W_enc_0 to be floating \[d_transcoder, d\] in .*, got torch.int32"),
        ("W_enc_1", lambda t: t | {"b_enc_1": torch.ones(N + 1)},
         r"^load: expected b_enc_1 to be floating \[32\] in .*, got torch.float32 \[33\]$"),
    ],
)  # fmt: skip
def test_a_damaged_cross_layer_folder_is_refused(tmp_path, name, change, error):
    fastsae.save(clt(), tmp_path, format="circuit-tracer")
    file = tmp_path / f"{name}.safetensors"
    if change is None:
        file.unlink()
    else:
        _rewritten(file, change)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        fastsae.load(tmp_path)


def test_layers_of_a_cross_layer_folder_belong_together(tmp_path):
    fastsae.save(clt(), tmp_path, format="circuit-tracer")
    with pytest.raises(ValueError, match=r"^load: expected no layer= for .* together, got 1$"):
        fastsae.load(tmp_path, layer=1)


@pytest.mark.parametrize("decoders", ["full", "tied"])
@pytest.mark.parametrize(
    "cls",
    [ReLUCrossLayerTranscoder, JumpReLUCrossLayerTranscoder, BatchTopKCrossLayerTranscoder],
)
def test_circuit_tracer_loads_and_computes_the_same(tmp_path, cls, decoders):
    name = "circuit_tracer.transcoder.cross_layer_transcoder"
    loader = pytest.importorskip(name, reason="circuit-tracer is not installed")
    sae = clt(cls, decoders, torch.float64, k=4)
    circuit_tracer.write_cross_layer(sae, tmp_path, "owner/name", *HOOKS)
    x = torch.randn(40, 3 * D).double()
    given = sae.layers(x).transpose(0, 1)
    for lazy in (False, True):
        theirs = loader.load_clt(
            str(tmp_path), device=torch.device("cpu"), dtype=torch.float64,
            lazy_decoder=lazy, lazy_encoder=lazy,
        )  # fmt: skip
        with torch.no_grad():
            code = theirs.encode(given)
            out = theirs.decode(code)
        ours = sae.encode(x).unflatten(1, (3, N)).transpose(0, 1)
        assert torch.equal(ours != 0, code != 0)
        torch.testing.assert_close(ours, code, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(sae.layers(sae(x)).transpose(0, 1), out, rtol=1e-10, atol=1e-10)
