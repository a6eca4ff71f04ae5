"""Sparse-dense matmuls and the feature-major lists, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.types import DecodeError, LatentLists, SparseActs, accumulator_dtype


def sparse_decode(
    acts: SparseActs,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    bf16_W_dec: Tensor | None = None,
) -> Tensor:
    """See `fastsae.ops.sparse_decode`."""
    out = acts.to_dense().to(W_dec.dtype) @ _rows_read(W_dec, bf16_W_dec)
    return out if b_dec is None else out + b_dec


def _rows_read(W_dec: Tensor, bf16_W_dec: Tensor | None) -> Tensor:
    """Return the rows that a decoder reads, whose gradients W_dec gets."""
    if bf16_W_dec is None:
        return W_dec
    return W_dec + (bf16_W_dec.to(W_dec.dtype) - W_dec).detach()  # no rounding: they are close


def sparse_decode_values_grad(
    grad: Tensor, acts: SparseActs, W_dec: Tensor, *, bf16_W_dec: Tensor | None = None
) -> Tensor:
    """See `fastsae.ops.sparse_decode_values_grad`."""
    if acts.n == 0:
        return torch.zeros_like(acts.values)
    acc, rows = accumulator_dtype(W_dec.dtype), acts.rows()
    active = (acts.values != 0) & (rows < acts.n)
    W = _rows_read(W_dec, bf16_W_dec)
    picked = W[acts.indices.long()].to(acc) * grad[rows.clamp(max=acts.n - 1)].to(acc)
    return torch.where(active, picked.sum(-1), 0).to(acts.values.dtype)


def sparse_decode_error(
    acts: SparseActs,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    *,
    bf16_W_dec: Tensor | None = None,
) -> DecodeError:
    """See `fastsae.ops.sparse_decode_error`."""
    acc = accumulator_dtype(W_dec.dtype)
    reconstruction = sparse_decode(acts, W_dec, b_dec, bf16_W_dec=bf16_W_dec)
    error = reconstruction.to(acc) - target.to(acc)
    with torch.no_grad():
        products = sparse_decode_values_grad(
            error.to(W_dec.dtype), acts.to(acc), W_dec, bf16_W_dec=bf16_W_dec
        )
    return DecodeError(reconstruction, error, error.square().sum(1), products)


def group_by_latent(acts: SparseActs) -> LatentLists:
    """See `fastsae.ops.group_by_latent`."""
    values, indices, rows = acts.values.flatten(), acts.indices.flatten(), acts.rows().flatten()
    active = (values != 0) & (rows < acts.n)
    key = torch.where(active, indices, acts.d_sae).long()
    slots = torch.argsort(key * (acts.n + 1) + rows, stable=True)
    counts = torch.zeros(acts.d_sae + 1, dtype=torch.int64, device=values.device)
    counts.index_add_(0, key, torch.ones_like(key))
    offsets = torch.zeros(acts.d_sae + 1, dtype=torch.int32, device=values.device)
    offsets[1:] = counts[:-1].cumsum(0)
    kept = active[slots]
    zero = torch.zeros_like(slots)
    return LatentLists(
        offsets, torch.where(kept, rows[slots], zero).int(), torch.where(kept, slots, zero).int()
    )


def sparse_weight_grad(values: Tensor, lists: LatentLists, x: Tensor) -> tuple[Tensor, Tensor]:
    """See `fastsae.ops.sparse_weight_grad`."""
    acc = accumulator_dtype(x.dtype)
    d_sae, capacity = lists.offsets.shape[0] - 1, lists.rows.shape[0]
    entry = torch.arange(capacity, device=x.device, dtype=torch.int32)
    latent = torch.searchsorted(lists.offsets[1:], entry, right=True)
    v = values.flatten().to(acc)[lists.slots.long()]
    weight = torch.zeros(d_sae + 1, x.shape[1], dtype=acc, device=x.device)
    weight.index_add_(0, latent, v.unsqueeze(1) * x[lists.rows.long()].to(acc))
    bias = torch.zeros(d_sae + 1, dtype=acc, device=x.device).index_add_(0, latent, v)
    return weight[:-1].to(x.dtype), bias[:-1].to(x.dtype)
