"""Argument checks that every module shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_rows(owner: str, x: Tensor, name: str, *, like: Tensor, width: str = "d_in") -> Tensor:
    """Check `x: [..., d_in]` against a parameter `like: [d_sae, d_in]` and return it as [n, d_in].

    Messages call the last dimension `width`. Under autocast any floating dtype is right: the ops
    cast it, as they cast the parameters.

    Raises:
        TypeError: not a dense tensor, or not the dtype of the parameters.
        ValueError: the last dimension is not d_in, or another device.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{owner}: expected {name} to be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else str(x.layout)
        raise TypeError(f"{owner}: expected {name} to be a dense tensor, got {kind}")
    d_in = like.shape[1]
    if x.ndim == 0 or x.shape[-1] != d_in:
        raise ValueError(
            f"{owner}: expected {name} to be [..., {width}] with {width} = {d_in}, got {[*x.shape]}"
        )
    if x.dtype != like.dtype and not _autocasts(x):
        raise TypeError(
            f"{owner}: expected {name} to be {like.dtype} like the parameters, got {x.dtype}"
        )
    if x.device != like.device:
        raise ValueError(f"{owner}: expected {name} to be on {like.device}, got {x.device}")
    return x.reshape(-1, d_in)


def is_whole(k: Any) -> bool:
    """Return whether `k` is a whole number, of whatever type."""
    try:
        return bool(int(k) == k)
    except (TypeError, ValueError, OverflowError):
        return False


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return (
        x.is_floating_point()
        and torch.amp.is_autocast_available(kind)
        and torch.is_autocast_enabled(kind)
    )
