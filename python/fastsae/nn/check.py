"""Argument checks that every module shares."""

from __future__ import annotations

import torch
from torch import Tensor


def check_rows(owner: str, x: Tensor, name: str, *, like: Tensor, width: str = "d_in") -> Tensor:
    """Check `x: [..., d_in]` against a parameter `like: [d_in, d_sae]` and return it as [n, d_in].

    Messages call the last dimension `width`.

    Raises:
        TypeError: not a tensor, or not the dtype of the parameters.
        ValueError: the last dimension is not d_in, or another device.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{owner}: expected {name} to be a torch.Tensor, got {type(x).__name__}")
    d_in = like.shape[0]
    if x.ndim == 0 or x.shape[-1] != d_in:
        raise ValueError(
            f"{owner}: expected {name} to be [..., {width}] with {width} = {d_in}, got {[*x.shape]}"
        )
    if x.dtype != like.dtype:
        raise TypeError(
            f"{owner}: expected {name} to be {like.dtype} like the parameters, got {x.dtype}"
        )
    if x.device != like.device:
        raise ValueError(f"{owner}: expected {name} to be on {like.device}, got {x.device}")
    return x.reshape(-1, d_in)
