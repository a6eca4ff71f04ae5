"""The gradient of the decoder in its values: one dot product per entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _autograd, _check, _flops, _vmap
from fastsae.types import SparseActs


def sparse_decode_values_grad(
    grad: Tensor, acts: SparseActs, W_dec: Tensor, *, bf16_W_dec: Tensor | None = None
) -> Tensor:
    """Return `<grad[row], W_dec[index]>` for every active entry, 0 for the others.

    That is the gradient of `sparse_decode` in `acts.values` when `grad` is that of its result. With
    `W_enc` in the place of `W_dec` and x in that of `grad`, it is the pre-activations of a given
    choice of latents.

    Args:
        grad: [n, d_out], the dtype of `W_dec`.
        acts: which entries; of a value it only matters whether it is 0. In the dtype of `W_dec`, or
            in float32 for a 16-bit `W_dec`.
        W_dec: [d_sae, d_out], float32 | float64 | bfloat16 | float16; one row per latent.
        bf16_W_dec: [d_sae, d_out], bfloat16, or None: a copy of a float32 `W_dec`. Its rows are
            read in place of those of `W_dec`; everything else remains float32.

    Returns:
        The shape and dtype of `acts.values`.

    Raises:
        TypeError: an argument is not of the stated type or dtype.
        ValueError: shapes or devices do not fit.
        RuntimeError: an index is not in [0, d_sae) (CPU; on CUDA such an entry is ignored).

    Gradients:
        In `grad` and `W_dec`; `acts.values` have none here, they only say what is active. Of any
        order, in reverse and forward mode, under `torch.func` and vmap. With `bf16_W_dec`, first
        ones in reverse mode alone, as those of `sparse_decode`.

    Numerics:
        Accumulates in float32 (float64 for float64); deterministic whatever the number of threads.
        Under autocast `grad`, values and `W_dec` are cast as those of `F.linear`.

    Cost:
        Reads one row of `W_dec`, or of its copy, per active entry: 2 d_out flops each.
    """
    op = "sparse_decode_values_grad"
    _check.acts(op, acts)
    _check.dictionary(op, W_dec, acts.d_sae)
    _check.floating(op, "grad", grad)
    _check.shape(op, "grad", grad, (acts.n, W_dec.shape[1]), "[n, d_out]")
    W_dec, values, grad = _check.autocast(W_dec, acts.values, grad)
    _check.values_of(op, values, "W_dec", W_dec)
    _check.same(op, "grad", grad, "W_dec", W_dec)
    _check.bf16_copy(op, bf16_W_dec, W_dec)
    out: Tensor = torch.ops.fastsae.sparse_decode_values_grad(
        grad, values, acts.indices, acts.offsets, W_dec, bf16_W_dec
    )
    return out


@fake("sparse_decode_values_grad")
def _fake(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    bf16_W_dec: Tensor | None = None,
) -> Tensor:
    return values.new_empty(values.shape)


@fallback("sparse_decode_values_grad")
def _plain(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    bf16_W_dec: Tensor | None = None,
) -> Tensor:
    acts = SparseActs(values, indices, offsets, W_dec.shape[0])
    return reference.sparse_decode_values_grad(grad, acts, W_dec, bf16_W_dec=bf16_W_dec)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, values, indices, offsets, W_dec, bf16_W_dec = ctx.saved_tensors
    _autograd.first_alone("sparse_decode_values_grad", bf16_W_dec)
    need_rows, _, _, _, need_W = ctx.needs_input_grad[:5]
    u = torch.where(values != 0, grad, 0)
    drows = dW = None
    if need_rows:
        drows = _autograd.decode_entries(u, indices, offsets, W_dec, bf16_W_dec)
    if need_W:
        lists = torch.ops.fastsae.group_by_latent(values, indices, offsets, W_dec.shape[0])
        dW = torch.ops.fastsae.sparse_weight_grad(u, *lists, rows)[0]
    return drows, None, None, None, dW, None


def _jvp(
    ctx: Any, rows_t: Tensor | None, _: Any, __: None, ___: None, W_t: Tensor | None, ____: None
) -> Tensor | None:
    rows, values, indices, offsets, W_dec, bf16_W_dec = ctx.saved_tensors
    _autograd.first_alone("sparse_decode_values_grad", bf16_W_dec)
    entries, dot = (values, indices, offsets), torch.ops.fastsae.sparse_decode_values_grad
    return _autograd.total(
        None if rows_t is None else dot(rows_t, *entries, W_dec),
        None if W_t is None else dot(rows, *entries, W_t),
    )


_autograd.register(
    "sparse_decode_values_grad", setup_context=_setup_context, backward=_backward, jvp=_jvp
)
_vmap.register("sparse_decode_values_grad", rows=("grad", "values", "indices"))
_flops.register("sparse_decode_values_grad", _flops.values_grad)
