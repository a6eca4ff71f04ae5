"""Linear encoder followed by a selection, in plain torch: holds all of [n, d_sae]."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.reference.select import batch_topk, threshold_select, topk
from fastsae.types import BatchTopK, LatentScores, SparseActs, TopK, accumulator_dtype


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
    absolute: bool = False,
    select_dtype: torch.dtype | None = None,
) -> TopK:
    """See `fastsae.ops.encode_topk`."""
    pre = pre_activations(x, W_enc, b_enc, b_dec, select_dtype)
    key = pre.abs() if absolute else pre
    if mask is not None:
        key = key.masked_fill(~mask, float("-inf"))
    indices = topk(key, k).indices
    values = pre.gather(-1, indices.long())
    if relu and not absolute:
        values = values.relu()
    if mask is not None:
        values = values.masked_fill(~mask[indices.long()], 0.0)
    return TopK(values.to(x.dtype), indices)


def encode_group_max(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    b_dec: Tensor | None = None,
) -> TopK:
    """See `fastsae.ops.encode_group_max`."""
    groups = pre_activations(x, W_enc, b_enc, b_dec).unflatten(-1, (k, -1))
    values, place = topk(groups, 1)
    first = torch.arange(0, W_enc.shape[0], groups.shape[-1], device=x.device, dtype=torch.int32)
    return TopK(values.squeeze(-1).relu().to(x.dtype), first + place.squeeze(-1))


def encode_gradient_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    grad: Tensor,
    W_dec: Tensor,
    beta: float = 1.0,
    normalize: bool = True,
    b_dec: Tensor | None = None,
) -> TopK:
    """See `fastsae.ops.encode_gradient_topk`."""
    values = pre_activations(x, W_enc, b_enc, b_dec).relu()
    effect = pre_activations(grad, W_dec).abs()
    base = torch.ones_like(effect[..., :1]) / beta
    if normalize:
        mean = effect.sum(-1, keepdim=True) / effect.shape[-1]
        base = torch.where(mean == 0, 1, mean / beta)
    # The score over what is the same for a whole row.
    indices = topk(values * (base + effect), k).indices
    return TopK(values.gather(-1, indices.long()).to(x.dtype), indices)


def latent_scores(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: float,
    *,
    score: str = "l2",
    b_dec: Tensor | None = None,
) -> LatentScores:
    """See `fastsae.ops.latent_scores`."""
    a = pre_activations(x, W_enc, b_enc, b_dec).flatten(0, -2).relu()
    threshold = batch_topk(a, k).threshold
    if score == "l2":
        return LatentScores(a.square().sum(0).sqrt(), threshold)
    total = a.sum(0)
    # -sum p log p = log S - (sum a log a) / S, with S the column's sum; -inf where that is 0.
    entropy = total.log() - torch.xlogy(a, a).sum(0) / total
    return LatentScores(torch.where(total > 0, entropy, -torch.inf), threshold)


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
