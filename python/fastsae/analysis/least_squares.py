"""Linear regression over rows that pass by once."""

from __future__ import annotations

import torch
from torch import Tensor


class LeastSquares:
    """Streaming `argmin_W sum |y - x W|^2`, in float64, without an intercept.

    Numerics: the normal equations are solved by a singular value decomposition; directions in which
    x has less than about 1e-7 of its largest extent take no part.
    """

    def __init__(self) -> None:
        self.gram = self.moments = torch.zeros(0).double()
        """x^T x, `[d, d]`, and x^T y, `[d, m]`; empty before the first rows."""

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows `x: [n, d]` and their targets `y: [n, m]`."""
        x, y = x.double(), y.double()
        if not self.gram.numel():
            self.gram = x.new_zeros(x.shape[1], x.shape[1])
            self.moments = x.new_zeros(x.shape[1], y.shape[1])
        self.gram.addmm_(x.t(), x)
        self.moments.addmm_(x.t(), y)

    def solution(self) -> Tensor:
        """Return W, the one of least norm: `[d, m]`."""
        # Only the CPU has drivers for a singular matrix. The default one, gelsy, can be wrong where
        # columns depend on each other (seen in torch 2.13).
        gram, moments = self.gram.cpu(), self.moments.cpu()
        solution: Tensor = torch.linalg.lstsq(gram, moments, driver="gelsd").solution
        return solution.to(self.gram.device)


def r2(residual: Tensor, deviation: Tensor) -> Tensor:
    """Return 1 - residual / deviation, both sums of squares; nan where nothing deviates."""
    return torch.where(deviation > 0, 1 - residual / deviation, torch.nan)
