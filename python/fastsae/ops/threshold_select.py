"""The entries above a threshold: what batch-wise selection becomes at inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _check
from fastsae.ops.batch_topk import dense_gradient, fake_selection, setup_context
from fastsae.reference import SparseActs, accumulator_dtype


def check_theta(op: str, theta: Tensor, x: Tensor, d_sae: int) -> Tensor:
    """Return `theta` in the accumulator dtype of `x`, or raise."""
    _check.floating(op, "theta", theta)
    if theta.ndim:
        _check.shape(op, "theta", theta, (d_sae,), "[] or [d_sae]")
    if theta.device != x.device:
        raise ValueError(f"{op}: expected theta on the device of x, {x.device}, got {theta.device}")
    return theta.detach().to(accumulator_dtype(x.dtype))


def check_cap(op: str, cap: int) -> None:
    """Raise ValueError unless `cap` is at least 0."""
    if cap < 0:
        raise ValueError(f"{op}: expected cap >= 0, got cap = {cap}")


def threshold_select(x: Tensor, theta: Tensor, cap: int) -> SparseActs:
    """Keep the entries of `x` that are above `theta`.

    Args:
        x: [..., d_sae], float32 | float64 | bfloat16 | float16. Leading dimensions are flattened to
            n rows first.
        theta: [] or [d_sae], floating: one threshold for all latents, or one for each. Strict.
        cap: room for entries, >= 0. When more are above `theta`, the `cap` largest are kept.

    Returns:
        `SparseActs` in the variable layout with `min(cap, n * d_sae)` places.

    Raises:
        TypeError: `x` or `theta` is not a floating tensor.
        ValueError: `theta` has another shape or device, `cap` is negative, `x` has no dimension.

    Gradients:
        In `x`, dense: the gradient of the kept values at their places, 0 elsewhere. None in
        `theta`.

    Numerics:
        Exact; compared in float32 (float64 for float64 `x`). NaN is never above a threshold. On
        overflow the lowest (row, column) wins among equal values.

    Cost:
        `x` is read once from memory.

    Source:
        BatchTopK (arXiv 2412.06410, section 3), the inference rule.
    """
    _check.floating("threshold_select", "x", x)
    x = _check.rows("threshold_select", "x", x)
    theta = check_theta("threshold_select", theta, x, x.shape[-1])
    check_cap("threshold_select", cap)
    values, indices, offsets = torch.ops.fastsae.threshold_select(x, theta, cap)
    return SparseActs(values, indices, offsets, x.shape[1])


@fake("threshold_select")
def _fake(x: Tensor, theta: Tensor, cap: int) -> tuple[Tensor, Tensor, Tensor]:
    return fake_selection(x, x.shape[0], x.shape[1], cap)


@fallback("threshold_select")
def _plain(x: Tensor, theta: Tensor, cap: int) -> tuple[Tensor, ...]:
    acts = reference.threshold_select(x, theta, cap)
    assert acts.offsets is not None
    return acts.values, acts.indices, acts.offsets


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    return dense_gradient(ctx, grad), None, None


torch.library.register_autograd("fastsae::threshold_select", _backward, setup_context=setup_context)
