"""AuxK of several layers: dead latents of every layer reconstruct together what is left.

Source: Gao et al. 2024 (arXiv 2406.04093), appendix A.2; for cross-layer transcoders our addition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.context import StepContext
from fastsae.nn.layer_decoders import LayerDecoders
from fastsae.nn.loss import fvu_of_error
from fastsae.types import SparseActs


def dead_of_layers(transcoder: LayerDecoders, context: StepContext) -> list[Tensor | None]:
    """Return which latents of each layer are dead, bool [d_transcoder]; None for a layer without.

    Args:
        transcoder: gives the sizes, and auxk_alpha: 0 asks for none.
        context: `dead`, bool [d_sae] or None. On a GPU, looking for them waits for the device; in a
            step that is recorded, a layer counts as one that has some.

    Raises:
        ValueError: dead has another dtype or shape.
    """
    dead = context.dead
    if dead is None or not getattr(transcoder, "auxk_alpha", 0):
        return [None] * transcoder.n_layers
    if dead.shape != (transcoder.d_sae,) or dead.dtype != torch.bool:
        transcoder._fail(f"dead to be bool [{transcoder.d_sae}], got {dead.dtype} {[*dead.shape]}")
    masks = dead.split(transcoder.d_transcoder)
    if context.recorded or torch.compiler.is_compiling():  # nothing may depend on how many
        return list(masks)
    some = torch.stack([mask.any() for mask in masks]).tolist()
    return [mask if has_some else None for mask, has_some in zip(masks, some, strict=True)]


def layered_auxk_loss(
    transcoder: LayerDecoders,
    inputs: Sequence[Tensor],
    error: Tensor,
    dead: Sequence[Tensor | None],
    k: int,
) -> Tensor:
    """Return how badly the k largest dead latents of each layer reconstruct -error, without b_dec.

    Args:
        transcoder: gives the dictionaries.
        inputs: for each layer [n, d_model].
        error: [n, n_layers d_model], reconstruction - target, without a graph.
        dead: from `dead_of_layers`, with at least one layer that has some.
        k: latents of a layer per token at most.

    Cost: that of another encoder of each layer with dead latents.
    """
    dictionaries = transcoder.dictionaries

    def write(layer: int) -> Tensor | None:
        if dead[layer] is None:
            return None
        W_enc, b_enc, W_dec = dictionaries[layer]
        top = ops.encode_topk(inputs[layer], W_enc, b_enc, k, mask=dead[layer])
        return ops.sparse_decode(SparseActs(*top, None, transcoder.d_transcoder), W_dec)

    loss = fvu_of_error(transcoder._summed(write), error)
    some = torch.stack([mask.any() for mask in dead if mask is not None]).any()
    return torch.where(some, loss, 0.0)
