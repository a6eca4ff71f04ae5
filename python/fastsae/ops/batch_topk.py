"""Mutual choice: the k n largest positive entries of a whole matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _autograd, _check, _vmap
from fastsae.types import BatchTopK, SparseActs, accumulator_dtype


def batch_topk(x: Tensor, k: float, *, threshold_guess: Tensor | None = None) -> BatchTopK:
    """Keep the `int(k * n)` largest positive entries of the whole matrix.

    Args:
        x: [..., d_sae], float32 | float64 | bfloat16 | float16. Leading dimensions are flattened to
            n rows first.
        k: mean number of entries per row, >= 0; may be fractional.
        threshold_guess: [] or None: about what the threshold will be, for instance that of the last
            batch. It changes the time, never the result. A GPU ignores it and takes a sample.

    Returns:
        `BatchTopK(acts, threshold)`: `acts` in the variable layout with a capacity of
        `min(int(k * n), n * d_sae)`, and the smallest kept value (float32, or float64 for float64
        `x`; +inf when nothing is kept).

    Raises:
        TypeError: `x` is not a floating tensor.
        ValueError: `k` is negative or not finite, or `x` has no dimension.
        RuntimeError: in `torch.jit.trace`, which would fix the number of entries.

    Gradients:
        In `x`, dense: the gradient of the kept values at their places, 0 elsewhere. The threshold
        is a constant and has none. Of any order, in reverse and forward mode, under `torch.func`;
        vmap selects in each sample by itself.

    Numerics:
        Exact, also with fewer positive entries than the budget. Among equal values the lowest (row,
        column) wins. A NaN is not positive: it is never kept and takes no other row's place.
        Autocast changes nothing.

    Cost:
        `x` is read once from memory; workspace for candidates of about 1.3 times the budget.

    Source:
        BatchTopK (arXiv 2412.06410, section 3); Mutual Choice (arXiv 2411.02124, section 3).
    """
    _check.floating("batch_topk", "x", x)
    x = _check.rows("batch_topk", "x", x)
    n, d_sae = x.shape
    budget = _check.budget("batch_topk", k, n, d_sae)
    _check.threshold_guess("batch_topk", threshold_guess)
    values, indices, offsets, threshold = torch.ops.fastsae.batch_topk(x, budget, threshold_guess)
    return BatchTopK(SparseActs(values, indices, offsets, d_sae), threshold)


def fake_selection(x: Tensor, n: int, m: int, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty (values, indices, offsets) of a selection among [n, m], shaped like the op's."""
    capacity = _check.int_min(budget, n * m)
    return (
        x.new_empty(capacity),
        x.new_empty(capacity, dtype=torch.int32),
        x.new_empty(n + 1, dtype=torch.int32),
    )


@fake("batch_topk")
def _fake(x: Tensor, budget: int, threshold_guess: Tensor | None) -> tuple[Tensor, ...]:
    selection = fake_selection(x, x.shape[0], x.shape[1], budget)
    return *selection, x.new_empty((), dtype=accumulator_dtype(x.dtype))


@fallback("batch_topk")
def _plain(x: Tensor, budget: int, threshold_guess: Tensor | None) -> tuple[Tensor, ...]:
    acts, threshold = reference.keep_largest(x, x > 0, budget)
    assert acts.offsets is not None
    return acts.values, acts.indices, acts.offsets, threshold


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what the derivatives of a matrix-wide selection need: where the entries are."""
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(output[1], output[2])
    ctx.mark_non_differentiable(*output[3:])  # a threshold, if there is one
    ctx.others = (None,) * (len(output) - 1)


def _places(ctx: Any) -> tuple[Tensor, Tensor]:
    """Return where every kept entry is in the flattened matrix, and which entries are kept."""
    indices, offsets = ctx.saved_tensors
    n, m = ctx.shape
    rows = SparseActs(indices, indices, offsets, m).rows()
    kept = rows < n
    return torch.where(kept, rows * m + indices, 0), kept


def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    """Return the dense gradient of a selection: `grad` at the kept places, 0 elsewhere."""
    n, m = ctx.shape
    dense = grad.new_zeros(n * m)
    if dense.numel():
        places, kept = _places(ctx)
        # Padding adds 0 to entry (0, 0).
        dense = dense.index_add(0, places, torch.where(kept, grad, 0))
    return dense.view(n, m), None, None


def jvp(ctx: Any, x_t: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Return the tangent of the kept values, and None for all the other outputs."""
    places, kept = _places(ctx)
    flat = x_t.reshape(-1)
    values_t = torch.where(kept, flat[places], 0) if flat.numel() else flat[:0]
    return values_t, *ctx.others


_autograd.register("batch_topk", setup_context=setup_context, backward=backward, jvp=jvp)
_vmap.register("batch_topk")
