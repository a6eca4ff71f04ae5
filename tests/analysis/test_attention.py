"""Attributions of attention SAEs add up to the pre-activations of a real attention layer."""

from __future__ import annotations

import re

import pytest
import torch

from fastsae.analysis.attention import (
    head_attribution,
    recursive_attribution,
    source_attribution,
)
from fastsae.nn import TopKSAE

T, D_MODEL, D_HEAD, D_SAE = 9, 24, 5, 40
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
heads_of = pytest.mark.parametrize(("h", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def random_sae(d_in: int, dtype: torch.dtype = torch.float64) -> TopKSAE:
    """An SAE in which encoder and decoder differ and no bias is zero."""
    sae = TopKSAE(d_in, D_SAE, k=4, dtype=dtype)
    for name in ("W_enc", "b_enc", "b_dec"):
        setattr(sae, name, torch.randn_like(getattr(sae, name)))
    return sae


def pre_activations(sae: TopKSAE, x: torch.Tensor) -> torch.Tensor:
    return ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()


def constant(sae: TopKSAE) -> torch.Tensor:
    """What the biases add to every pre-activation."""
    return (sae.b_enc - sae.b_dec @ sae.W_enc).detach()


class Layer:
    """A causal attention layer after an RMSNorm with gain, head by head in plain torch."""

    def __init__(self, h: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> None:
        def weight(n: int) -> torch.Tensor:
            return torch.randn(n, D_MODEL, D_HEAD, dtype=dtype) / D_MODEL**0.5

        self.h, self.kv_heads = h, kv_heads
        self.gain = torch.rand(D_MODEL, dtype=dtype) + 0.5
        self.W_Q, self.W_K, self.W_V = weight(h), weight(kv_heads), weight(kv_heads)
        self.b_V = torch.randn(kv_heads, D_HEAD, dtype=dtype)

    def __call__(self, resid: torch.Tensor) -> torch.Tensor:
        """Return the heads side by side [T, h d_head]; keeps pattern, values and ln_scale."""
        self.ln_scale = resid.square().mean(1).sqrt()
        x = resid / self.ln_scale.unsqueeze(1) * self.gain
        hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        patterns, values, out = [], [], []
        for i in range(self.h):
            j = i // (self.h // self.kv_heads)
            scores = (x @ self.W_Q[i]) @ (x @ self.W_K[j]).t()
            patterns.append(scores.masked_fill(hidden, float("-inf")).softmax(1))
            values.append(x @ self.W_V[j] + self.b_V[j])
            out.append(patterns[-1] @ values[-1])
        self.pattern = torch.stack(patterns)
        self.values = torch.stack(values[:: self.h // self.kv_heads], 1)
        return torch.cat(out, 1)


@dtypes
@heads_of
def test_sources_add_up_to_the_pre_activation(h, kv_heads, dtype):
    layer, sae = Layer(h, kv_heads, dtype), random_sae(h * D_HEAD, dtype)
    x = layer(torch.randn(T, D_MODEL, dtype=dtype))
    latents = torch.tensor([7, 0, D_SAE - 1, 7])
    dfa = source_attribution(sae, latents, layer.pattern, layer.values)
    assert dfa.shape == (4, T, T)
    assert dfa.dtype == dtype
    assert not dfa.requires_grad
    got = dfa.sum(2).t() + constant(sae)[latents]
    expected = pre_activations(sae, x)[:, latents]
    assert (got - expected).abs().max() < TOLERANCE[dtype]
    assert (dfa == dfa.tril()).all()  # nothing comes from later tokens
    assert expected.std() > 0.5


@heads_of
def test_by_head_every_entry_is_the_formula(h, kv_heads):
    layer, sae = Layer(h, kv_heads), random_sae(h * D_HEAD)
    layer(torch.randn(T, D_MODEL, dtype=torch.float64))
    latents = torch.tensor([3, 11])
    by_head = source_attribution(sae, latents, layer.pattern, layer.values, by_head=True)
    assert by_head.shape == (2, h, T, T)
    for a, f in enumerate(latents.tolist()):
        for i in range(h):
            block = sae.W_enc[i * D_HEAD : (i + 1) * D_HEAD, f]
            spoken = layer.values[:, i // (h // kv_heads)] @ block
            torch.testing.assert_close(by_head[a, i], layer.pattern[i] * spoken.detach())
    summed = source_attribution(sae, latents, layer.pattern, layer.values)
    torch.testing.assert_close(by_head.sum(1), summed)


def test_a_selection_of_destinations_is_a_selection_of_the_answer():
    layer, sae = Layer(4, 2), random_sae(4 * D_HEAD)
    layer(torch.randn(T, D_MODEL, dtype=torch.float64))
    latents = torch.arange(3)
    whole = source_attribution(sae, latents, layer.pattern, layer.values)
    last = source_attribution(sae, latents, layer.pattern[:, -1:], layer.values)
    torch.testing.assert_close(last, whole[:, -1:])
    assert source_attribution(sae, latents[:0], layer.pattern, layer.values).shape == (0, T, T)


def test_a_bfloat16_sae_is_added_up_in_float32():
    layer, sae = Layer(4, 2, torch.float32), random_sae(4 * D_HEAD, torch.bfloat16)
    layer(torch.randn(T, D_MODEL))
    dfa = source_attribution(sae, torch.arange(D_SAE), layer.pattern, layer.values)
    exact = source_attribution(sae.double(), torch.arange(D_SAE), layer.pattern, layer.values)
    assert dfa.dtype == torch.float32
    assert (dfa - exact).abs().max() < 1e-4
    assert head_attribution(sae.bfloat16(), 4).dtype == torch.float32


@dtypes
@heads_of
def test_upstream_latents_add_up_to_the_sources(h, kv_heads, dtype):
    """A residual made of latents alone leaves nothing else for DFA to find."""
    layer, sae = Layer(h, kv_heads, dtype), random_sae(h * D_HEAD, dtype)
    layer.b_V.zero_()
    upstream = random_sae(D_MODEL, dtype)
    acts = torch.rand(T, D_SAE, dtype=dtype) * (torch.rand(T, D_SAE) < 0.2)
    layer((acts @ upstream.W_dec).detach())
    W_V = layer.gain.unsqueeze(1) * layer.W_V
    for f in (0, 17):
        rdfa = recursive_attribution(
            sae, f, upstream, torch.arange(D_SAE), acts, layer.pattern, W_V, layer.ln_scale
        )
        assert rdfa.shape == (D_SAE, T, T)
        assert not rdfa.requires_grad
        dfa = source_attribution(sae, torch.tensor([f]), layer.pattern, layer.values)[0]
        assert (rdfa.sum(0) - dfa).abs().max() < TOLERANCE[dtype]
        assert dfa.abs().max() > 0.1


def test_every_upstream_entry_is_the_formula():
    h, kv_heads, f = 4, 2, 5
    layer, sae, upstream = Layer(h, kv_heads), random_sae(h * D_HEAD), random_sae(D_MODEL)
    resid = torch.randn(T, D_MODEL, dtype=torch.float64)
    layer(resid)
    latents = torch.tensor([31, 2, 8])
    acts = upstream.encode(resid)[:, latents].detach()
    acts[0] = torch.tensor([1.0, 2.0, 3.0])
    got = recursive_attribution(
        sae, f, upstream, latents, acts, layer.pattern, layer.W_V, layer.ln_scale
    )
    for a, j in enumerate(latents.tolist()):
        expected = torch.zeros(T, T, dtype=torch.float64)
        for src in range(T):
            into = acts[src, a] * upstream.W_dec[j].detach() / layer.ln_scale[src]
            for i in range(h):
                block = sae.W_enc[i * D_HEAD : (i + 1) * D_HEAD, f].detach()
                expected[:, src] += layer.pattern[i, :, src] * (into @ layer.W_V[i // 2] @ block)
        torch.testing.assert_close(got[a], expected)


def test_a_layer_norm_folds_into_W_V():
    """Centring, gain and frozen scale give back what torch's LayerNorm writes into the values."""
    h, f = 4, 9
    sae, upstream = random_sae(h * D_HEAD), random_sae(D_MODEL)
    norm = torch.nn.LayerNorm(D_MODEL, eps=1e-5, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    acts = torch.rand(T, D_SAE, dtype=torch.float64)
    resid = (acts @ upstream.W_dec).detach()
    W_V = torch.randn(h, D_MODEL, D_HEAD, dtype=torch.float64)
    pattern = torch.rand(h, T, T, dtype=torch.float64)
    values = torch.einsum("se,ked->skd", norm(resid).detach(), W_V)
    dfa = source_attribution(sae, torch.tensor([f]), pattern, values)[0]
    centre = torch.eye(D_MODEL, dtype=torch.float64) - 1 / D_MODEL
    folded = centre @ (norm.weight.detach().unsqueeze(1) * W_V)
    scale = (resid.var(1, correction=0) + 1e-5).sqrt()
    rdfa = recursive_attribution(
        sae, f, upstream, torch.arange(D_SAE), acts, pattern, folded, scale
    )
    torch.testing.assert_close(rdfa.sum(0), dfa)


def test_head_attribution_is_the_share_of_norms():
    sae = random_sae(12)
    sae.W_dec = torch.zeros(D_SAE, 12)
    with torch.no_grad():
        sae.W_dec[0, :3] = torch.tensor([0.0, 3.0, -4.0])  # norm 5
        sae.W_dec[0, 9:] = torch.tensor([2.0, -1.0, 2.0])  # norm 3
        sae.W_dec[1, 4] = -7.0
        sae.W_dec[3:] = torch.randn(D_SAE - 3, 12, dtype=torch.float64)
    share = head_attribution(sae, 4)
    assert share.shape == (D_SAE, 4)
    expected = torch.tensor([[5 / 8, 0, 0, 3 / 8], [0, 1, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(share[:3], expected.double())
    torch.testing.assert_close(share[3:].sum(1), torch.ones(D_SAE - 3, dtype=torch.float64))
    assert not share.requires_grad


def wrong(call: str, **changes: object) -> object:
    """Call a function with good arguments but for `changes`."""
    sae, pattern = random_sae(20), torch.rand(4, 3, 6).double()
    if call == "source_attribution":
        arguments = {
            "sae": sae,
            "latents": torch.arange(2),
            "pattern": pattern,
            "values": torch.rand(6, 2, 5).double(),
        }
        return source_attribution(**{**arguments, **changes})
    arguments = {
        "sae": sae,
        "latent": 0,
        "upstream": random_sae(7),
        "upstream_latents": torch.arange(2),
        "upstream_acts": torch.rand(6, 2).double(),
        "pattern": pattern,
        "W_V": torch.rand(2, 7, 5).double(),
        "ln_scale": torch.ones(6).double(),
    }
    return recursive_attribution(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("call", "changes", "error", "message"),
    [
        ("source_attribution", {"latents": torch.tensor(3)}, ValueError,
         "expected latents to be [m], got []"),
        ("source_attribution", {"latents": torch.arange(2).int()}, TypeError,
         "expected latents to be int64, got torch.int32"),
        ("source_attribution", {"latents": torch.tensor([0, 40])}, ValueError,
         "expected latents in 0..39, got 40"),
        ("source_attribution", {"pattern": torch.rand(3, 6)}, ValueError,
         "expected pattern to be [h, dst, src], got [3, 6]"),
        ("source_attribution", {"values": torch.rand(5, 2, 5)}, ValueError,
         "expected values to be [src, kv_heads, d_head] with src = 6, got [5, 2, 5]"),
        ("source_attribution", {"values": torch.rand(6, 3, 5)}, ValueError,
         "expected kv_heads to divide h = 4, got 3"),
        ("source_attribution", {"values": torch.rand(6, 2, 4)}, ValueError,
         "expected h d_head = d_in = 20, got h = 4 and d_head = 4"),
        ("source_attribution", {"pattern": torch.rand(4, 3, 6, device="meta")}, ValueError,
         "expected pattern on cpu like the SAE, got meta"),
        ("recursive_attribution", {"latent": -1}, ValueError, "expected latent in 0..39, got -1"),
        ("recursive_attribution", {"upstream_latents": torch.tensor([41])}, ValueError,
         "expected upstream_latents in 0..39, got 41"),
        ("recursive_attribution", {"upstream_acts": torch.rand(6, 3)}, ValueError,
         "expected upstream_acts to be [src, m] with src = 6 and m = 2, got [6, 3]"),
        ("recursive_attribution", {"W_V": torch.rand(2, 8, 5)}, ValueError,
         "expected W_V to be [kv_heads, d_model, d_head] with d_model = 7, got [2, 8, 5]"),
        ("recursive_attribution", {"ln_scale": torch.ones(6, 1)}, ValueError,
         "expected ln_scale to be [src] with src = 6, got [6, 1]"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(call, changes, error, message):
    with pytest.raises(error, match=f"^{re.escape(f'{call}: {message}')}$"):
        wrong(call, **changes)


@pytest.mark.parametrize("n_heads", [0, 5, -4])
def test_heads_divide_the_input(n_heads):
    message = f"head_attribution: expected n_heads to divide d_in = 12, got {n_heads}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        head_attribution(random_sae(12), n_heads)


def test_both_identities_in_a_language_model():
    """RMSNorm, rotary positions, grouped queries, read from a model of `transformers`."""
    pytest.importorskip("transformers")
    from fastsae.models import read, resolve
    from tests.models.tiny import VOCAB, D, tiny_model

    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    attn, norm = model.model.layers[1].self_attn, model.model.layers[1].input_layernorm
    torch.nn.init.normal_(norm.weight)
    tokens = torch.randint(VOCAB, (1, 11))
    names = ["resid_post.0", "model.layers.1.self_attn.v_proj", "attn_z.1"]
    resid, values, z = (
        x[0] for x in read(model, [resolve(model, s) for s in names], tokens).values()
    )
    with torch.no_grad():
        pattern = model(input_ids=tokens, output_attentions=True).attentions[1][0]
    sae, upstream = random_sae(z.shape[1], torch.float32), random_sae(D, torch.float32)
    values = values.unflatten(1, (-1, attn.head_dim))
    latents = torch.arange(D_SAE)
    dfa = source_attribution(sae, latents, pattern, values)
    assert pattern.shape[0] == 2 * values.shape[1]
    got = dfa.sum(2).t() + constant(sae)
    torch.testing.assert_close(got, pre_activations(sae, z), atol=1e-4, rtol=1e-4)

    # Upstream latents and what their SAE leaves of the residual stream make up DFA.
    acts = upstream.encode(resid).detach()
    rest = (resid - acts @ upstream.W_dec).detach()
    ln_scale = (resid.square().mean(1) + norm.variance_epsilon).sqrt()
    W_V = attn.v_proj.weight.detach().view(-1, attn.head_dim, D).transpose(1, 2)
    W_V = norm.weight.detach().unsqueeze(1) * W_V
    rest_values = torch.einsum("se,ked->skd", rest / ln_scale.unsqueeze(1), W_V)
    for f in (0, 21):
        rdfa = recursive_attribution(sae, f, upstream, latents, acts, pattern, W_V, ln_scale)
        remaining = source_attribution(sae, latents[f : f + 1], pattern, rest_values)[0]
        torch.testing.assert_close(rdfa.sum(0) + remaining, dfa[f], atol=1e-4, rtol=1e-4)
        assert rdfa.sum(0).abs().max() > 0.1
