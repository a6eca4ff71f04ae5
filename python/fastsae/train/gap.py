"""How much better an SAE does on the rows it was trained on than on others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.data.source import ActivationSource, sample_rows, source_len
from fastsae.nn import SAE
from fastsae.train.config import TrainConfig

GAP_ROWS = 2048
"""Rows of either kind that are compared at most."""
LARGE = 0.1
"""A gap is large from this share of the training FVU on, if the runs saw the rows twice,"""
SIGMAS = 3.0
"""and if it is that many standard errors wide."""


@dataclass(frozen=True)
class Gap:
    """FVU on validation rows and on training rows of one kind, for the trained SAE in eval mode."""

    val_fvu: float
    """On at most 2,048 rows of the validation data, without outliers."""
    train_fvu: float
    """On as many rows of the training data, without outliers."""
    error: float
    """Standard error of val_fvu / train_fvu, as if rows were independent."""
    outliers: int
    """Rows left out, of both kinds: their norm is above `outlier_norm` training medians."""
    rows: int
    """Rows of the training data."""
    passes: float
    """How often each was seen."""

    @property
    def large(self) -> bool:
        """Whether rows were seen twice or more, and others are described clearly worse."""
        excess = self.val_fvu / max(self.train_fvu, 1e-30) - 1
        return self.passes >= 2 and excess > max(LARGE, SIGMAS * self.error)

    def __str__(self) -> str:
        """Say what the gap is and what would narrow it.

        Measured on activations of SmolLM2, TopK: 8,413 rows and 100 updates of 1,024 gave 0.435
        against 0.268; twice the updates 0.395 against 0.186, twice the rows 0.406 against 0.329.
        So a gap does not mean that more steps are of no use.
        """
        without = f" (both without {self.outliers} outliers)" if self.outliers else ""
        return (
            f"validation FVU {self.val_fvu:.3f} against {self.train_fvu:.3f} in training{without}: "
            f"the {self.rows:,} rows were seen {self.passes:.0f} times; more tokens would narrow "
            "the gap, more steps widen it"
        )


@torch.no_grad()
def measure_gap(
    sae: SAE,
    data: ActivationSource,
    val: ActivationSource,
    config: TrainConfig,
    *,
    size: int,
    tokens: int,
) -> Gap | None:
    """Compare the trained `sae` on equally many rows of both kinds; it takes raw rows.

    Batches of the run itself are no measure of training: they are of weights that were still
    moving, and of classes that select batch-wise.

    Args:
        sae: the module, in eval mode.
        data: what it was trained on.
        val: held-out data.
        config: the settings of the run.
        size: rows of a batch.
        tokens: that the run saw.

    Returns:
        None where the data have no length: nobody knows how often a row was seen.
    """
    rows, held_out = source_len(data), source_len(val)
    if not rows or not held_out:
        return None
    n = min(rows, held_out, GAP_ROWS)
    drawn = [sample_rows(source, n, size, config.seed)[:n] for source in (data, val)]
    norms = [torch.linalg.vector_norm(sae.columns.split(x).x.float(), dim=1) for x in drawn]
    bound = config.outlier_norm * norms[0].median()
    kept = [x[norm <= bound.to(norm.device)] for x, norm in zip(drawn, norms, strict=True)]
    if min(map(len, kept)) < 2:
        return None
    (train_fvu, train_error), (val_fvu, val_error) = (_fvu(sae, x, size) for x in kept)
    return Gap(
        val_fvu=val_fvu,
        train_fvu=train_fvu,
        error=val_fvu / max(train_fvu, 1e-30) * math.hypot(train_error, val_error),
        outliers=sum(map(len, drawn)) - sum(map(len, kept)),
        rows=rows,
        passes=tokens / rows,
    )


def _fvu(sae: SAE, x: Tensor, batch_size: int) -> tuple[float, float]:
    """Return the FVU of `x: [n, columns]`, and its standard error as a share of it."""
    errors, targets = list[Tensor](), list[Tensor]()
    for batch in x.to(sae.W_enc_rows.device, sae.W_enc_rows.dtype).split(batch_size):
        inputs, target, _ = sae.columns.split(batch)
        difference = target - sae.reconstruct(inputs, sae.encode_sparse(inputs))
        errors.append(difference.double().square().sum(1))
        targets.append(target.double())
    error, target = torch.cat(errors), torch.cat(targets)
    total = (target - target.mean(0)).square().sum()
    share = error.std() / (error.mean().clamp_min(1e-300) * math.sqrt(len(error)))
    return float(error.sum() / total.clamp_min(1e-300)), float(share)
