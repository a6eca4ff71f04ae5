"""Evaluate an SAE on held-out activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.data.source import ActivationSource, as_source, sample_rows, source_len
from fastsae.eval.metrics import FVU, norm_limit
from fastsae.nn import SAE, NormalizedSAE


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
    sae: SAE | NormalizedSAE,
    data: Tensor | ActivationSource,
    *,
    batch_size: int = 4096,
    max_rows: int | None = None,
    outlier_ratio: float = 3.0,
    progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """Reconstruct rows with an SAE in eval mode and measure what is lost.

    Args:
        sae: any `fastsae` SAE: `encode_sparse`, `reconstruct`, `d_sae`.
        data: `[n, d_in]`, an `ActivationStore` or another source; use rows that were not trained
            on. Columns as in training, see `SAE.columns`.
        batch_size: rows at a time.
        max_rows: stop after this many; None takes all.
        outlier_ratio: rows above this many times the median norm (of up to 16,384 sampled rows) are
            outliers.
        progress: called with the number of rows, once per batch.

    Raises:
        ValueError: no rows, or one holds NaN or Inf.
    """
    source = as_source("evaluate", "data", data)
    if source_len(source) == 0:
        raise ValueError("evaluate: expected at least one row, got none")
    columns = sae.columns
    sample = sample_rows(source, 16384, batch_size)
    limit = norm_limit(columns.split(sample).target, outlier_ratio)
    every, inliers = FVU(), FVU()
    counts = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_enc_rows.device)
    training = sae.training
    sae.eval()
    try:
        for x in source.batches(batch_size, seed=None):
            batch = x[: None if max_rows is None else max_rows - every.rows].to(sae.W_enc_rows)
            if bad := int((~batch.isfinite().all(1)).sum()):
                raise ValueError(
                    f"evaluate: expected finite rows, got {bad} with NaN or Inf among rows "
                    f"{every.rows} to {every.rows + len(batch)}"
                )
            given, x, _ = columns.split(batch)
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
