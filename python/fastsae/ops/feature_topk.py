"""Feature choice: every latent takes its own largest positive entries."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _autograd, _check, _vmap
from fastsae.ops.batch_topk import backward, fake_selection, jvp, setup_context
from fastsae.types import SparseActs

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def feature_topk(x: Tensor, m: int | Tensor, *, capacity: int | None = None) -> SparseActs:
    """Keep the `m[j]` largest positive entries of every column j.

    Args:
        x: [..., d_sae], float32 | float64 | bfloat16 | float16. Leading dimensions are flattened to
            n rows first.
        m: number of entries to keep, >= 0: an int for all columns, or one for each, an integer
            tensor [d_sae]. More than n means every positive entry.
        capacity: places for entries, at least the sum of min(m, n); None means as many as needed.
            The values of a tensor `m` are only read where that costs nothing, on the CPU outside
            of `torch.compile`. Elsewhere None means n * d_sae, so pass the sum if you know it.

    Returns:
        `SparseActs` in the variable layout with `min(capacity, n * d_sae)` places.

    Raises:
        TypeError: `x` is not a floating tensor, or `m` neither an int nor an integer tensor.
        ValueError: `m` has another shape or device or is negative, `capacity` is too small, or `x`
            has no dimension. Where the values of `m` are not read, the CPU kernel raises
            RuntimeError; other devices count a negative number as 0, and where `capacity` is too
            small keep the `capacity` largest entries.
        RuntimeError: in `torch.jit.trace`, which would fix the number of entries.

    Gradients:
        In `x`, dense: the gradient of the kept values at their places, 0 elsewhere. Of any
        order, in reverse and forward mode, under `torch.func`; vmap selects in each sample by
        itself.

    Numerics:
        Exact. Among equal values of a column the lowest row wins. A NaN is not positive: it is
        never kept and takes no other row's place. Autocast changes nothing.

    Cost:
        `x` is read once from memory; workspace of the entries kept and about 2 MiB per thread.

    Source:
        Feature Choice, Ayonrinde 2024 (arXiv 2411.02124).
    """
    _check.floating("feature_topk", "x", x)
    x = _check.rows("feature_topk", "x", x)
    n, d_sae = x.shape
    needed = None  # unknown, or an expression that is not to be looked into
    looks = not torch.compiler.is_compiling()
    if isinstance(m, Tensor):
        check_lengths("feature_topk", m, d_sae, x.device)
        lengths, most = lengths_as_int32(m, n), n * d_sae
        if looks and m.device.type == "cpu":
            if d_sae and m.min() < 0:
                raise ValueError(f"feature_topk: expected m >= 0, got {int(m.min())}")
            most = needed = int(m.long().clamp(0, n).sum())
    elif isinstance(m, int | torch.SymInt):
        if m < 0:
            raise ValueError(f"feature_topk: expected m >= 0, got {m}")
        each = _check.int_min(m, n)
        lengths = torch.full((d_sae,), each, dtype=torch.int32, device=x.device)
        most = each * d_sae
        needed = most if looks else None
    else:
        raise TypeError(
            f"feature_topk: expected m to be an int or an integer Tensor, got {type(m).__name__}"
        )
    capacity = _check.capacity("feature_topk", most if capacity is None else capacity, n, d_sae)
    if needed is not None and capacity < needed:
        raise ValueError(
            f"feature_topk: expected capacity >= the sum of min(m, n) = {needed}, "
            f"got capacity = {capacity}"
        )
    values, indices, offsets = torch.ops.fastsae.feature_topk(x, lengths, capacity)
    return SparseActs(values, indices, offsets, d_sae)


def check_lengths(op: str, m: Tensor, d_sae: int, device: torch.device) -> None:
    """Raise unless `m` is an integer tensor [d_sae] on `device`, that of x."""
    if m.dtype not in INTEGERS:
        raise TypeError(f"{op}: expected m to be an integer Tensor, got {m.dtype}")
    _check.shape(op, "m", m, (d_sae,), "[d_sae]")
    if m.device != device:
        raise ValueError(f"{op}: expected m on the device of x, {device}, got {m.device}")


def lengths_as_int32(m: Tensor, n: int) -> Tensor:
    """Return `m` as int32; numbers that it cannot hold are clamped to [-1, n]."""
    return m if m.dtype == torch.int32 else m.long().clamp(-1, n).int()


@fake("feature_topk")
def _fake(x: Tensor, m: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    return fake_selection(x, x.shape[0], x.shape[1], capacity)


@fallback("feature_topk")
def _plain(x: Tensor, m: Tensor, capacity: int) -> tuple[Tensor, ...]:
    acts = reference.feature_topk(x, m, capacity)
    assert acts.offsets is not None
    return acts.values, acts.indices, acts.offsets


_autograd.register("feature_topk", setup_context=setup_context, backward=backward, jvp=jvp)
_vmap.register("feature_topk")
