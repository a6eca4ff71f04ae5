"""Where the decoder bias starts: the center of a sample of activations."""

from __future__ import annotations

import torch
from torch import Tensor


def center(x: Tensor, method: str) -> Tensor:
    """Return the center `[d]` of the rows of `x: [n, d]`, in float32 (float64 for float64).

    Args:
        x: floating point.
        method: `mean`, or `geometric_median`, which hardly moves for a few rows of huge norm.

    Raises:
        ValueError: no rows, NaN or Inf in x, or another method.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if x.shape[0] == 0:
        raise ValueError("initialize_b_dec_: expected at least one row, got none")
    bad = int((~x.isfinite().all(1)).sum())
    if bad:
        raise ValueError(
            f"initialize_b_dec_: expected finite rows, got {bad} of {x.shape[0]} with NaN or Inf"
        )
    if method == "mean":
        return x.mean(0)
    if method == "geometric_median":
        return geometric_median(x)
    raise ValueError(f"initialize_b_dec_: expected method geometric_median or mean, got {method!r}")


def geometric_median(x: Tensor, *, tolerance: float = 1e-6, max_iterations: int = 200) -> Tensor:
    """Return argmin_y sum_i |x_i - y| for the rows of `x: [n, d]`, by Weiszfeld's iteration.

        y <- sum_i x_i / |x_i - y|  /  sum_i 1 / |x_i - y|

    Stops when y moves less than `tolerance` times the mean distance. Distances are kept above a
    millionth of their mean, so that y may coincide with a row.

    Cost: one read of x per matmul, about 20 to 50 iterations, one temporary of its size.
    Source: Weiszfeld 1937; used for b_pre by Gao et al. 2024, appendix A.1.
    """
    y = x.mean(0)
    for _ in range(max_iterations):
        distance = torch.linalg.vector_norm(x - y, dim=1)
        mean = distance.mean()
        weight = 1 / distance.clamp_min(1e-6 * mean)
        # Not weight @ x: a library's matrix-vector product depends on the number of threads.
        weighted = (weight.unsqueeze(1) * x).sum(0)
        moved = weighted / weight.sum() if mean > 0 else y
        step = torch.linalg.vector_norm(moved - y)
        y = moved
        if step <= tolerance * mean:
            break
    return y
