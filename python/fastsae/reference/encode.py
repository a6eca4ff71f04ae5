"""Linear encoder followed by a selection, in plain torch: holds all of [n, d_sae]."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.reference.select import batch_topk, threshold_select, topk
from fastsae.types import BatchTopK, SparseActs, TopK, accumulator_dtype


def pre_activations(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    b_dec: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return `(x - b_dec) W_enc^T + b_enc`: `[..., d_sae]`, with `W_enc: [d_sae, d_in]`.

    Computed in `dtype`; None: float32, or float64 for a float64 `x`.
    """
    dtype = accumulator_dtype(x.dtype) if dtype is None else dtype
    if b_dec is not None:
        x = x.to(dtype) - b_dec.to(dtype)
    pre = x.to(dtype) @ W_enc.to(dtype).t()
    return pre if b_enc is None else pre + b_enc.to(dtype)


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    b_dec: Tensor | None = None,
    mask: Tensor | None = None,
    relu: bool = True,
    select_dtype: torch.dtype | None = None,
) -> TopK:
    """See `fastsae.ops.encode_topk`."""
    pre = pre_activations(x, W_enc, b_enc, b_dec, select_dtype)
    if mask is not None:
        pre = pre.masked_fill(~mask, float("-inf"))
    values, indices = topk(pre, k)
    if relu:
        values = values.relu()
    if mask is not None:
        values = values.masked_fill(~mask[indices.long()], 0.0)
    return TopK(values.to(x.dtype), indices)


def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: float,
    *,
    b_dec: Tensor | None = None,
    mask: Tensor | None = None,
    select_dtype: torch.dtype | None = None,
) -> BatchTopK:
    """See `fastsae.ops.encode_batch_topk`."""
    pre = pre_activations(x, W_enc, b_enc, b_dec, select_dtype)
    if mask is not None:
        pre = pre.masked_fill(~mask, float("-inf"))
    acts, threshold = batch_topk(pre, k)
    return BatchTopK(acts.to(x.dtype), threshold)


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    capacity: int,
    *,
    b_dec: Tensor | None = None,
    select_dtype: torch.dtype | None = None,
) -> SparseActs:
    """See `fastsae.ops.encode_threshold`."""
    pre = pre_activations(x, W_enc, b_enc, b_dec, select_dtype)
    return threshold_select(pre, threshold, capacity).to(x.dtype)
