"""Batched TopK: the k largest entries of every row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _autograd, _check, _vmap
from fastsae.types import TopK


def topk(x: Tensor, k: int, *, sorted: bool = False) -> TopK:
    """Return the k largest entries of every row.

    Args:
        x: [..., d_sae], float32 | float64 | bfloat16 | float16.
        k: entries per row, 1 <= k <= d_sae.
        sorted: order each row by descending value, lowest index first among equals; otherwise by
            ascending index.

    Returns:
        `TopK(values [..., k], indices [..., k])`: the dtype of `x`, and int32.

    Raises:
        TypeError: `x` is not a floating tensor, or `k` not an int.
        ValueError: `k` is out of range, or `x` has no dimension.

    Gradients:
        In `x`, dense: the gradient of `values` at the selected places, 0 elsewhere. Of any order,
        in reverse and forward mode, under `torch.func` and vmap.

    Numerics:
        Exact. NaN is the largest, -0 equals +0, and among equal values the lowest index wins, on
        every device and instruction set. Deterministic whatever the number of threads. Autocast
        changes nothing.

    Cost:
        `x` is read once from memory; no workspace that grows with `x`.
    """
    _check.floating("topk", "x", x)
    rows = _check.rows("topk", "x", x)
    _check.k_in_range("topk", k, x.shape[-1])
    values, indices = torch.ops.fastsae.topk(rows, k, sorted)
    shape = (*x.shape[:-1], k)
    return TopK(values.view(shape), indices.view(shape))


@fake("topk")
def _fake(x: Tensor, k: int, sorted: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


@fallback("topk")
def _plain(x: Tensor, k: int, sorted: bool) -> tuple[Tensor, ...]:
    return tuple(reference.topk(x, k, sorted=sorted))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    return grad.new_zeros(ctx.shape).scatter(1, indices.long(), grad), None, None


def _jvp(ctx: Any, x_t: Tensor, *_: Any) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    return x_t.gather(1, indices.long()), None


_autograd.register("topk", setup_context=_setup_context, backward=_backward, jvp=_jvp)
_vmap.register("topk", rows=("x",))
