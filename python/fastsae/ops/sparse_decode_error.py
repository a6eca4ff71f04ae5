"""The decoder, its squared error, and what the gradients of that need, from one gather."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _autograd, _check, _flops, _tape, _vmap
from fastsae.ops.sparse_decode import rows_of, tangent
from fastsae.types import DecodeError, SparseActs, accumulator_dtype, owners


def sparse_decode_error(
    acts: SparseActs,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    *,
    bf16_W_dec: Tensor | None = None,
) -> DecodeError:
    """Return `sparse_decode`, its error against a target, and the squared error of every token.

    The gradient of a squared error in the values is twice the product of the error with the rows
    that have just been added up, so it is computed while these are in the cache: the backward
    gathers nothing.

        error   = sparse_decode(acts, W_dec, b_dec) - target
        squared = sum error^2 of each row
        products = <error[row], W_dec[index]> of every active entry

    Args:
        acts: sparse activations of n tokens over d_sae latents; values in the dtype of `W_dec`, or
            in float32 for a 16-bit `W_dec`.
        W_dec: [d_sae, d_out], float32 | float64 | bfloat16 | float16; one row per latent.
        b_dec: [d_out] or None.
        target: [n, d_out], the dtype of `W_dec`.
        bf16_W_dec: [d_sae, d_out], bfloat16, or None: a copy of a float32 `W_dec`. Its rows are
            read in place of those of `W_dec`; everything else remains float32.

    Returns:
        `DecodeError(reconstruction, error, squared, products)`: [n, d_out] in the dtype of `W_dec`;
        [n, d_out], [n] and the shape of `acts.values` in float32 (float64 for float64).

    Raises:
        TypeError: an argument is not of the stated type or dtype.
        ValueError: shapes or devices do not fit.
        RuntimeError: an index is not in [0, d_sae) (CPU; on CUDA such an entry is ignored).

    Gradients:
        Of `reconstruction`, `error` and `squared` in `acts.values`, `W_dec`, `b_dec` and `target`;
        `products` have none. An entry whose value is exactly 0 is inactive and gets none. Of any
        order, in reverse and forward mode, under `torch.func` and vmap. Where only `squared` is
        used and nobody differentiates again, that of the values is made of `products`; otherwise
        it takes another gather. With `bf16_W_dec`, first ones in reverse mode alone, as those of
        `sparse_decode`.

    Numerics:
        `reconstruction` has the bits of `sparse_decode`, other than where that multiplies matrices.
        `error` is of what was rounded to the dtype of `W_dec`, and `products` of the error rounded
        to it. Accumulates in float32 (float64 for float64), in an order that depends on shapes
        alone; deterministic whatever the number of threads. Under autocast values, `W_dec`,
        `b_dec` and `target` are cast as those of `F.linear`.

    Cost:
        Reads one row of `W_dec`, or of its copy, per active entry from memory, and again from a
        cache.

    Source:
        The gradient of a sum of squares.
    """
    op = "sparse_decode_error"
    _check.acts(op, acts)
    _check.dictionary(op, W_dec, acts.d_sae)
    _check.floating(op, "target", target)
    _check.shape(op, "target", target, (acts.n, W_dec.shape[1]), "[n, d_out]")
    if b_dec is not None:
        _check.floating(op, "b_dec", b_dec)
        _check.shape(op, "b_dec", b_dec, (W_dec.shape[1],), "[d_out]")
    W_dec, values, b_dec, target = _check.autocast(W_dec, acts.values, b_dec, target)
    _check.values_of(op, values, "W_dec", W_dec)
    _check.same(op, "target", target, "W_dec", W_dec)
    if b_dec is not None:
        _check.same(op, "b_dec", b_dec, "W_dec", W_dec)
    _check.bf16_copy(op, bf16_W_dec, W_dec)
    if bf16_W_dec is None:
        bf16_W_dec = _tape.decoder_copy(W_dec)
    found = torch.ops.fastsae.sparse_decode_error(
        values, acts.indices, acts.offsets, W_dec, b_dec, target, bf16_W_dec
    )
    return DecodeError(*found)


@fake("sparse_decode_error")
def _fake(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    bf16_W_dec: Tensor | None = None,
) -> tuple[Tensor, ...]:
    n, d = rows_of(values, offsets), W_dec.shape[1]
    acc = accumulator_dtype(W_dec.dtype)
    return (
        W_dec.new_empty(n, d),
        W_dec.new_empty(n, d, dtype=acc),
        W_dec.new_empty(n, dtype=acc),
        values.new_empty(values.shape, dtype=acc),
    )


@fallback("sparse_decode_error")
def _plain(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    bf16_W_dec: Tensor | None = None,
) -> tuple[Tensor, ...]:
    acts = SparseActs(values, indices, offsets, W_dec.shape[0])
    found = reference.sparse_decode_error(acts, W_dec, b_dec, target, bf16_W_dec=bf16_W_dec)
    return tuple(found)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, error, _, products = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(products)
    ctx.save_for_backward(*inputs[:4], error, products, inputs[6])


def _backward(
    ctx: Any, g_out: Tensor | None, g_error: Tensor | None, g_squared: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    values, indices, offsets, W_dec, error, products, bf16_W_dec = ctx.saved_tensors
    _autograd.first_alone("sparse_decode_error", bf16_W_dec)
    need_values, _, _, need_W, need_b, need_target = ctx.needs_input_grad[:6]
    by_square = None if g_squared is None else error * (2 * g_squared).unsqueeze(1)
    by_error = _autograd.total(g_error, by_square)
    narrow = None if by_error is None else by_error.to(W_dec.dtype)
    grad = _autograd.total(g_out, narrow)
    if grad is None:
        return (None,) * 7
    dvalues = dW = db = dtarget = None
    if need_values and g_out is None and g_error is None and not _autograd.watched():
        assert g_squared is not None
        dvalues = (products * _of_entries(2 * g_squared, offsets, products)).to(values.dtype)
    elif need_values:
        dvalues = torch.ops.fastsae.sparse_decode_values_grad(
            grad, values, indices, offsets, W_dec, bf16_W_dec
        )
    if need_W and not _tape.take_decoder(W_dec, values, indices, offsets, grad):
        dW = _autograd.weight_grad(values, indices, offsets, W_dec.shape[0], grad)[0]
    if need_b:
        db = grad.sum(0)
    if need_target and narrow is not None:
        dtarget = -narrow
    return dvalues, None, None, dW, db, dtarget, None


def _of_entries(rows: Tensor, offsets: Tensor | None, like: Tensor) -> Tensor:
    """Return the number of its row for every entry, 0 for padding: broadcasts to `like`."""
    if offsets is None:
        return rows.unsqueeze(1)
    return pad(rows, (0, 1)).index_select(0, owners(offsets, like.shape[0]))


def _jvp(
    ctx: Any,
    values_t: Tensor | None,
    _: None,
    __: None,
    W_t: Tensor | None,
    b_t: Tensor | None,
    target_t: Tensor | None,
    ___: None,
) -> tuple[Tensor | None, ...]:
    *entries, error, _products, bf16_W_dec = ctx.saved_tensors
    _autograd.first_alone("sparse_decode_error", bf16_W_dec)
    moved = tangent(tuple(entries), values_t, W_t, b_t)
    if moved is None:
        moved = torch.zeros_like(error, dtype=entries[3].dtype)
    away = moved.to(error.dtype)
    if target_t is not None:
        away = away - target_t.to(error.dtype)
    return moved, away, 2 * (error * away).sum(1), None


_autograd.register(
    "sparse_decode_error", setup_context=_setup_context, backward=_backward, jvp=_jvp
)
_vmap.register("sparse_decode_error", rows=("values", "indices", "target"))
_flops.register("sparse_decode_error", _flops.decode_error)
