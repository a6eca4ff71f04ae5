"""Rows of huge norm, such as attention sinks: found by their norm, and clipped in training.

A row of a hundred medians of norm is a thousandth of a percent of the tokens of a language model
and a fifth of their variance. Its gradient drowns that of its batch, and Adam's average of squares
remembers it for a thousand steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.nn.scaler import Columns


def inlier_mask(x: Tensor, outlier_norm: float) -> Tensor:
    """Return which rows of `x: [n, d]` have a norm of at most `outlier_norm` medians: bool [n]."""
    norm: Tensor = torch.linalg.vector_norm(x.float(), dim=1)
    return norm <= outlier_norm * norm.median()


def norm_limits(columns: Columns, sample: Tensor, outlier_norm: float) -> list[float]:
    """Return `outlier_norm` medians of the norm of each input and target block of a sample."""
    blocks = sample.split(columns.widths, 1)[: len(columns.inputs) + len(columns.targets)]
    return [outlier_norm * float(torch.linalg.vector_norm(x, dim=1).median()) for x in blocks]


def clip_rows_(batch: Tensor, columns: Columns, limits: list[float]) -> Tensor:
    """Scale rows of `batch: [n, sum(widths)]` down until no block's norm is above its limit.

    All inputs and targets of a row by one factor, so that an SAE with small biases, which maps
    multiples of a row to multiples of its reconstruction, is taught the same about it.
    """
    widths = columns.inputs + columns.targets
    factor: Tensor | None = None
    for block, limit in zip(batch.split(columns.widths, 1), limits, strict=False):
        ratio = limit / torch.linalg.vector_norm(block, dim=1, keepdim=True)
        factor = ratio if factor is None else torch.minimum(factor, ratio)
    assert factor is not None
    batch[:, : sum(widths)].mul_(factor.clamp(max=1))
    return batch
