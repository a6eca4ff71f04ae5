"""Selection ops in plain torch: clear over fast, on any device and dtype.

Order of values everywhere: NaN is the largest, -0 equals +0, and among equal values the lowest
(row, column) comes first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsae.types import BatchTopK, SparseActs, TopK, accumulator_dtype


def topk(x: Tensor, k: int, *, sorted: bool = False) -> TopK:
    """See `fastsae.ops.topk`."""
    # A stable sort keeps the lowest index first among equals; adding 0 turns -0 into +0.
    order = torch.sort(x + 0.0, dim=-1, descending=True, stable=True).indices[..., :k]
    if not sorted:
        order = order.sort(dim=-1).values
    return TopK(x.gather(-1, order), order.int())


def keep_largest(x: Tensor, eligible: Tensor, budget: int) -> tuple[SparseActs, Tensor]:
    """Keep the `budget` largest eligible entries of `x: [n, m]`; also the smallest kept value."""
    n, m = x.shape
    capacity = min(budget, n * m)
    flat, ok = x.flatten(), eligible.flatten()
    key = torch.where(ok, flat.detach(), -torch.inf)
    order = torch.sort(key, descending=True, stable=True).indices[:capacity]
    keep = torch.zeros_like(ok)
    keep[order] = ok[order]
    # Kept entries in (row, column) order, then padding.
    place = torch.argsort(~keep, stable=True)[:capacity]
    kept = keep[place]
    values = torch.where(kept, flat[place], torch.zeros_like(flat[place]))
    columns = torch.where(kept, place % max(m, 1), torch.zeros_like(place))
    counts = keep.view(n, m).sum(1, dtype=torch.int64)
    offsets = torch.zeros(n + 1, dtype=torch.int32, device=x.device)
    offsets[1:] = counts.cumsum(0)
    smallest = torch.where(keep, flat.detach().to(accumulator_dtype(x.dtype)), torch.inf)
    threshold = smallest.amin() if smallest.numel() else smallest.new_full((), torch.inf)
    return SparseActs(values, columns.int(), offsets, m), threshold


def batch_topk(x: Tensor, k: float) -> BatchTopK:
    """See `fastsae.ops.batch_topk`."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return BatchTopK(*keep_largest(x, x > 0, int(k * x.shape[0])))


def threshold_select(x: Tensor, threshold: Tensor, capacity: int) -> SparseActs:
    """See `fastsae.ops.threshold_select`."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    above = x.to(accumulator_dtype(x.dtype)) > threshold
    return keep_largest(x, above, capacity)[0]


def feature_topk(x: Tensor, m: int | Tensor, capacity: int | None = None) -> SparseActs:
    """See `fastsae.ops.feature_topk`; a `capacity` that is too small keeps the largest entries."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    n, d_sae = x.shape
    lengths = torch.as_tensor(m, device=x.device).long().expand(d_sae)
    positive = x > 0
    # The place of every entry in its column, largest first, the lowest row first among equals.
    key = torch.where(positive, x.detach(), 0)
    place = key.sort(dim=0, descending=True, stable=True).indices.argsort(dim=0)
    if capacity is None:
        capacity = int(lengths.clamp(0, n).sum())
    return keep_largest(x, positive & (place < lengths), capacity)[0]
