"""Rows of activations as int8, with one scale for each row.

    scale = max |x| / 127
    q     = round(x / scale)         |x - q scale| <= scale / 2

A row with an entry far above the others, as those of attention sinks are, has a large scale, and
its small entries become 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 127


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round the rows of x to int8.

    Args:
        x: `[n, d]`, floating point, finite.

    Returns:
        `q: [n, d]`, int8 in -127..127, and `scale: [n]`, float32 and above 0.

    Numerics:
        In float32. The error of an entry is at most scale / 2, up to the rounding of float32.
    """
    x = x.float()
    largest = x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
    scale = (largest / STEPS).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale.unsqueeze(1)).round().to(torch.int8), scale


def from_int8(q: Tensor, scales: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the rows that int8 numbers stand for.

    Args:
        q: `[n, d]`, int8, of one site or several side by side.
        scales: `[n, len(widths)]`, float32, one column for each site.
        widths: of the sites; their sum is d.

    Returns:
        `[n, d]`, float32.
    """
    x = q.float()
    for block, scale in zip(x.split(list(widths), 1), scales.unbind(1), strict=True):
        block *= scale.unsqueeze(1)
    return x


@dataclass(frozen=True)
class StoredRows:
    """Rows in the dtype in which they are stored."""

    acts: Tensor
    """[n, d], the sites side by side."""
    scales: Tensor | None
    """[n, sites], float32, where acts are int8; None of other dtypes."""
    widths: Sequence[int]
    """Of the sites."""

    @classmethod
    def empty(cls, n: int, widths: Sequence[int], dtype: torch.dtype) -> StoredRows:
        """Return memory for n rows."""
        scales = torch.empty(n, len(widths)) if dtype == torch.int8 else None
        return cls(torch.empty(n, sum(widths), dtype=dtype), scales, widths)

    def __len__(self) -> int:
        return len(self.acts)

    def __getitem__(self, rows: Tensor | slice) -> StoredRows:
        scales = None if self.scales is None else self.scales[rows]
        return StoredRows(self.acts[rows], scales, self.widths)

    def floats(self) -> Tensor:
        """Return them as float32."""
        if self.scales is None:
            return self.acts.float()
        return from_int8(self.acts, self.scales, self.widths)
