"""The pieces of the training loss: what a step returns, and ratios of squared errors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastsae.nn.parallel import ALONE, Parallel
from fastsae.types import SparseActs

_FLOOR = 1e-20  # keeps a ratio finite where a batch has no variance


@dataclass
class SAEOutput:
    """What `SAE.loss` returns; every scalar is a tensor `[]` in float32 (float64 for float64)."""

    loss: Tensor
    """`fvu + auxk_alpha * aux_loss + sparsity_loss`: the number to call backward on."""
    reconstruction: Tensor
    """x_hat, with the shape of the target; `loss` depends on it in the graph, but in a step of the
    fused update, where it may come with the error from one op."""
    acts: SparseActs
    """The sparse code of the batch, leading dimensions flattened; carries the graph."""
    fvu: Tensor
    """Fraction of variance unexplained in this batch: sum e^2 / sum (x - mean x)^2."""
    mse: Tensor
    """Squared error summed over d_in, mean over tokens; in squared units of x. Detached."""
    aux_loss: Tensor
    """Fraction of the residual's variance that dead latents leave; 0 where there are none."""
    sparsity_loss: Tensor
    """The weighted penalty on the code; 0 for classes whose selection bounds its size."""


def _flatten(out: SAEOutput) -> tuple[list[Any], None]:
    return [getattr(out, field.name) for field in fields(out)], None


def _unflatten(leaves: Any, _: None) -> SAEOutput:
    return SAEOutput(*leaves)


pytree.register_pytree_node(
    SAEOutput, _flatten, _unflatten, serialized_type_name="fastsae.SAEOutput"
)


def upcast(x: Tensor) -> Tensor:
    """Return `x` in the dtype that statistics are kept in: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def squared_error(target: Tensor, prediction: Tensor) -> Tensor:
    """Return the sum of (prediction - target)^2, in float32 or float64."""
    return error_of(target, prediction).square().sum()


def error_of(target: Tensor, prediction: Tensor) -> Tensor:
    """Return prediction - target in the shape of the target, in float32 or float64.

    This way round, so that its gradient is that of the prediction, not its negative.
    """
    return upcast(prediction).reshape(target.shape) - upcast(target)


def fvu(squared: Tensor, target: Tensor, parallel: Parallel = ALONE) -> Tensor:
    """Return `squared` error over the total variance of `target`; huge where all rows are equal.

    Args:
        squared: of the whole batch.
        target: [..., d], of the tokens here.
        parallel: who has others.
    """
    return squared / parallel.total_variance(target).clamp_min(_FLOOR)


def fvu_of_error(prediction: Tensor, error: Tensor, parallel: Parallel = ALONE) -> Tensor:
    """Return the same for a `prediction` of what is missing, -error: [n, d], without a graph.

    An error that is the same for every token (up to rounding) has nothing to explain: 0.
    """
    total = parallel.total_variance(error)
    size = parallel.sum_over_tokens(error.square().sum())
    constant = total <= torch.finfo(error.dtype).eps * size
    squared = parallel.sum_over_tokens((error + upcast(prediction)).square().sum())
    ratio = squared / total.clamp_min(_FLOOR)
    return torch.where(constant, 0.0, ratio)
