"""Evaluate an SAE on held-out activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastsae.eval.metrics import FVU, norm_limit
from fastsae.nn import SAE


class Rows(Protocol):
    """Where rows come from: a `fastsae.data.ActivationStore`, or anything like it."""

    def __len__(self) -> int:
        """Number of rows."""

    def batches(
        self, batch_size: int, seed: int = 0, epoch: int = 0, start: int = 0
    ) -> Iterable[Tensor]:
        """Yield the rows as `[b, d_in]`."""

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Return up to n rows drawn from all."""


@dataclass(frozen=True)
class EvalResult:
    """The numbers of `fastsae.eval.metrics` for one SAE on one set of rows."""

    rows: int
    fvu: float
    """Fraction of variance unexplained, over all rows."""
    fvu_inliers: float
    """The same over rows of a norm of at most `max_norm`."""
    outliers: int
    """Number of rows of a larger norm."""
    max_norm: float
    mse: float
    """Squared error per token, summed over d_in."""
    l0: float
    dead: int
    d_sae: int
    frequency: Tensor
    """Share of the rows on which each latent is active: [d_sae], float64."""

    def to_dict(self) -> dict[str, float]:
        """Return the scalars by name."""
        return {name: value for name, value in vars(self).items() if name != "frequency"}


@torch.no_grad()
def evaluate(
    sae: SAE,
    data: Tensor | Rows,
    *,
    batch_size: int = 4096,
    max_rows: int | None = None,
    outlier_ratio: float = 3.0,
    progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """Reconstruct rows with an SAE in eval mode and measure what is lost.

    Args:
        sae: any `fastsae` SAE: `encode_sparse`, `decode`, `d_sae`.
        data: `[n, d_in]`, or an `ActivationStore`; use rows that were not trained on. Columns as in
            training, see `SAE.data_widths`.
        batch_size: rows at a time.
        max_rows: stop after this many; None takes all.
        outlier_ratio: rows above this many times the median norm (of up to 16,384 sampled rows) are
            outliers.
        progress: called with the number of rows, once per batch.

    Raises:
        ValueError: no rows.
    """
    if not len(data):
        raise ValueError("evaluate: expected at least one row, got none")
    rows = _TensorRows(data) if isinstance(data, Tensor) else data
    limit = norm_limit(sae.split(rows.sample(16384))[1], outlier_ratio)
    every, inliers = FVU(), FVU()
    counts = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_enc.device)
    training = sae.training
    sae.eval()
    try:
        for x in rows.batches(batch_size):
            batch = x[: None if max_rows is None else max_rows - every.rows].to(sae.W_enc)
            given, x = sae.split(batch)
            acts = sae.encode_sparse(given)
            x_hat = sae.reconstruct(given, acts)
            counts += acts.counts()
            small = x.float().norm(dim=1) <= limit
            every.update(x, x_hat)
            inliers.update(x[small], x_hat[small])
            if progress:
                progress(len(x))
            if every.rows == max_rows:
                break
    finally:
        sae.train(training)
    return EvalResult(
        rows=every.rows,
        fvu=every.value,
        fvu_inliers=inliers.value,
        outliers=every.rows - inliers.rows,
        max_norm=limit,
        mse=every.mse,
        l0=int(counts.sum()) / every.rows,
        dead=int((counts == 0).sum()),
        d_sae=sae.d_sae,
        frequency=(counts.double() / every.rows).cpu(),
    )


class _TensorRows:
    """A tensor `[n, d]` in the shape of `Rows`, in its own order."""

    def __init__(self, x: Tensor) -> None:
        if x.ndim != 2:
            raise ValueError(f"evaluate: expected data to be [n, d_in], got {[*x.shape]}")
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def batches(
        self, batch_size: int, seed: int = 0, epoch: int = 0, start: int = 0
    ) -> Iterator[Tensor]:
        yield from self.x.split(batch_size)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        return self.x[torch.linspace(0, len(self.x) - 1, min(n, len(self.x))).long()]
