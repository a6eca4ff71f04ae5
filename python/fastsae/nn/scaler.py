"""The column blocks of a training batch, their scales, and how an SAE moves between the two units.

An SAE is trained on `scale * x` and used on `x`. With scales s_in of the columns of x, s_out of
those of the target and c of the code,

    W_enc <- diag(s_in) W_enc / c,   b_enc <- b_enc / c
    W_dec <- c W_dec diag(1 / s_out),   b_dec <- b_dec / s_out

give the SAE of raw activations: the same latents are active, with values divided by c.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastsae.nn.loss import upcast


class Foldable(Protocol):
    """What folding changes of an SAE."""

    b_enc: Tensor
    b_dec: Tensor

    def divide_columns_(self, inputs: Sequence[float], targets: Sequence[float]) -> None:
        """See `SAE.divide_columns_`."""

    def rescale_code_(self, scaler: ActivationScaler) -> None:
        """See `SAE.rescale_code_`."""


class Batch(NamedTuple):
    """A training batch by what its columns are for."""

    x: Tensor
    """[n, d_in]: encoded."""
    target: Tensor
    """[n, d_out]: reconstructed; x itself for SAEs."""
    extra: Tensor | None
    """[n, d_extra]: used in another way, such as the model's gradient; None without any."""


class Columns(NamedTuple):
    """Widths of the column blocks of a training batch, in their order."""

    inputs: tuple[int, ...]
    """Blocks that are encoded, each with its own scale."""
    targets: tuple[int, ...] = ()
    """Blocks that are reconstructed; empty: the inputs are."""
    extra: tuple[int, ...] = ()
    """Blocks that are neither, and are never scaled."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Return all widths in order."""
        return self.inputs + self.targets + self.extra

    def split(self, batch: Tensor) -> Batch:
        """Return the parts of `batch: [n, sum(widths)]`, contiguous."""
        if len(self.widths) == len(self.inputs):
            return Batch(batch, batch, None)
        sizes = [sum(self.inputs), sum(self.targets), sum(self.extra)]
        x, target, extra = (part.contiguous() for part in batch.split(sizes, 1))
        return Batch(x, target if self.targets else x, extra if self.extra else None)


class ActivationScaler:
    """The factor of every column block, and the conversion of an SAE between the two units.

    Args:
        columns: blocks of a training batch, `sae.columns`.
        scales: one factor for each input and target block; None: 1.

    Raises:
        ValueError: another number of scales, or one that is not positive and finite.
    """

    def __init__(self, columns: Columns, scales: Sequence[float] | None = None) -> None:
        count = len(columns.inputs) + len(columns.targets)
        self.columns = columns
        self.scales = [1.0] * count if scales is None else [float(scale) for scale in scales]
        if len(self.scales) != count or not all(0 < s < math.inf for s in self.scales):
            raise ValueError(
                f"ActivationScaler: expected {count} scales above 0 and finite, got {self.scales}"
            )

    @classmethod
    @torch.no_grad()
    def estimate(cls, columns: Columns, batch: Tensor) -> ActivationScaler:
        """Return the scaler that makes each block's mean squared distance from its mean its width.

        Args:
            columns: blocks of a training batch.
            batch: [n, sum(widths)], raw rows.

        Raises:
            ValueError: all rows of a block are equal.
        """
        blocks = batch.split(columns.widths, 1)
        blocks = blocks[: len(columns.inputs) + len(columns.targets)]
        return cls(columns, [_scale_of(block) for block in blocks])

    @property
    def input_scales(self) -> list[float]:
        """Factors of the input blocks."""
        return self.scales[: len(self.columns.inputs)]

    @property
    def target_scales(self) -> list[float]:
        """Factors of the target blocks."""
        return self.scales[len(self.columns.inputs) :] or self.scales

    @property
    def code_scale(self) -> float:
        """What the code of scaled rows is divided by: the geometric mean of `target_scales`."""
        return math.prod(self.target_scales) ** (1 / len(self.target_scales))

    @property
    def error_scale(self) -> float:
        """What reconstruction errors are divided by to be in raw units; 1 for several targets,
        which have different ones."""
        return self.target_scales[0] if len(self.target_scales) == 1 else 1.0

    @property
    def keeps_matrices(self) -> bool:
        """Whether folding changes neither W_enc nor W_dec."""
        return len(set(self.scales)) == 1

    def scale(self, batch: Tensor) -> Tensor:
        """Return `batch: [n, sum(widths)]` with each input and target block times its factor."""
        widths = self.columns.widths
        if len(widths) == 1:
            return batch * self.scales[0]
        factors = [*self.scales, *[1.0] * len(self.columns.extra)]
        blocks = zip(batch.split(widths, 1), factors, strict=True)
        return torch.cat([block * factor for block, factor in blocks], 1)

    def unscale_target(self, target: Tensor) -> Tensor:
        """Return rows `[..., d_out]` of scaled targets in raw units."""
        factor = per_column(self.target_scales, self._target_widths, target)
        return divided(target, factor)

    @torch.no_grad()
    def fold_(self, sae: Foldable) -> None:
        """Turn an SAE of scaled rows into one of raw rows, in place."""
        c = self.code_scale
        if not self.keeps_matrices:
            sae.divide_columns_(
                [c / s for s in self.input_scales], [s / c for s in self.target_scales]
            )
        sae.b_enc.div_(c)
        target = per_column(self.target_scales, self._target_widths, sae.b_dec)
        sae.b_dec.copy_(divided(sae.b_dec, target))
        sae.rescale_code_(self)

    def unfold_(self, sae: Foldable) -> None:
        """Undo `fold_`: turn an SAE of raw rows into one of scaled rows, in place."""
        ActivationScaler(self.columns, [1 / scale for scale in self.scales]).fold_(sae)

    @property
    def _target_widths(self) -> tuple[int, ...]:
        return self.columns.targets or self.columns.inputs


def per_column(scales: Sequence[float], widths: Sequence[int], like: Tensor) -> float | Tensor:
    """Return the factor of every column on the device of `like`; one number for one block."""
    if len(scales) == 1:
        return scales[0]
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    factors = torch.tensor(scales, dtype=dtype, device=like.device)
    return factors.repeat_interleave(torch.tensor(widths, device=like.device))


def divided(x: Tensor, factor: float | Tensor) -> Tensor:
    """Return x / factor, computed in float32 or float64 and rounded once."""
    return (upcast(x) / factor).to(x.dtype)


def _scale_of(block: Tensor) -> float:
    x = upcast(block)
    spread = float((x - x.mean(0)).square().sum(1).mean())
    if spread == 0:
        raise ValueError("ActivationScaler: expected activations that vary, got equal rows")
    return math.sqrt(x.shape[1] / spread)
