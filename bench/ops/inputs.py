"""Shapes of the benchmarks and inputs that look like an SAE's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from fastsae import SparseActs

Shape = tuple[int, int, int, int]  # n, d_in, d_sae, k
SHAPES: dict[str, Shape] = {
    "S": (2048, 576, 2304, 32),
    "A": (1024, 768, 24576, 32),
    "W": (512, 768, 131072, 64),
}


# A GPU is busy only with more tokens.
CUDA_SHAPES: dict[str, Shape] = {
    "A": (4096, 768, 24576, 32),
    "B": (8192, 2304, 65536, 64),
    "C": (8192, 4096, 131072, 64),
}


def describe(name: str, shape: Shape | None = None) -> str:
    """Return the shape in words."""
    n, d, m, k = shape or SHAPES[name]
    return f"{name}: n {n}, d {d}, d_sae {m}, k {k}"


def weights(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [n, d], W [d_sae, d] with unit rows, and a bias [d_sae]."""
    n, d, m, _ = shape
    made = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    x = torch.randn(n, d, **made)
    W = torch.nn.functional.normalize(torch.randn(m, d, **made), dim=1)
    b = 0.1 * torch.randn(m, **made)
    return x.to(dtype), W.to(dtype), b.to(dtype)


def acts(shape: Shape, dtype: torch.dtype, device: str) -> SparseActs:
    """Return k random latents per token, latents of very unequal frequency (log-normal)."""
    n, _, m, k = shape
    made = {"generator": torch.Generator(device).manual_seed(0)}
    popularity = (1.5 * torch.randn(m, device=device, **made)).exp()
    indices = torch.multinomial(popularity.expand(n, m), k, **made)
    values = torch.rand(n, k, device=device, **made) + 0.1
    return SparseActs(values.to(dtype), indices.sort(1).values.int(), None, m)


def peer(module: str, name: str) -> Callable[..., object] | None:
    """Return a function of another library, or None where it cannot be imported."""
    try:
        return cast("Callable[..., object]", getattr(importlib.import_module(module), name))
    except Exception:  # any failure: the library is optional
        return None
