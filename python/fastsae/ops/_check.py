"""Argument checks in one grammar: `<op>: expected <what>, got <what came>`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsae.types import SparseActs, accumulator_dtype

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def floating(op: str, name: str, x: object) -> None:
    """Raise TypeError unless `x` is a dense tensor of a floating dtype that the kernels have."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {name} to be a Tensor, got {type(x).__name__}")
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{op}: expected {name} to be a local tensor, got a DTensor; call the op inside "
            "torch.distributed.tensor.experimental.local_map, or on to_local() of each argument"
        )
    if x.is_nested:
        raise TypeError(
            f"{op}: expected {name} to be a dense tensor, got a nested one; call the op on its "
            "values(), whose rows are all tokens"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{op}: expected {name} to be a dense tensor, got layout {x.layout}")
    if x.dtype not in FLOATING:
        raise TypeError(
            f"{op}: expected {name} to be float32, float64, bfloat16 or float16, got {x.dtype}"
        )


def rows(op: str, name: str, x: Tensor, width: str = "d_sae") -> Tensor:
    """Return `x` with its leading dimensions flattened to one; ValueError if it has none at all."""
    if x.ndim == 0:
        raise ValueError(f"{op}: expected {name} to be [..., {width}], got []")
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)


def k_in_range(op: str, k: object, d_sae: int) -> None:
    """Raise unless `k` is an int with 1 <= k <= d_sae."""
    if not isinstance(k, int | torch.SymInt):
        raise TypeError(f"{op}: expected k to be an int, got {type(k).__name__}")
    if not 1 <= k <= d_sae:
        raise ValueError(f"{op}: expected 1 <= k <= d_sae = {d_sae}, got k = {k}")


def groups(op: str, k: object, d_sae: int) -> None:
    """Raise unless `k` is an int that divides d_sae."""
    if not isinstance(k, int):
        raise TypeError(f"{op}: expected k to be an int, got {type(k).__name__}")
    if not 1 <= k <= d_sae or d_sae % k:
        raise ValueError(f"{op}: expected k to divide d_sae = {d_sae}, got k = {k}")


def budget(op: str, k: float, n: int, d_sae: int) -> int:
    """Return how many entries of [n, d_sae] a mean of `k` per row is, at most all of them.

    Raises:
        TypeError: `k` is no number.
        ValueError: `k` is negative or not finite.
    """
    not_traced(op)
    if not isinstance(k, int | float | torch.SymInt | torch.SymFloat):
        k = _as_number(op, "k", k)
    if not (math.isfinite(k) and k >= 0):
        raise ValueError(f"{op}: expected a finite k >= 0, got k = {k}")
    return n * d_sae if k >= d_sae else torch.sym_int(k * n)


def capacity(op: str, wanted: int, n: int, d_sae: int) -> int:
    """Return `wanted`, at most the places of [n, d_sae].

    Raises:
        TypeError: it is no int.
        ValueError: it is below 0.
    """
    not_traced(op)
    if not isinstance(wanted, int | torch.SymInt):
        raise TypeError(f"{op}: expected capacity to be an int, got {type(wanted).__name__}")
    if wanted < 0:
        raise ValueError(f"{op}: expected capacity >= 0, got capacity = {wanted}")
    return int_min(wanted, n * d_sae)


def _as_number(op: str, name: str, value: object) -> float:
    """Return a number that numpy or a tensor of one element holds."""
    item = getattr(value, "item", None)
    if item is None or getattr(value, "shape", None) != ():
        raise TypeError(f"{op}: expected {name} to be a number, got {type(value).__name__}")
    number: float = item()
    return number


def int_min(a: int, b: int) -> int:
    """Return the smaller one, as an expression where one follows from a symbolic shape."""
    if type(a) is int and type(b) is int and not torch.compiler.is_compiling():
        return min(a, b)  # 2 us faster
    smaller: int = torch.sym_min(a, b)
    return smaller


def not_traced(op: str) -> None:
    """Raise RuntimeError in torch.jit.trace, which would fix a number that follows from a shape."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError(
            f"{op}: expected torch.export or torch.compile, got torch.jit.trace, which fixes the "
            "number of entries to that of the example"
        )


def threshold_guess(op: str, x: Tensor | None) -> None:
    """Raise unless `x` is None or a tensor of one number."""
    if not isinstance(x, Tensor | None):
        raise TypeError(f"{op}: expected threshold_guess to be a Tensor, got {type(x).__name__}")
    if x is not None and x.shape != ():
        raise ValueError(f"{op}: expected threshold_guess to be [], got {list(x.shape)}")


def same(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless `x` has the device and the dtype of `like`."""
    if x.device != like.device:
        raise ValueError(
            f"{op}: expected {name} on the device of {like_name}, {like.device}, got {x.device}"
        )
    if x.dtype != like.dtype:
        raise TypeError(
            f"{op}: expected {name} to have the dtype of {like_name}, {like.dtype}, got {x.dtype}"
        )


def values_of(op: str, values: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless `values` are on the device of `like`, in its dtype or that of its sums."""
    floating(op, "values", values)
    if values.device != like.device:
        raise ValueError(
            f"{op}: expected values on the device of {like_name}, {like.device}, "
            f"got {values.device}"
        )
    wide = accumulator_dtype(like.dtype)
    if values.dtype not in (like.dtype, wide):
        allowed = f"{like.dtype}" if wide == like.dtype else f"{like.dtype} or {wide}"
        raise TypeError(
            f"{op}: expected values to have the dtype of {like_name}, {allowed}, got {values.dtype}"
        )


def dictionary(op: str, W_dec: object, d_sae: int) -> None:
    """Raise unless `W_dec` is a floating [d_sae, d_out]."""
    floating(op, "W_dec", W_dec)
    assert isinstance(W_dec, Tensor)
    if W_dec.ndim != 2 or W_dec.shape[0] != d_sae:
        raise ValueError(
            f"{op}: expected W_dec to be [d_sae, d_out] with d_sae = {d_sae}, "
            f"got {list(W_dec.shape)}"
        )


def bf16_copy(op: str, copy: Tensor | None, W_dec: Tensor) -> None:
    """Raise unless `copy` is None or bfloat16 with the shape and device of a float32 `W_dec`."""
    if copy is None:
        return
    floating(op, "bf16_W_dec", copy)
    if W_dec.dtype != torch.float32:
        raise TypeError(f"{op}: expected W_dec to be float32 with bf16_W_dec, got {W_dec.dtype}")
    if copy.dtype != torch.bfloat16:
        raise TypeError(f"{op}: expected bf16_W_dec to be bfloat16, got {copy.dtype}")
    shape(op, "bf16_W_dec", copy, tuple(W_dec.shape), "[d_sae, d_out]")
    if copy.device != W_dec.device:
        raise ValueError(
            f"{op}: expected bf16_W_dec on the device of W_dec, {W_dec.device}, got {copy.device}"
        )


def acts(op: str, x: object) -> None:
    """Raise TypeError unless `x` is a `SparseActs`."""
    if not isinstance(x, SparseActs):
        raise TypeError(f"{op}: expected acts to be SparseActs, got {type(x).__name__}")


def shape(op: str, name: str, x: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless `x` has exactly the expected shape."""
    if tuple(x.shape) != expected:
        raise ValueError(
            f"{op}: expected {name} to be {meaning} = {list(expected)}, got {list(x.shape)}"
        )


def rounds_to_bf16(op: str, compute_dtype: torch.dtype | None, name: str, x: Tensor) -> bool:
    """Check `compute_dtype`; return whether it makes less of the float32 tensor `x`."""
    rounds = (compute_dtype, x.dtype) == (torch.bfloat16, torch.float32)
    if not rounds and compute_dtype not in (None, x.dtype):
        raise ValueError(
            f"{op}: expected compute_dtype to be None, the dtype of {name}, {x.dtype}, or bfloat16 "
            f"for a float32 {name}, got {compute_dtype}"
        )
    return rounds


def autocast(first: Tensor, *rest: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors as `torch.nn.functional.linear` gets them under autocast.

    Outside of autocast as they are, inside in its dtype, except float64. For factors and sums only:
    what a selection depends on, thresholds above all, is never cast.
    """
    device = first.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return first, *rest
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (first, *rest)
    )
