"""Save and load: exact round trips, SAELens' layout, and saves that go wrong."""

import errno
import json
import random
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastsae
from fastsae import load
from fastsae.interop import folder
from fastsae.nn import SAE, BatchTopKSAE, JumpReLUSAE, TopKSAE
from tests.interop.older import strip_checksums


def trained(cls, dtype=torch.float32):
    sae = cls(8, 24, k=3, dtype=dtype, k_aux=5, auxk_alpha=0.125)
    sae.b_enc = 0.1 * torch.randn(24).to(dtype)
    sae.b_dec = torch.randn(8).to(dtype)
    sae.metadata = {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre"}
    sae.loss(torch.randn(20, 8).to(dtype))
    return sae


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE])
def test_round_trip_is_exact(cls, dtype, tmp_path):
    sae = trained(cls, dtype)
    fastsae.save(sae, tmp_path)
    state = torch.get_rng_state()
    back = load(tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert type(back) is cls
    assert back.config() == sae.config()
    assert back.metadata == sae.metadata
    assert back.W_enc.dtype == dtype
    assert back.W_enc.t().is_contiguous()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
        assert back.state_dict()[name].dtype == tensor.dtype, name
    assert not back.training
    x = torch.randn(5, 8).to(dtype)
    assert torch.equal(back(x), sae.eval()(x))


def test_an_untrained_batch_topk_comes_back_untrained(tmp_path):
    fastsae.save(BatchTopKSAE(8, 24, k=2.5), tmp_path)
    assert load(tmp_path).threshold == torch.inf


@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE])
def test_files_mean_in_saelens_terms_what_the_module_computes(cls, tmp_path):
    sae = trained(cls).eval()
    fastsae.save(sae, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    w = load_file(tmp_path / "sae_weights.safetensors")
    common = {"d_in": 8, "d_sae": 24, "dtype": "float32", "device": "cpu",
              "apply_b_dec_to_input": True, "normalize_activations": "none",
              "reshape_activations": "none"}  # fmt: skip
    assert cfg.items() >= common.items()
    assert cfg["metadata"]["model_name"] == "gpt2"
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert w["W_enc"].shape == (8, 24)
    assert w["W_dec"].shape == (24, 8)
    x = torch.randn(30, 8)
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    if cfg["architecture"] == "topk":
        assert cfg["rescale_acts_by_decoder_norm"] is True  # rows have norm 1, so it may be
        top = pre.topk(cfg["k"])
        acts = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    else:
        assert cfg["architecture"] == "jumprelu"
        assert w["threshold"].shape == (24,)
        acts = pre.relu() * (pre > w["threshold"])
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae(x), acts @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("writer", ["write_tensors", "write_file"])
def test_a_full_disk_keeps_the_previous_save(writer, tmp_path, monkeypatch):
    sae = trained(TopKSAE)
    fastsae.save(sae, tmp_path)

    def full(file, *_):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    other = trained(BatchTopKSAE)
    with monkeypatch.context() as patch:
        patch.setattr(folder, writer, full)
        with pytest.raises(RuntimeError, match=r"^save: could not write .* \(No space left on dev"):
            fastsae.save(other, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert torch.equal(load(tmp_path).W_dec, sae.W_dec)
    fastsae.save(other, tmp_path)
    assert isinstance(load(tmp_path), BatchTopKSAE)


def test_a_write_that_the_system_cuts_short_keeps_the_previous_save(tmp_path):
    sae = trained(TopKSAE)
    fastsae.save(sae, tmp_path)
    code = f"""
import random
import resource
import shutil
import fastsae
from fastsae.nn import TopKSAE
sae = TopKSAE(8, 2000, k=3)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, {resource.RLIM_INFINITY}))
fastsae.save(sae, {str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RuntimeError: save: could not write" in done.stderr.splitlines()[-1]
    assert torch.equal(load(tmp_path).W_dec, sae.W_dec)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="save: could not write"):
        fastsae.save(trained(TopKSAE), tmp_path / "file" / "sae")


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_missing_file(name, tmp_path):
    fastsae.save(trained(TopKSAE), tmp_path)
    strip_checksums(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"^load: expected .* to hold {name}, found none$"):
        load(tmp_path)


def damage(change):
    def apply(folder):
        file = folder / "cfg.json"
        cfg = json.loads(file.read_text())
        change(cfg)
        file.write_text(json.dumps(cfg))

    return apply


def swap(name, tensor):
    def apply(folder):
        file = folder / "sae_weights.safetensors"
        tensors = load_file(file)
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
        save_file(tensors, file)

    return apply


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "cfg.json").write_text("{"), "to be JSON"),
        (lambda f: (f / "cfg.json").write_text("[1]"), "to be a JSON object, got list"),
        (damage(lambda c: c["metadata"]["fastsae"].update({"class": "os.system"})), "os.system"),
        (damage(lambda c: c["metadata"]["fastsae"]["config"].pop("k")), "missing .* argument: 'k'"),
        (damage(lambda c: c["metadata"]["fastsae"]["config"].update(k=0)), "got k = 0"),
        (damage(lambda c: c["metadata"]["fastsae"]["config"].update(d_sae=25)),
         "d_sae = 25 in .* got 24"),
        (damage(lambda c: [d.update(d_sae=25) for d in (c, c["metadata"]["fastsae"]["config"])]),
         r"W_enc to be \[8, 25\] .* got \[8, 24\]"),
        (damage(lambda c: c.update(dtype="int8")), "int8"),
        (lambda f: (f / "sae_weights.safetensors").write_bytes(b"PK\x03\x04" * 20),
         "to be a whole safetensors file"),
        (swap("W_dec", torch.zeros(24, 7)), r"W_dec to be \[24, 8\] .* got \[24, 7\]"),
        (swap("b_enc", None), r"b_enc to be \[24\] .* got none"),
    ],
)  # fmt: skip
def test_damage_is_one_clear_line(break_it, message, tmp_path):
    fastsae.save(trained(TopKSAE), tmp_path)
    strip_checksums(tmp_path)
    break_it(tmp_path)
    with pytest.raises(ValueError, match=f"^load: expected .*{message}") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_truncated_weights_file(tmp_path):
    fastsae.save(trained(TopKSAE), tmp_path)
    file = tmp_path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="to be a whole safetensors file"):
        load(tmp_path)


def test_a_class_of_the_user_comes_back(tmp_path):
    class LoudTopKSAE(TopKSAE):
        pass

    name = f"{__name__}.{LoudTopKSAE.__qualname__}"
    try:
        fastsae.save(LoudTopKSAE(8, 24, k=3), tmp_path)
        assert type(load(tmp_path)) is LoudTopKSAE
        cfg = json.loads((tmp_path / "cfg.json").read_text())
        assert cfg["metadata"]["fastsae"]["class"] == name
    finally:
        del SAE.registry[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(k=4),
            r"expected k = 3 in .*cfg\.json, as metadata.fastsae says, got 4",
        ),
        (lambda c: c.update(d_sae=25), "expected d_sae = 24 .* got 25"),
        (
            lambda c: c.update(architecture="jumprelu"),
            "expected architecture = 'topk' .* got 'jump",
        ),
    ],
)
def test_a_cfg_that_contradicts_itself_is_refused(change, message, tmp_path):
    fastsae.save(trained(TopKSAE), tmp_path)
    strip_checksums(tmp_path)
    damage(change)(tmp_path)
    with pytest.raises(ValueError, match=f"^load: {message}.*; change both, or neither"):
        load(tmp_path)


def test_arguments_under_their_earlier_names_are_read(tmp_path):
    sae = trained(TopKSAE)
    fastsae.save(sae, tmp_path)
    strip_checksums(tmp_path)

    def rename(cfg):
        config = cfg["metadata"]["fastsae"]["config"]
        config["aux_k"], config["aux_alpha"] = config.pop("k_aux"), config.pop("auxk_alpha")

    damage(rename)(tmp_path)
    back = load(tmp_path)
    assert (back.k_aux, back.auxk_alpha) == (5, 0.125)
    assert back.config() == sae.config()


def test_two_files_of_different_saves(tmp_path, caplog):
    one, two = trained(TopKSAE), trained(BatchTopKSAE)
    fastsae.save(one, tmp_path / "one")
    fastsae.save(two, tmp_path / "two")
    shutil.copy(tmp_path / "one/cfg.json", tmp_path / "two/cfg.json")
    back = load(tmp_path / "two")
    assert isinstance(back, BatchTopKSAE)
    assert torch.equal(back.W_dec, two.W_dec)
    assert "cfg.json is of another save; took the copy in" in caplog.text
    (tmp_path / "two/cfg.json").unlink()
    assert isinstance(load(tmp_path / "two"), BatchTopKSAE)


def test_checksums_that_one_file_lost(tmp_path, caplog):
    sae = trained(TopKSAE)
    fastsae.save(sae, tmp_path)
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    strip_checksums(tmp_path)
    bare = {path: path.read_bytes() for path in tmp_path.iterdir()}
    cfg, weights = tmp_path / "cfg.json", tmp_path / "sae_weights.safetensors"
    weights.write_bytes(whole[weights])  # as a save over a folder without checksums may be killed
    assert torch.equal(load(tmp_path).W_dec, sae.W_dec)
    assert "cfg.json is of another save; took the copy in" in caplog.text
    weights.write_bytes(bare[weights])
    cfg.write_bytes(whole[cfg])
    with pytest.raises(ValueError, match=r"^load: expected .*weights.* to have the checksums of"):
        load(tmp_path)


def load_or_reason(folder, caplog):
    """Return the SAE and the warning, or None and why it is refused."""
    caplog.clear()
    try:
        return load(folder), caplog.text
    except ValueError as error:
        return None, str(error)


def test_every_byte_of_a_save_counts(tmp_path, caplog):
    sae = trained(JumpReLUSAE)
    fastsae.save(sae, tmp_path)
    dice = random.Random(0)
    refused = 0
    for name in ("cfg.json", "sae_weights.safetensors"):
        data = (tmp_path / name).read_bytes()
        for _ in range(200):
            place, bit = dice.randrange(len(data)), 1 << dice.randrange(8)
            changed = bytearray(data)
            changed[place] ^= bit
            (tmp_path / name).write_bytes(changed)
            back, said = load_or_reason(tmp_path, caplog)
            blank = {data[place], changed[place]} <= set(b" \n\r\t")
            assert blank or f"{tmp_path}/{name}" in said
            if back is not None:  # by the copy inside the weights, where a key has another name
                assert torch.equal(back.W_dec, sae.W_dec)
                assert blank or name == "cfg.json"
            refused += back is None
        (tmp_path / name).write_bytes(data)
    assert refused > 350
