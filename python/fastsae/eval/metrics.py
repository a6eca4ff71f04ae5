"""Definitions of the reported numbers; papers use the same names for different ones.

    fvu   sum_t |x_t - x_hat_t|^2 / sum_t |x_t - mean|^2      pooled over all tokens
          Fraction of variance unexplained: 0 is perfect, 1 is no better than the mean.
          It is not the mean over tokens of |e_t|^2 / |x_t|^2 (OpenAI's "normalized MSE"), nor
          1 - the mean of per-token ratios (SAELens' "legacy" explained variance).
    mse   mean over tokens of |x_t - x_hat_t|^2, summed (not averaged) over d_in
    l0    mean number of active latents per token
    dead  number of latents that are active on no token that was looked at

One attention-sink token of 100 times the usual norm holds more variance than 1,000 others, and its
reconstruction decides a pooled fvu alone. So it is given twice: over all tokens, and over inliers,
the tokens whose norm is at most `max_norm`.

Sums are float64, and moments of batches are merged (Chan et al. 1979) rather than subtracted, so
the numbers do not depend on the batch size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.types import SparseActs


class FVU:
    """Streaming `sum |x - x_hat|^2 / sum |x - mean|^2` over rows, in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self.squared_error = 0.0
        self.squared_deviation = 0.0
        self.mean: Tensor | None = None
        """Mean of the rows so far: [d], float64."""

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add rows `x: [n, d]` and their reconstructions, of the same shape."""
        if x.shape != x_hat.shape or x.ndim != 2:
            raise ValueError(
                f"fvu: expected x and x_hat to be [n, d], got {[*x.shape]} and {[*x_hat.shape]}"
            )
        if not len(x):
            return
        x, x_hat = x.detach().double(), x_hat.detach().double()
        n, mean = len(x), x.mean(0)
        self.squared_error += float((x - x_hat).square().sum())
        self.squared_deviation += float((x - mean).square().sum())
        if self.mean is None:
            self.mean = mean
        else:
            shift = mean - self.mean
            weight = n / (self.rows + n)
            self.squared_deviation += float(shift.square().sum()) * self.rows * weight
            self.mean = self.mean + shift * weight
        self.rows += n

    @property
    def value(self) -> float:
        """The fraction of variance unexplained; nan without rows or without variance."""
        return self.squared_error / self.squared_deviation if self.squared_deviation else torch.nan

    @property
    def mse(self) -> float:
        """Mean squared error per token, summed over d; nan without rows."""
        return self.squared_error / self.rows if self.rows else torch.nan


def fvu(x: Tensor, x_hat: Tensor) -> float:
    """Return the pooled fraction of variance unexplained of `x_hat: [n, d]` as a guess of `x`.

    Raises:
        ValueError: the two are not `[n, d]` of one shape.
    """
    total = FVU()
    total.update(x, x_hat)
    return total.value


def firing_counts(acts: SparseActs) -> Tensor:
    """Return on how many tokens each latent is active: int64 `[d_sae]`."""
    active = acts.values.detach().flatten() != 0
    return torch.bincount(acts.indices.flatten()[active].long(), minlength=acts.d_sae)


def norm_limit(x: Tensor, ratio: float = 3.0) -> float:
    """Return `ratio` times the median norm of the rows of `x: [n, d]`; above it is an outlier."""
    return ratio * float(x.float().norm(dim=1).median())
