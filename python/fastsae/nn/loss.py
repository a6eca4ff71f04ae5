"""The pieces of the training loss: what a forward returns, and ratios of squared errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.types import SparseActs

_FLOOR = 1e-20  # keeps a ratio finite where a batch has no variance


@dataclass
class SAEOutput:
    """What `SAE.loss` returns; every scalar is a tensor `[]` in float32 (float64 for float64)."""

    loss: Tensor
    """`fvu + auxk_alpha * aux_loss + sparsity_loss`: the number to call backward on."""
    reconstruction: Tensor
    """x_hat, with the shape of the target."""
    acts: SparseActs
    """The sparse code of the batch, leading dimensions flattened; carries the graph."""
    fvu: Tensor
    """Fraction of variance unexplained in this batch: sum e^2 / sum (x - mean x)^2."""
    mse: Tensor
    """Squared error summed over d_in, mean over tokens; in squared units of x. Detached."""
    aux_loss: Tensor
    """Share of the residual's variance that dead latents leave; 0 where there are none."""
    sparsity_loss: Tensor
    """What the code's size costs, weighted; 0 for classes whose selection bounds it."""


def upcast(x: Tensor) -> Tensor:
    """Return `x` in the dtype that statistics are kept in: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def variation(x: Tensor) -> Tensor:
    """Return sum (x - mean x)^2 over `x: [n, d]`, without a graph."""
    x = upcast(x.detach())
    return (x - x.mean(0)).square().sum()


def unexplained(squared_error: Tensor, goal: Tensor) -> Tensor:
    """Return sum error^2 / sum (goal - mean goal)^2; huge where all rows of `goal` are equal."""
    return squared_error / variation(goal).clamp_min(_FLOOR)


def unexplained_residual(guess: Tensor, residual: Tensor) -> Tensor:
    """Return the same for a `guess` of the `residual: [n, d]`, which carries no graph.

    A residual that is the same for every token (up to rounding) has nothing to explain: 0.
    """
    total = variation(residual)
    constant = total <= torch.finfo(residual.dtype).eps * residual.square().sum()
    ratio = (upcast(guess) - residual).square().sum() / total.clamp_min(_FLOOR)
    return torch.where(constant, 0.0, ratio)
