"""Percentile bootstrap of a ratio of sums, over one set of units or over two that cross.

    statistic = mean_c sum_n totals[c, n] / sum_n weights[n]

Source: Efron 1979. Both axes are resampled independently of each other (Owen 2007, "The pigeonhole
bootstrap"), since all controls are measured on the same prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def interval(
    totals: Tensor, weights: Tensor, resamples: int, confidence: float, seed: int
) -> tuple[float, float]:
    """Return the ends of the interval.

    Args:
        totals: `[c, n]`, float64; of c directions and n units, say prompts.
        weights: `[n]`, float64, positive.
        resamples: of both axes.
        confidence: share of the resamples that the interval holds.
        seed: of the draws; the same units are drawn for every call of one shape.
    """
    generator = torch.Generator().manual_seed(seed)
    c, n = totals.shape
    units = _drawn(resamples, n, generator)
    directions = _drawn(resamples, c, generator)
    sums = ((directions @ totals) * units).sum(1)
    statistic = sums / ((units @ weights) * c)
    tail = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = statistic.quantile(tail).tolist()
    return low, high


def _drawn(resamples: int, n: int, generator: torch.Generator) -> Tensor:
    """Return how often each of n is drawn in n draws with replacement: float64 `[resamples, n]`."""
    picks = torch.randint(n, (resamples, n), generator=generator)
    ones = torch.ones(resamples, n, dtype=torch.float64)
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, picks, ones)
