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


class FVU:
    """Streaming `sum |x - x_hat|^2 / sum |x - mean|^2` over rows, in float64, by column too."""

    def __init__(self) -> None:
        self.rows = 0
        self.mean = self.squared_error = self.squared_deviation = torch.zeros(0).double()
        """Mean of the rows so far, and both sums, by column: [d], float64."""

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add rows `x: [n, d]` and their reconstructions, of the same shape."""
        if x.shape != x_hat.shape or x.ndim != 2:
            raise ValueError(
                f"fvu: expected x and x_hat to be [n, d], got {[*x.shape]} and {[*x_hat.shape]}"
            )
        if not len(x):
            return
        x, x_hat = x.detach().double(), x_hat.detach().double()
        if not self.rows:
            self.mean, self.squared_error, self.squared_deviation = x.new_zeros(3, x.shape[1])
        n, mean = len(x), x.mean(0)
        shift, weight = mean - self.mean, n / (self.rows + n)
        self.squared_error = self.squared_error + (x - x_hat).square().sum(0)
        between = shift.square() * (self.rows * weight)
        self.squared_deviation = self.squared_deviation + (x - mean).square().sum(0) + between
        self.mean = self.mean + shift * weight
        self.rows += n

    @property
    def value(self) -> float:
        """The fraction of variance unexplained; nan without rows or without variance."""
        return _ratio(self.squared_error.sum(), self.squared_deviation.sum())

    @property
    def mse(self) -> float:
        """Mean squared error per token, summed over d; nan without rows."""
        return float(self.squared_error.sum()) / self.rows if self.rows else torch.nan


def fvu(x: Tensor, x_hat: Tensor) -> float:
    """Return the pooled fraction of variance unexplained of `x_hat: [n, d]` as a guess of `x`.

    Raises:
        ValueError: the two are not `[n, d]` of one shape.
    """
    total = FVU()
    total.update(x, x_hat)
    return total.value


def norm_limit(x: Tensor, ratio: float = 3.0) -> float:
    """Return `ratio` times the median norm of the rows of `x: [n, d]`; above it is an outlier."""
    return ratio * float(x.float().norm(dim=1).median())


def _ratio(error: Tensor, deviation: Tensor) -> float:
    return float(error / deviation) if float(deviation) else torch.nan
