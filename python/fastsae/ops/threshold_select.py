"""The entries above a threshold: what batch-wise selection becomes at inference."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _autograd, _check, _vmap
from fastsae.ops.batch_topk import backward, fake_selection, jvp, setup_context
from fastsae.types import SparseActs, accumulator_dtype


def check_threshold(op: str, threshold: Tensor, x: Tensor, d_sae: int) -> Tensor:
    """Return `threshold` in the accumulator dtype of `x`, or raise."""
    _check.floating(op, "threshold", threshold)
    if threshold.ndim:
        _check.shape(op, "threshold", threshold, (d_sae,), "[] or [d_sae]")
    if threshold.device != x.device:
        raise ValueError(
            f"{op}: expected threshold on the device of x, {x.device}, got {threshold.device}"
        )
    return threshold.detach().to(accumulator_dtype(x.dtype))


def threshold_select(x: Tensor, threshold: Tensor, capacity: int) -> SparseActs:
    """Keep the entries of `x` that are above `threshold`.

    Args:
        x: [..., d_sae], float32 | float64 | bfloat16 | float16. Leading dimensions are flattened to
            n rows first.
        threshold: [] or [d_sae], floating: one threshold for all latents, or one for each. Strict.
        capacity: places for entries, >= 0. When more are above `threshold`, the `capacity` largest
            are kept.

    Returns:
        `SparseActs` in the variable layout with `min(capacity, n * d_sae)` places.

    Raises:
        TypeError: `x` or `threshold` is not a floating tensor.
        ValueError: `threshold` has another shape or device, `capacity` is negative, or `x` has no
            dimension.
        RuntimeError: in `torch.jit.trace`, which would fix the number of entries.

    Gradients:
        In `x`, dense: the gradient of the kept values at their places, 0 elsewhere. None in
        `threshold`. Of any order, in reverse and forward mode, under `torch.func`; vmap selects in
        each sample by itself.

    Numerics:
        Exact; compared in float32 (float64 for float64 `x`). NaN is never above a threshold. On
        overflow the lowest (row, column) wins among equal values. Autocast changes nothing.

    Cost:
        `x` is read once from memory.

    Source:
        BatchTopK (arXiv 2412.06410, section 3), the inference rule.
    """
    _check.floating("threshold_select", "x", x)
    x = _check.rows("threshold_select", "x", x)
    n, d_sae = x.shape
    threshold = check_threshold("threshold_select", threshold, x, d_sae)
    capacity = _check.capacity("threshold_select", capacity, n, d_sae)
    values, indices, offsets = torch.ops.fastsae.threshold_select(x, threshold, capacity)
    return SparseActs(values, indices, offsets, d_sae)


@fake("threshold_select")
def _fake(x: Tensor, threshold: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    return fake_selection(x, x.shape[0], x.shape[1], capacity)


@fallback("threshold_select")
def _plain(x: Tensor, threshold: Tensor, capacity: int) -> tuple[Tensor, ...]:
    acts = reference.threshold_select(x, threshold, capacity)
    assert acts.offsets is not None
    return acts.values, acts.indices, acts.offsets


_autograd.register("threshold_select", setup_context=setup_context, backward=backward, jvp=jvp)
_vmap.register("threshold_select")
