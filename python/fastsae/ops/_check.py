"""Argument checks in one grammar: `<op>: expected <what>, got <what came>`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def floating(op: str, name: str, x: object) -> None:
    """Raise TypeError unless `x` is a tensor of a floating dtype that the kernels have."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {name} to be a Tensor, got {type(x).__name__}")
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


def mean_k(op: str, k: float) -> None:
    """Raise ValueError unless `k`, a mean number per row, is finite and not negative."""
    if not (math.isfinite(k) and k >= 0):
        raise ValueError(f"{op}: expected a finite k >= 0, got k = {k}")


def threshold_guess(op: str, x: Tensor | None) -> None:
    """Raise ValueError unless `x` is None or one number."""
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
