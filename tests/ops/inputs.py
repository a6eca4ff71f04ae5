"""Inputs that selection gets wrong when it is wrong: ties, NaN, infinities, zeros of both signs."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def matrix(kind: str, n: int, m: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Return an [n, m] matrix of the named kind."""
    x = torch.randn(n, m, dtype=torch.float64)
    if kind == "ties":
        x = (x * 2).round() / 2
    elif kind == "equal":
        x = torch.ones(n, m, dtype=torch.float64)
    elif kind == "negative":
        x = -x.abs() - 0.1
    elif kind == "zeros":
        x = torch.where(torch.rand(n, m) < 0.5, 0.0, -0.0).double()
    elif kind == "special":
        place = torch.rand(n, m)
        x[place < 0.05] = float("nan")
        x[(place >= 0.05) & (place < 0.1)] = float("inf")
        x[(place >= 0.1) & (place < 0.3)] = float("-inf")
    elif kind == "minus_inf":
        x.fill_(float("-inf"))
    elif kind == "ascending":
        x = torch.arange(n * m, dtype=torch.float64).reshape(n, m)
    elif kind != "normal":
        raise AssertionError(kind)
    return x.to(dtype).to(device)


KINDS = ("normal", "ties", "equal", "negative", "zeros", "special", "minus_inf", "ascending")
# n, m, k: one of each, odd, at and around a vector, a block of 4096 and the re-tightening at 8192.
SHAPES = (
    (1, 1, 1),
    (3, 7, 3),
    (2, 16, 16),
    (5, 65, 7),
    (4, 129, 1),
    (3, 1000, 500),
    (2, 4096, 32),
    (2, 4099, 64),
    (1, 20011, 33),
    (1, 20011, 9000),
)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, counting NaN as equal to NaN."""
    return (
        a.dtype == b.dtype
        and bool(torch.equal(a.isnan(), b.isnan()))
        and bool(torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0)))
    )


def acts(n: int, d_sae: int, k: int, dtype: torch.dtype, layout: str, device: str = "cpu"):
    """Random `SparseActs` with some inactive entries, in the fixed or the variable layout."""
    from fastsae import SparseActs

    if layout == "fixed":
        indices = torch.rand(n, d_sae).argsort(1)[:, :k].sort(1).values.int()
        values = torch.randn(n, k, dtype=torch.float64)
        values[torch.rand(n, k) < 0.2] = 0.0
        return SparseActs(values.to(dtype).to(device), indices.to(device), None, d_sae)
    dense = torch.randn(n, d_sae, dtype=torch.float64) * (torch.rand(n, d_sae) < k / d_sae)
    packed = SparseActs.from_dense(dense)
    padding = 5
    values = torch.cat([packed.values, torch.zeros(padding)]).to(dtype)
    if values.numel() > padding:
        values[0] = 0.0
    indices = torch.cat([packed.indices, torch.zeros(padding, dtype=torch.int32)])
    assert packed.offsets is not None
    return SparseActs(values.to(device), indices.to(device), packed.offsets.to(device), d_sae)
