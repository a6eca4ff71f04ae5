"""What is written for other libraries, read back with the formulas of theirs; names of sites."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastsae
from fastsae import cli, nn
from fastsae.interop import folder
from fastsae.interop.hooks import describe_sites, hook_name, site_of, sites_in
from tests.nn.randomized import make, rows

SPARSIFY = {
    "topk": lambda: make(nn.TopKSAE, 6, 16, 3),
    "multi_topk": lambda: make(nn.TopKSAE, 6, 16, 3, multi_topk=True),
    "groupmax": lambda: make(nn.GroupMaxSAE, 6, 16, 4),
    "transcoder": lambda: make(nn.Transcoder, 6, 6, 16, 3),
    "skip": lambda: make(nn.Transcoder, 6, 6, 16, 3, skip=True),
    "groupmax_transcoder": lambda: make(nn.GroupMaxTranscoder, 6, 6, 16, 4, skip=True),
}
DICTIONARY = {
    "relu": lambda: make(nn.ReLUSAE, 6, 16, 3),
    "relu_no_b_dec": lambda: make(nn.ReLUSAE, 6, 16, 3, apply_b_dec_to_input=False),
    "gated": lambda: make(nn.GatedSAE, 6, 16, 3),
    "jumprelu": lambda: make(nn.JumpReLUSAE, 6, 16, 3),
    "topk": lambda: make(nn.TopKSAE, 6, 16, 3),
    "batch_topk": lambda: make(nn.BatchTopKSAE, 6, 16, 3),
    "matryoshka": lambda: make(nn.MatryoshkaSAE, 6, 16, 3, groups=[4, 4, 8]),
}


def made(build):
    sae = build()
    sae.normalize_decoder_()
    if hasattr(sae, "threshold") and isinstance(sae.threshold, torch.Tensor):
        sae.train()
        sae.loss(rows(40, 6))
    sae.metadata = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post"}
    return sae.eval()


def same(a, b, x, tolerance=1e-12):
    with torch.no_grad():
        code, other = a.encode(x), b.encode(x)
        assert torch.equal(code != 0, other != 0)
        torch.testing.assert_close(code, other, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(a(x), b(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("format", "build"),
    [("sparsify", b) for b in SPARSIFY.values()]
    + [("dictionary-learning", b) for b in DICTIONARY.values()],
    ids=[f"sparsify-{n}" for n in SPARSIFY] + [f"dictionary-{n}" for n in DICTIONARY],
)
def test_what_is_written_for_another_library_computes_the_same(format, build, tmp_path):
    sae = made(build)
    fastsae.save(sae, tmp_path / "out", format=format)
    back = fastsae.load(tmp_path / "out")
    same(sae, back, rows(50, 6))


def test_a_sparsify_folder_has_the_keys_of_the_library(tmp_path):
    sae = made(SPARSIFY["skip"])
    fastsae.save(sae, tmp_path, format="sparsify")
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg == {
        "activation": "topk", "expansion_factor": 2, "normalize_decoder": True, "num_latents": 16,
        "k": 3, "multi_topk": False, "skip_connection": True, "transcode": True, "d_in": 6,
    }  # fmt: skip
    tensors = load_file(tmp_path / "sae.safetensors")
    assert torch.equal(tensors["encoder.weight"], sae.W_enc.detach().t())
    assert torch.equal(tensors["W_skip"], sae.W_skip)


def test_a_shift_is_not_rounded_to_16_bits(tmp_path):
    sae = made(DICTIONARY["jumprelu"]).bfloat16()
    with pytest.raises(
        ValueError, match=r"^save: expected float32 or float64 .*got torch.bfloat16"
    ):
        fastsae.save(sae, tmp_path / "out", format="dictionary-learning")


@pytest.mark.parametrize("dtype", ["float16", torch.int8])
def test_a_dtype_is_a_floating_one(dtype, tmp_path):
    fastsae.save(made(SPARSIFY["topk"]), tmp_path)
    with pytest.raises(ValueError, match=r"^load: expected dtype to be a floating torch\.dtype"):
        fastsae.load(tmp_path, dtype=dtype)


@pytest.mark.parametrize(
    ("format", "build", "message"),
    [
        ("sparsify", lambda: make(nn.JumpReLUSAE, 6, 16, 3), "expected TopK or GroupMax.*JumpReLU"),
        ("sparsify", lambda: make(nn.TopKSAE, 6, 16, 3, absolute=True), "TopKSAE of magnitudes"),
        ("sparsify", lambda: make(nn.HierarchicalTopKSAE, 6, 16, 3), "got HierarchicalTopKSAE"),
        ("sparsify", lambda: make(nn.Transcoder, 6, 5, 16, 3), "as wide as the input.*6 and 5"),
        ("sparsify", lambda: make(nn.TopKSAE, 6, 16, 3, apply_b_dec_to_input=False), "got False"),
        ("dictionary-learning", lambda: make(nn.GroupMaxSAE, 6, 16, 4), "got GroupMaxSAE"),
        ("dictionary-learning", lambda: make(nn.BatchTopKSAE, 6, 16, 2.5), "a whole k.*got 2.5"),
        ("saelens", lambda: make(nn.GroupMaxSAE, 6, 16, 4), "a class that SAELens has.*GroupMax"),
        ("onnx", lambda: make(nn.TopKSAE, 6, 16, 3), "expected format to be one of saelens, spar"),
    ],
)
def test_what_a_library_does_not_have_is_refused(format, build, message, tmp_path):
    with pytest.raises(ValueError, match=f"^save: .*{message}"):
        fastsae.save(build(), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_rows_of_other_norms_are_not_written_where_they_would_change_the_code(tmp_path):
    sae = made(DICTIONARY["relu"])
    sae.W_dec = 2 * sae.W_dec.detach()
    with pytest.raises(ValueError, match=r"^save: expected rows of W_dec of norm 1 .* got 2 to 2"):
        fastsae.save(sae, tmp_path, format="dictionary-learning")


SITES = {
    "resid_pre.3": "blocks.3.hook_resid_pre",
    "resid_post.15": "blocks.15.hook_resid_post",
    "mlp_in.0": "blocks.0.mlp.hook_in",
    "mlp_out.0": "blocks.0.hook_mlp_out",
    "attn_z.2": "blocks.2.attn.hook_z",
    "embed": "hook_embed",
    "model.layers.3.mlp:in": "model.layers.3.mlp:in",
    "head.3.2": "head.3.2",
}


@pytest.mark.parametrize(("site", "hook"), SITES.items())
def test_sites_have_the_names_of_transformer_lens(site, hook):
    assert hook_name(site) == hook
    assert site_of(hook) == site


def test_metadata_lead_back_to_the_sites():
    for sites, transcoder in (
        (["resid_post.3"], False),
        (["mlp_in.3", "mlp_out.3"], True),
        (["resid_post.1", "resid_post.2"], False),
    ):
        assert sites_in(describe_sites(sites, transcoder=transcoder)) == sites
    assert describe_sites(["mlp_in.3", "mlp_out.3"], transcoder=True) == {
        "hook_name": "blocks.3.mlp.hook_in",
        "hook_name_out": "blocks.3.hook_mlp_out",
    }
    assert sites_in({"hook_name": "resid_post.3"}) == ["resid_post.3"]  # of earlier versions


def test_heads_are_reshaped_in_the_other_library(tmp_path):
    sae = made(SPARSIFY["topk"])
    sae.metadata = describe_sites(["attn_z.3"])
    fastsae.save(sae, tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    assert type(fastsae.load(tmp_path)) is nn.TopKSAE


@pytest.mark.parametrize("scale", [1.0, 1.00001])
def test_rows_of_norm_1_may_be_rescaled(scale, tmp_path):
    sae = made(SPARSIFY["topk"])
    sae.W_dec = scale * sae.W_dec.detach()
    fastsae.save(sae, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["rescale_acts_by_decoder_norm"] is (scale == 1)


def resave(path, change, tensors=None):
    """Do to a folder what SAELens does when it saves what it loaded: tensors and keys without
    checksums, our metadata as they were."""
    file, weights = path / "cfg.json", path / "sae_weights.safetensors"
    cfg, held = json.loads(file.read_text()), load_file(weights)
    change(cfg)
    file.write_text(json.dumps(cfg))
    save_file({**held, **(tensors(held) if tensors else {})}, weights)


def test_a_folder_that_saelens_saved_again_keeps_its_class(tmp_path):
    sae = made(DICTIONARY["matryoshka"])
    fastsae.save(sae, tmp_path)
    resave(tmp_path, lambda cfg: cfg.update(device="cpu", extra=1))
    back = fastsae.load(tmp_path)
    assert type(back) is nn.MatryoshkaSAE
    same(sae, back, rows(50, 6), 0)


def test_what_was_changed_in_saelens_is_followed(tmp_path, caplog):
    sae = made(SPARSIFY["topk"])
    fastsae.save(sae, tmp_path)
    resave(tmp_path, lambda cfg: cfg.update(k=5))
    back = fastsae.load(tmp_path)
    assert back.k == 5
    assert "was saved by SAELens after fastsae, with other settings" in caplog.text


def test_settings_of_saelens_are_not_ignored(tmp_path):
    sae = made(SPARSIFY["topk"])
    fastsae.save(sae, tmp_path)
    change = {"apply_b_dec_to_input": False, "normalize_activations": "layer_norm"}
    resave(tmp_path, lambda cfg: cfg.update(change))
    back = fastsae.load(tmp_path)
    x = rows(20, 6)
    u = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    z = (u @ sae.W_enc + sae.b_enc).relu()
    code = z * torch.zeros_like(z).scatter(1, z.topk(3).indices, 1.0)
    torch.testing.assert_close(back.encode(x), code)
    x_hat = (code @ sae.W_dec + sae.b_dec) * x.std(1, keepdim=True) + x.mean(1, keepdim=True)
    torch.testing.assert_close(back(x), x_hat)


def test_folded_thresholds_are_those_of_each_latent(tmp_path):
    sae = made(DICTIONARY["batch_topk"])
    fastsae.save(sae, tmp_path)
    factor = 1 + 0.5 * torch.rand(16, dtype=torch.float64)

    def folded(held):
        return {
            "W_enc": held["W_enc"] * factor,
            "b_enc": held["b_enc"] * factor,
            "W_dec": held["W_dec"] / factor.unsqueeze(1),
            "threshold": held["threshold"] * factor,
        }

    resave(tmp_path, lambda cfg: cfg.update(extra=1), folded)
    back = fastsae.load(tmp_path)
    x = rows(50, 6)
    torch.testing.assert_close(back.encode(x), sae.encode(x) * factor)
    torch.testing.assert_close(back(x), sae(x))


def test_thresholds_below_0_are_0(tmp_path):
    sae, lower = made(DICTIONARY["jumprelu"]), torch.linspace(0, 1, 16)
    fastsae.save(sae, tmp_path)
    resave(
        tmp_path,
        lambda cfg: cfg.update(extra=1),
        lambda held: {"threshold": held["threshold"] - lower},
    )
    back = fastsae.load(tmp_path)
    threshold = (sae.threshold - lower).clamp_min(0)
    assert bool((threshold == 0).any())
    x = rows(50, 6)
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(back.encode(x), torch.where(z > threshold, z, 0))


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_a_normalized_sae_comes_back(kind, tmp_path):
    sae = nn.NormalizedSAE(made(SPARSIFY["topk"]), kind).eval()
    fastsae.save(sae, tmp_path)
    back = fastsae.load(tmp_path)
    assert back.normalize_activations == kind
    assert back.sae.config() == sae.sae.config()
    same(sae, back, rows(20, 6), 0)
    assert json.loads((tmp_path / "cfg.json").read_text())["normalize_activations"] == kind


def test_a_matching_pursuit_comes_back(tmp_path):
    sae = make(nn.MatchingPursuitSAE, 6, 16, max_iterations=4).eval()
    sae.b_enc = torch.zeros(16)
    fastsae.save(sae, tmp_path)
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == {"W_dec", "b_dec"}
    back = fastsae.load(tmp_path)
    assert back.W_enc_rows is back.W_dec
    same(sae, back, rows(20, 6), 0)


def test_a_dtype_may_be_asked_for(tmp_path):
    fastsae.save(made(DICTIONARY["jumprelu"]).float(), tmp_path)
    back = fastsae.load(tmp_path, dtype=torch.float64)
    assert back.W_dec.dtype == torch.float64
    assert back.log_threshold.dtype == torch.float32


def test_the_command_converts(tmp_path, capsys):
    sae = made(SPARSIFY["topk"])
    fastsae.save(sae, tmp_path / "in")
    out = tmp_path / "out"
    assert cli.main(["convert", str(tmp_path / "in"), str(out), "--to", "sparsify"]) == 0
    assert "TopKSAE for sparsify" in capsys.readouterr().out
    assert cli.main(["convert", str(out), str(tmp_path / "again")]) == 0
    same(sae, fastsae.load(tmp_path / "again"), rows(20, 6), 0)
    assert cli.main(["convert", str(out), str(out)]) == 1
    assert "expected OUT to be another path" in capsys.readouterr().err


def test_no_peer_is_imported_by_loading(tmp_path):
    fastsae.save(made(SPARSIFY["topk"]), tmp_path, format="sparsify")
    code = f"""
import sys, fastsae
fastsae.load({str(tmp_path)!r})
print([m for m in ("sae_lens", "sparsify", "dictionary_learning", "huggingface_hub", "yaml")
       if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


class Hub:
    """Stands in for huggingface_hub."""

    def __init__(self, root):
        self.root, self.asked = root, None

    def snapshot_download(self, repository, allow_patterns=None):
        self.asked = (repository, allow_patterns)
        return str(self.root)


def test_a_repository_of_the_hub(tmp_path, monkeypatch):
    sae = made(SPARSIFY["topk"])
    fastsae.save(sae, tmp_path / "layer_3" / "width_16", format="sparsify")
    hub = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    same(sae, fastsae.load("hf:owner/name/layer_3/width_16"), rows(20, 6), 0)
    inside = "layer_3/width_16"
    assert hub.asked == ("owner/name", [inside, f"{inside}/*"])
    with pytest.raises(FileNotFoundError, match="load: expected layer_4 in owner/name, found none"):
        fastsae.load("hf:owner/name/layer_4")
    for name in ("hf:owner", "hf:owner/name/../x"):
        with pytest.raises(ValueError, match="load: expected hf:OWNER/NAME"):
            fastsae.load(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match="load: expected huggingface_hub"):
        fastsae.load("hf:owner/name")


def test_folder_and_saelens_agree_on_names():
    assert folder.WEIGHTS == "sae_weights.safetensors"
    with pytest.raises(ValueError, match="load: expected format to be one of fastsae, saelens"):
        fastsae.load("x", format="other")
