"""Where an SAE starts: at the center of a sample of activations, in the directions of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute with one thread meanwhile, on a CPU: its matmuls and decompositions depend
    on the number of threads, and where training starts must not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


CHUNK = 4096
"""Rows that are made at a time."""


def some_rows(x: Tensor, n: int, seed: int = 0) -> Tensor:
    """Return `n` different rows of `x: [m, d]`, drawn at random and in order; all if m <= n."""
    if len(x) <= n:
        return x
    generator = torch.Generator().manual_seed(seed)
    return x[torch.randperm(len(x), generator=generator)[:n].sort().values.to(x.device)]


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


def directions(x: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return unit rows `[count, d]`: rows of `x: [n, d]`, half whitened, with some noise.

        w = normalize(u + e / 2),   u = normalize(C^(-1/4) x_i / |x_i|),   e ~ uniform on the sphere

    C is the covariance of x. Activations lie along a few directions of large variance, so their
    rows themselves would all compete for the same tokens, and random ones would mostly point where
    nothing is. The noise makes rows of one x_i different when there are fewer than `count`, and
    reaches what x hardly has. Rows come in random order, again and again until there are enough.

    Args:
        x: centered, float32 or float64.
        count: of rows.
        seed: of the order and the noise, the same on every device.

    Numerics: eigenvalues of C below a thousandth of their mean count as that. The same for every
        number of threads, as one computes it.
    Cost: an eigendecomposition of [d, d].
    Source: our addition; docs/training.md has what it saves.
    """
    generator = torch.Generator().manual_seed(seed)
    passes = -(-count // len(x))
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(passes)])
    rows = x.new_empty(count, x.shape[1])
    with one_thread():
        variances, axes = torch.linalg.eigh(x.t() @ x / len(x))
        relative = variances / variances.mean().clamp_min(torch.finfo(x.dtype).tiny)
        whiten = (axes * relative.clamp_min(1e-3) ** -0.25) @ axes.t()
        for part, of in zip(rows.split(CHUNK), order[:count].split(CHUNK), strict=True):
            noise = torch.randn(*part.shape, generator=generator).to(x)
            white = F.normalize(F.normalize(x[of.to(x.device)]) @ whiten)
            part.copy_(F.normalize(white + F.normalize(noise) / 2))
    return rows


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
