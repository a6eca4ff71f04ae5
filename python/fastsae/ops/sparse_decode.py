"""Sparse activations times a dictionary: the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _autograd, _check, _flops, _tape, _vmap
from fastsae.types import SparseActs


def sparse_decode(
    acts: SparseActs,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    inactive_grad: bool = False,
    bf16_W_dec: Tensor | None = None,
) -> Tensor:
    """Return `sum_j values_j W_dec[indices_j] + b_dec` for every token.

    Args:
        acts: sparse activations of n tokens over d_sae latents; values in the dtype of `W_dec`, or
            in float32 for a 16-bit `W_dec`.
        W_dec: [d_sae, d_out], float32 | float64 | bfloat16 | float16; one row per latent.
        b_dec: [d_out] or None.
        inactive_grad: whether entries of value 0 get a gradient as well, which estimates of a step
            function need.
        bf16_W_dec: [d_sae, d_out], bfloat16, or None: a copy of a float32 `W_dec`. Its rows are
            read in place of those of `W_dec`; everything else remains float32.

    Returns:
        [n, d_out] in the dtype of `W_dec`.

    Raises:
        TypeError: an argument is not of the stated type or dtype.
        ValueError: shapes or devices do not fit.
        RuntimeError: an index is not in [0, d_sae) (CPU; on CUDA such an entry is ignored).

    Gradients:
        In `acts.values`, `W_dec` and `b_dec`; needs neither [n, d_sae] nor [n, k, d_out]. An entry
        whose value is exactly 0 is inactive and gets none, unless `inactive_grad`. Of any order, in
        reverse and forward mode, under `torch.func` and vmap. With `bf16_W_dec`, first ones in
        reverse mode alone: `W_dec` gets that of the rows that were read, and the copy none.

    Numerics:
        Accumulates in float32 (float64 for float64) in the order of the entries; deterministic
        whatever the number of threads. On a CPU, where more than a quarter of all entries are
        active (a fifth or a third in gradients), a matmul adds them, in an order of its own. Under
        autocast values, `W_dec` and `b_dec` are cast as those of `F.linear`.

    Cost:
        Reads one row of `W_dec`, or of its copy, per active entry.

    Source:
        Gao et al. (arXiv 2406.04093), appendix D, the sparse-dense matmul.
    """
    _check.acts("sparse_decode", acts)
    _check.dictionary("sparse_decode", W_dec, acts.d_sae)
    if b_dec is not None:
        _check.floating("sparse_decode", "b_dec", b_dec)
        _check.shape("sparse_decode", "b_dec", b_dec, (W_dec.shape[1],), "[d_out]")
    W_dec, values, b_dec = _check.autocast(W_dec, acts.values, b_dec)
    _check.values_of("sparse_decode", values, "W_dec", W_dec)
    if b_dec is not None:
        _check.same("sparse_decode", "b_dec", b_dec, "W_dec", W_dec)
    _check.bf16_copy("sparse_decode", bf16_W_dec, W_dec)
    if bf16_W_dec is None:
        bf16_W_dec = _tape.decoder_copy(W_dec)
    entries = (values, acts.indices, acts.offsets, W_dec)
    if inactive_grad:
        decode: Any = _autograd.decode_entries
        if _autograd.reverse_mode_alone():
            decode = _DecodeAll.apply
        decoded: Tensor = decode(*entries, bf16_W_dec)
        return decoded if b_dec is None else decoded + b_dec
    out: Tensor = torch.ops.fastsae.sparse_decode(*entries, b_dec, bf16_W_dec)
    return out


def rows_of(values: Tensor, offsets: Tensor | None) -> int:
    """Return the number of rows of a code with these values."""
    return values.shape[0] if offsets is None else offsets.shape[0] - 1


@fake("sparse_decode")
def _fake(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    bf16_W_dec: Tensor | None = None,
) -> Tensor:
    return W_dec.new_empty(rows_of(values, offsets), W_dec.shape[1])


@fallback("sparse_decode")
def _plain(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    bf16_W_dec: Tensor | None = None,
) -> Tensor:
    acts = SparseActs(values, indices, offsets, W_dec.shape[0])
    return reference.sparse_decode(acts, W_dec, b_dec, bf16_W_dec=bf16_W_dec)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, offsets, W_dec, _, bf16_W_dec = inputs
    ctx.save_for_backward(values, indices, offsets, W_dec, bf16_W_dec)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, offsets, W_dec, bf16_W_dec = ctx.saved_tensors
    _autograd.first_alone("sparse_decode", bf16_W_dec)
    need_values, _, _, need_W, need_b = ctx.needs_input_grad[:5]
    dvalues = dW = db = None
    if need_values:
        dvalues = torch.ops.fastsae.sparse_decode_values_grad(
            grad, values, indices, offsets, W_dec, bf16_W_dec
        )
    if need_W and not _tape.take_decoder(W_dec, values, indices, offsets, grad):
        dW = _autograd.weight_grad(values, indices, offsets, W_dec.shape[0], grad)[0]
    if need_b:
        db = grad.sum(0)
    return dvalues, None, None, dW, db, None


def _jvp(
    ctx: Any,
    values_t: Tensor | None,
    _: None,
    __: None,
    W_t: Tensor | None,
    b_t: Tensor | None,
    ___: None,
) -> Tensor | None:
    *entries, bf16_W_dec = ctx.saved_tensors
    _autograd.first_alone("sparse_decode", bf16_W_dec)
    return tangent(tuple(entries), values_t, W_t, b_t)


def tangent(
    entries: tuple[Any, ...], values_t: Tensor | None, W_t: Tensor | None, b_t: Tensor | None
) -> Tensor | None:
    """Return the tangent of a decoder's result; `entries`: its values, indices, offsets, W_dec."""
    values, indices, offsets, W_dec = entries
    by_values = by_W = by_bias = None
    if values_t is not None:
        moved = torch.where(values != 0, values_t, 0)
        by_values = _autograd.decode_entries(moved, indices, offsets, W_dec)
    if W_t is not None:
        by_W = torch.ops.fastsae.sparse_decode(values, indices, offsets, W_t, None)
    if b_t is not None:
        by_bias = b_t.expand(rows_of(values, offsets), -1)
    return _autograd.total(by_values, by_W, by_bias)


class _DecodeAll(torch.autograd.Function):
    """The decoder, whose entries of value 0 get a gradient as well.

    The same as `_autograd.decode_entries`, which `torch.func` can step through: faster, because it
    reads no row of `W_dec` for such an entry.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        indices: Tensor,
        offsets: Tensor | None,
        W_dec: Tensor,
        bf16_W_dec: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(values, indices, offsets, W_dec, bf16_W_dec)
        out: Tensor = torch.ops.fastsae.sparse_decode(
            values, indices, offsets, W_dec, None, bf16_W_dec
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, offsets, W_dec, bf16_W_dec = ctx.saved_tensors
        _autograd.first_alone("sparse_decode", bf16_W_dec)
        need_values, _, _, need_W, _ = ctx.needs_input_grad
        native, every = torch.ops.fastsae, torch.ones_like(values)
        dvalues = dW = None
        if need_values:
            dvalues = native.sparse_decode_values_grad(
                grad, every, indices, offsets, W_dec, bf16_W_dec
            )
        if need_W and not _tape.take_decoder(W_dec, values, indices, offsets, grad):
            # A second derivative needs the entries of value 0 too.
            listed = every if torch.is_grad_enabled() else values
            dW = _autograd.weight_grad(
                values, indices, offsets, W_dec.shape[0], grad, active=listed
            )[0]
        return dvalues, None, None, dW, None


_autograd.register("sparse_decode", setup_context=_setup_context, backward=_backward, jvp=_jvp)
_vmap.register("sparse_decode", rows=("values", "indices"))
_flops.register("sparse_decode", _flops.decode)
