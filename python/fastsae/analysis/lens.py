"""Logit lens: which next tokens a direction of the residual stream speaks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastsae.models.blocks import find_blocks

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@torch.no_grad()
def promoted_tokens(
    model: nn.Module, site: str, directions: Tensor, n: int = 8
) -> list[list[int]] | None:
    """Return the `n` tokens whose logits each direction raises most, through the final norm.

        logits = unembed(norm(direction) - norm(0))

    It skips every block in between. Up to the middle of a model it gives noise (in
    SmolLM2-135M after block 15 of 30, not one list relates to what its latent fires on), so it is
    for the last third only.

    Args:
        model: a causal language model of `transformers`.
        site: where the directions live; `resid_post.L`.
        directions: `[m, d]`, e.g. rows of W_dec.
        n: tokens per direction.

    Returns:
        m lists of token ids, strongest first; None for another site or an earlier block, or if the
        model's final norm or unembedding cannot be found.
    """
    kind, _, layer = site.partition(".")
    if kind != "resid_post" or not layer.isdigit():
        return None
    path, blocks = find_blocks(model)
    if int(layer) + 1 < len(blocks) * 2 / 3:
        return None
    unembed = getattr(model, "get_output_embeddings", lambda: None)()
    parent: Any = model.get_submodule(path.rpartition(".")[0])
    norm = next((getattr(parent, x) for x in FINAL_NORMS if hasattr(parent, x)), None)
    if unembed is None or norm is None or unembed.weight.shape[1] != directions.shape[1]:
        return None
    x = directions.to(unembed.weight)
    logits = (norm(x) - norm(torch.zeros_like(x))) @ unembed.weight.T
    tokens: list[list[int]] = logits.topk(n, dim=1).indices.tolist()
    return tokens
