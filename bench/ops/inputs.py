"""Shapes of the benchmarks and inputs that look like an SAE's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import SparseActs

# name: n, d_in, d_sae, k
SHAPES = {
    "S": (2048, 576, 2304, 32),
    "A": (1024, 768, 24576, 32),
    "W": (512, 768, 131072, 64),
}


def describe(name: str) -> str:
    """Return the shape in words."""
    n, d, m, k = SHAPES[name]
    return f"{name}: n {n}, d {d}, d_sae {m}, k {k}"


def weights(name: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [n, d], W [d_sae, d] with unit rows, and a bias [d_sae]."""
    n, d, m, _ = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    W = torch.nn.functional.normalize(torch.randn(m, d, generator=generator), dim=1)
    b = 0.1 * torch.randn(m, generator=generator)
    return tuple(t.to(dtype).to(device) for t in (x, W, b))  # type: ignore[return-value]


def acts(name: str, dtype: torch.dtype, device: str) -> SparseActs:
    """Return k random latents per token, latents of very unequal frequency (log-normal)."""
    n, _, m, k = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    popularity = (1.5 * torch.randn(m, generator=generator)).exp()
    indices = torch.multinomial(popularity.expand(n, m), k, generator=generator)
    values = torch.rand(n, k, generator=generator) + 0.1
    return SparseActs(values.to(dtype).to(device), indices.sort(1).values.int().to(device), None, m)
