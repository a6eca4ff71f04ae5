"""Encode with any choice of k latents per token, in chunks, with the sparse gradient of the ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastsae import ops
from fastsae.ops._encode import attach, attachable
from fastsae.types import SparseActs

CHUNK_BYTES = 1 << 26
"""Pre-activations that are held at a time."""


def chunk_rows(d_sae: int, itemsize: int) -> int:
    """Return how many rows of pre-activations `[d_sae]` are held at a time, at least 1."""
    return max(1, CHUNK_BYTES // (d_sae * itemsize))


Select = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""From pre-activations z: [m, d_sae] of some rows and which rows they are to values [m, k], 0 where
nothing is active, and indices [m, k], int32 and ascending."""


def encode_selected(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    select: Select,
) -> SparseActs:
    """Apply `select` to `(x - b_dec) W_enc^T + b_enc`, a chunk of rows at a time.

    For rules that the native encoders do not have. What `select` returns as values must be entries
    of z, or 0.

    Args:
        x: [n, d_in].
        W_enc: [d_sae, d_in], one row per latent.
        b_enc: [d_sae].
        b_dec: [d_in] or None, subtracted from x first.
        select: the rule; it is called without a graph.

    Returns:
        `SparseActs` in the fixed layout.

    Gradients: as those of `ops.encode_topk`: x, both biases and W_enc, from active entries only.
    Numerics: under autocast as `F.linear`, with selection on the rounded pre-activations.
    Cost: 2 n d_in d_sae flops in torch's matmul, and what `select` does to every entry; with a
        graph, one dot product for each active entry.
    """
    centered = x if b_dec is None else x - b_dec
    with torch.no_grad():
        rows = chunk_rows(W_enc.shape[0], W_enc.element_size())
        parts = []
        for start in range(0, max(x.shape[0], 1), rows):
            part = slice(start, min(start + rows, x.shape[0]))
            parts.append(select(torch.addmm(b_enc, centered[part], W_enc.t()), part))
        values, indices = (torch.cat(column) for column in zip(*parts, strict=True))
    chosen = SparseActs(values, indices, None, W_enc.shape[0])
    if attachable(x, W_enc, b_enc, b_dec):
        return attach(chosen, x, W_enc, b_enc, b_dec)
    if not (torch.is_grad_enabled() or forward_ad._current_level >= 0):
        return chosen
    # The same numbers again, from the chosen rows alone and with a graph.
    again = ops.sparse_decode_values_grad(centered, chosen, W_enc) + b_enc[indices.long()]
    kept = (values != 0) & (again.detach().sign() != -values.sign())
    again = torch.where(kept, again, 0).to(values.dtype)
    return SparseActs(again, indices, None, W_enc.shape[0])
