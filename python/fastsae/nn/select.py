"""Encode with any choice of k latents per token, in chunks, with the sparse gradient of the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae.ops import _encode
from fastsae.types import SparseActs

CHUNK_BYTES = 1 << 26
"""Pre-activations that are held at a time."""

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
    Cost: 2 n d_in d_sae flops in torch's matmul, and what `select` does to every entry.
    """
    values, indices = _Encode.apply(x, W_enc, b_enc, b_dec, select)  # type: ignore[no-untyped-call]
    return SparseActs(values, indices, None, W_enc.shape[0])


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, select: Select
    ) -> tuple[Tensor, Tensor]:
        rows = max(1, CHUNK_BYTES // (W_enc.shape[0] * W_enc.element_size()))
        centered = x if b_dec is None else x - b_dec
        parts = []
        for start in range(0, max(x.shape[0], 1), rows):
            part = slice(start, min(start + rows, x.shape[0]))
            parts.append(select(torch.addmm(b_enc, centered[part], W_enc.t()), part))
        values, indices = (torch.cat(column) for column in zip(*parts, strict=True))
        _encode.setup_context(ctx, (x, W_enc, b_enc, b_dec), (values, indices))
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_encode.gradients(ctx, grads[0]), None
