"""The gradient of a dictionary from feature-major lists: sparse activations^T times a matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _autograd, _check, _flops, _vmap
from fastsae.types import LatentLists, owners


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
        weight [d_sae, d] and bias [d_sae] in the dtype of `x`; rows without entries
        are 0.

    Raises:
        TypeError: an argument is not of the stated type or dtype.
        ValueError: `x` is not a matrix, or devices differ.
        RuntimeError: a row or slot is out of range (CPU; on CUDA such an entry is ignored).

    Gradients:
        In `values` and `x`, for every entry of the lists, values of 0 too. Of any order, in reverse
        and forward mode, under `torch.func` and vmap.

    Numerics:
        Accumulates in float32 (float64 for float64), tokens ascending; bitwise repeatable whatever
        the number of threads. Under autocast `values` and `x` are cast as those of `F.linear`.

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
    x, values = _check.autocast(x, values)
    _check.values_of("sparse_weight_grad", values, "x", x)
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients in `values` and `x`.

    The lists are a sparse matrix [d_sae, n] in the variable layout, all entries of which count:
    `offsets` its offsets and `rows` its indices.
    """
    values, offsets, rows, slots, x = ctx.saved_tensors
    native, need_values, need_x = (
        torch.ops.fastsae,
        ctx.needs_input_grad[0],
        ctx.needs_input_grad[4],
    )
    all_of = torch.ones(rows.shape, dtype=values.dtype, device=values.device)
    dvalues = dx = None
    if need_values:
        latent = owners(offsets, rows.shape[0])  # d_sae for padding
        by_entry = native.sparse_decode_values_grad(grad, all_of, rows, offsets, x)
        by_entry = by_entry + torch.nn.functional.pad(grad_bias, (0, 1))[latent].to(values.dtype)
        # Padding adds 0 to slot 0.
        flat = by_entry.new_zeros(values.numel())
        dvalues = flat.index_add(0, slots, by_entry) if values.numel() else flat
        dvalues = dvalues.view(values.shape)
    if need_x:
        back = native.group_by_latent(all_of, rows, offsets, x.shape[0])
        in_lists = values.flatten()[slots] if values.numel() else all_of
        dx = native.sparse_weight_grad(in_lists, *back, grad)[0]
    return dvalues, None, None, None, dx


def _jvp(
    ctx: Any, values_t: Tensor | None, _: None, __: None, ___: None, x_t: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    values, offsets, rows, slots, x = ctx.saved_tensors
    lists, native = (offsets, rows, slots), torch.ops.fastsae
    by_values: tuple[Tensor | None, ...] = (None, None)
    if values_t is not None:
        by_values = native.sparse_weight_grad(values_t, *lists, x)
    by_x = None if x_t is None else native.sparse_weight_grad(values, *lists, x_t)[0]
    return _autograd.total(by_values[0], by_x), by_values[1]


_autograd.register("sparse_weight_grad", setup_context=_setup_context, backward=_backward, jvp=_jvp)
_vmap.register("sparse_weight_grad")
_flops.register("sparse_weight_grad", _flops.weight_grad)
