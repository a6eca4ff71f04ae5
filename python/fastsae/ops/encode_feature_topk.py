"""The feature-choice encoder: a linear layer, and the largest positive entries of every latent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae._library import composed, fake
from fastsae.ops import _autograd, _check, _encode, _flops, _vmap
from fastsae.ops.batch_topk import fake_selection
from fastsae.ops.feature_topk import check_lengths, lengths_as_int32
from fastsae.types import SparseActs, accumulator_dtype, can_look

BLOCK_BYTES = 1 << 26
"""Pre-activations held at once."""


def encode_feature_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    m: Tensor,
    capacity: int,
    *,
    b_dec: Tensor | None = None,
) -> SparseActs:
    """Keep the `m[j]` largest positive entries of latent j of `(x - b_dec) W_enc^T + b_enc`.

    Args:
        x: [..., d_in], float32 | float64 | bfloat16 | float16; leading dimensions are flattened to
            n rows first.
        W_enc: [d_sae, d_in], the dtype of `x`; one row per latent.
        b_enc: [d_sae] or None.
        m: [d_sae], integers >= 0: entries to keep of each latent.
        capacity: places for entries, at least the sum of min(m, n).
        b_dec: [d_in] or None, subtracted from `x` first.

    Returns:
        `SparseActs` in the variable layout with `min(capacity, n * d_sae)` places.

    Raises:
        TypeError: an argument is not a floating tensor, dtypes differ, or `m` is not an integer
            tensor.
        ValueError: a shape, a device or `capacity` is not as stated.
        RuntimeError: in `torch.jit.trace`, which would fix the number of entries.

    Gradients:
        In `x`, `W_enc`, `b_enc` and `b_dec`, from the kept entries only. Otherwise as
        `encode_topk`; vmap selects in each sample by itself.

    Numerics:
        Pre-activations are sums in float32 (float64 for float64) by torch's matmul; the selection
        is that of `feature_topk` on them. Autocast as in `encode_topk`.

    Cost:
        2 n d_in d_sae flops; a block of latents at a time, 64 MiB of pre-activations; a sort of the
        kept entries by row.

    Source:
        Feature Choice, Ayonrinde 2024 (arXiv 2411.02124).
    """
    op = "encode_feature_topk"
    a = _encode.check(op, x, W_enc, b_enc, b_dec, None, None, None)
    check_lengths(op, m, W_enc.shape[0], a.x.device)
    capacity = _check.capacity(op, capacity, a.x.shape[0], W_enc.shape[0])
    values, indices, offsets = torch.ops.fastsae.encode_feature_topk(
        a.x, a.W_enc, a.b_enc, a.b_dec, lengths_as_int32(m, a.x.shape[0]), capacity
    )
    return SparseActs(values, indices, offsets, W_enc.shape[0])


@composed(
    "encode_feature_topk(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? b_dec, Tensor m,"
    " SymInt capacity) -> (Tensor values, Tensor indices, Tensor offsets)"
)
def _encode_feature_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, m: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    n, d_sae = x.shape[0], W_enc.shape[0]
    capacity = min(capacity, n * d_sae)
    wide = accumulator_dtype(x.dtype)
    centered = (x if b_dec is None else x - b_dec).to(wide)
    width = max(64, BLOCK_BYTES // max(1, n * wide.itemsize))
    keys, values = [], []
    offsets = torch.zeros(n + 1, dtype=torch.int32, device=x.device)
    for first in range(0, d_sae, width):
        block = slice(first, first + width)
        pre = centered @ W_enc[block].to(wide).t()
        if b_enc is not None:
            pre += b_enc[block].to(wide)
        found = torch.ops.fastsae.feature_topk(pre, m[block], _room(m[block], n, capacity))
        places = torch.arange(found[0].shape[0], device=x.device, dtype=torch.int32)
        row = torch.searchsorted(found[2][1:], places, right=True)  # n for padding
        keys.append(row * d_sae + found[1] + first)
        values.append(found[0])
        offsets += found[2]
    if not keys:
        return x.new_zeros(capacity), offsets.new_zeros(capacity), offsets
    key, order = torch.cat(keys).sort()
    kept = torch.cat(values)[order][:capacity].to(x.dtype)
    index = (key % max(d_sae, 1))[:capacity].int()
    padding = capacity - kept.shape[0]
    if padding:
        kept, index = (torch.nn.functional.pad(t, (0, padding)) for t in (kept, index))
    return kept, torch.where(kept != 0, index, 0), offsets


def _room(m: Tensor, n: int, capacity: int) -> int:
    """Return enough places for a block; exact where `m` may be looked into for free."""
    if can_look(m):
        return int(m.long().clamp(0, n).sum())
    return min(capacity, n * m.shape[0])


@fake("encode_feature_topk")
def _fake(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, m: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_selection(x, x.shape[0], W_enc.shape[0], capacity)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_encode.gradients(ctx, grad), None, None


def _jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    return _encode.tangent(ctx, *tangents[:4]), None, None


_autograd.register(
    "encode_feature_topk", setup_context=_encode.setup_context, backward=_backward, jvp=_jvp
)
_vmap.register("encode_feature_topk")
_flops.register("encode_feature_topk", _flops.encode)
