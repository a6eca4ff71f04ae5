"""Zipf's law of latent densities: how often latents fire, by rank, and budgets that follow it.

    log p_(r) = c - s log r,    r = 1, 2, ...: ranks of the densities p, the largest first

Source: Ayonrinde 2024 (arXiv 2411.02124) fits such a law to the densities of SAE latents. The paper
gives no formula for the budgets or the auxiliary loss; what follows is our reconstruction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_FIRES = 10
"""Tokens that a latent must have fired on, as far as an average remembers, to count in the fit."""


class ZipfFit(NamedTuple):
    """A fitted law and the latents in its order; float64."""

    order: Tensor
    """[F] int64: latents by density, the largest first, lowest index first among equals."""
    expected: Tensor
    """[F]: what the law expects of the latent of each rank."""
    exponent: Tensor
    """[]: s, at least 0."""


def fit_zipf(density: Tensor, smallest: float | Tensor = 0.0) -> ZipfFit:
    """Fit the law to `density: [F]` by least squares, over the ranks above `smallest`.

    The tail is left out, where counts say little: at most the ranks whose density is above
    `smallest`. With fewer than two of them the law is flat.
    """
    p = density.double()
    order = p.argsort(descending=True, stable=True)
    rank = torch.arange(1, p.shape[0] + 1, dtype=torch.float64, device=p.device).log()
    weight = (p[order] > smallest).double()
    count = weight.sum().clamp_min(1)
    value = torch.where(weight > 0, p[order].clamp_min(1e-300).log(), 0.0)
    mean_rank, mean_value = (rank * weight).sum() / count, value.sum() / count
    spread = ((rank - mean_rank).square() * weight).sum()
    slope = ((rank - mean_rank) * (value - mean_value) * weight).sum() / spread.clamp_min(1e-300)
    exponent = torch.where(spread > 0, -slope, 0.0).clamp_min(0.0)
    expected = (mean_value - exponent * (rank - mean_rank)).exp()
    return ZipfFit(order, expected, exponent)


def budgets(share: Tensor, total: int, most: int) -> Tensor:
    """Split `total` over the latents in proportion to `share: [F]`: int64 [F], the sum is exact.

    Every latent gets at least 1 if there are as many, and at most `most`; what is cut off at the
    top goes to the others. Fractions are rounded by the largest remainder, lowest index first.

    Raises:
        ValueError: total is not in 0..F most.
    """
    F = share.shape[0]
    if not 0 <= total <= F * most:
        raise ValueError(f"budgets: expected total in 0..{F * most}, got {total}")
    least = 1 if total >= F and most >= 1 else 0
    weight = share.double().clamp_min(1e-300)
    m = torch.full((F,), float(least), dtype=torch.float64, device=share.device)
    free = torch.ones(F, dtype=torch.bool, device=share.device)
    while True:  # every round fills one latent at least
        left = total - float(m[~free].sum()) - least * int(free.sum())
        part = least + left * weight / weight[free].sum().clamp_min(1e-300)
        over = free & (part > most)
        if not bool(over.any()):
            break
        m[over] = most
        free &= ~over
    m = torch.where(free, part, m)
    whole = m.floor()
    remainder = torch.where(whole < most, m - whole, -1.0)
    for_more = remainder.argsort(descending=True, stable=True)[: total - int(whole.sum())]
    whole[for_more] += 1
    return whole.long()


def underused(density: Tensor, ratio: float, smallest: float | Tensor = 0.0) -> Tensor:
    """Return the latents that fire less than `ratio` times what the law expects of their rank.

    bool [F]. Those that never fire are among them for every ratio above 0: as `ratio` goes to 0
    nothing else is, and the auxiliary loss is AuxK.
    """
    fit = fit_zipf(density, smallest)
    found = torch.zeros(density.shape[0], dtype=torch.bool, device=density.device)
    found[fit.order] = density.double()[fit.order] < ratio * fit.expected
    return found
