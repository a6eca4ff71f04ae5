"""The gradient of a dictionary from feature-major lists: sparse activations^T times a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _check
from fastsae.types import LatentLists, accumulator_dtype


def sparse_weight_grad(values: Tensor, lists: LatentLists, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `weight[f] = sum values[slot] x[row]` and `bias[f] = sum values[slot]` over f's list.

    With the activations as `values` and the gradient of the output as `x` this is the gradient of
    `W_dec`; with the gradient of the activations and the encoder's input, that of `W_enc` and
    `b_enc`.

    Args:
        values: any shape, in the dtype of `x` or float32 for a 16-bit `x`; `lists.slots` index
            into it flattened.
        lists: from `group_by_latent`.
        x: [n, d], float32 | float64 | bfloat16 | float16.

    Returns:
        weight [d_sae, d] and bias [d_sae] in the dtype of `x`; rows of silent latents are 0.

    Raises:
        TypeError: an argument is not of the stated type or dtype.
        ValueError: `x` is not a matrix, or devices differ.
        RuntimeError: a row or slot is out of range (CPU; on CUDA such an entry takes no part).

    Numerics:
        Accumulates in float32 (float64 for float64), tokens ascending; bitwise repeatable whatever
        the number of threads.

    Cost:
        Reads one row of `x` per entry and writes [d_sae, d] once.
    """
    _check.floating("sparse_weight_grad", "x", x)
    _check.floating("sparse_weight_grad", "values", values)
    if not isinstance(lists, LatentLists):
        raise TypeError(
            f"sparse_weight_grad: expected lists to be LatentLists, got {type(lists).__name__}"
        )
    if x.ndim != 2:
        raise ValueError(f"sparse_weight_grad: expected x to be [n, d], got {list(x.shape)}")
    if values.device != x.device:
        raise ValueError(
            f"sparse_weight_grad: expected values on the device of x, {x.device}, "
            f"got {values.device}"
        )
    if values.dtype not in (x.dtype, accumulator_dtype(x.dtype)):
        raise TypeError(
            f"sparse_weight_grad: expected values to have the dtype of x, {x.dtype}, or "
            f"{accumulator_dtype(x.dtype)}, got {values.dtype}"
        )
    weight, bias = torch.ops.fastsae.sparse_weight_grad(values, *lists, x)
    return weight, bias


@fake("sparse_weight_grad")
def _fake(
    values: Tensor, offsets: Tensor, rows: Tensor, slots: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    d_sae = offsets.shape[0] - 1
    return x.new_empty(d_sae, x.shape[1]), x.new_empty(d_sae)


@fallback("sparse_weight_grad")
def _plain(
    values: Tensor, offsets: Tensor, rows: Tensor, slots: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    return reference.sparse_weight_grad(values, LatentLists(offsets, rows, slots), x)
