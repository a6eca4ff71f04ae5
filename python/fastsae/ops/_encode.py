"""What the encode ops share: argument checks, and derivatives from the selected entries alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.ops import _autograd, _check, _tape
from fastsae.ops._matmul import where_active
from fastsae.types import SparseActs, is_plain


class EncodeInput(NamedTuple):
    """Checked arguments of an encode op, `x` flattened to [n, d_in]."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor | None
    b_dec: Tensor | None
    bf16_product: bool
    out_dtype: torch.dtype
    """Of the values."""


def check(
    op: str,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    mask: Tensor | None,
    select_dtype: torch.dtype | None,
    compute_dtype: torch.dtype | None,
) -> EncodeInput:
    """Check the arguments that every encode op has; cast them as autocast and select_dtype say."""
    _check.floating(op, "x", x)
    _check.floating(op, "W_enc", W_enc)
    if W_enc.ndim != 2:
        raise ValueError(f"{op}: expected W_enc to be [d_sae, d_in], got {list(W_enc.shape)}")
    d_sae, d_in = W_enc.shape
    if x.ndim == 0 or x.shape[-1] != d_in:
        raise ValueError(
            f"{op}: expected x to be [..., d_in] with d_in = {d_in}, got {list(x.shape)}"
        )
    for name, bias, size, meaning in (
        ("b_enc", b_enc, d_sae, "[d_sae]"),
        ("b_dec", b_dec, d_in, "[d_in]"),
    ):
        if bias is not None:
            _check.floating(op, name, bias)
            _check.shape(op, name, bias, (size,), meaning)
    bf16_product = _check.rounds_to_bf16(op, compute_dtype, "x", x)
    x, W_enc, b_enc, b_dec = _check.autocast(x, W_enc, b_enc, b_dec)
    _check.same(op, "W_enc", W_enc, "x", x)
    for name, bias in (("b_enc", b_enc), ("b_dec", b_dec)):
        if bias is not None:
            _check.same(op, name, bias, "x", x)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{op}: expected mask to be a bool Tensor, got {got}")
        _check.shape(op, "mask", mask, (d_sae,), "[d_sae]")
        if mask.device != x.device:
            raise ValueError(
                f"{op}: expected mask on the device of x, {x.device}, got {mask.device}"
            )
    x = x.reshape(-1, d_in)
    if select_dtype is None or select_dtype == x.dtype:
        bf16_product = bf16_product and x.dtype == torch.float32
        return EncodeInput(x, W_enc, b_enc, b_dec, bf16_product, x.dtype)
    if select_dtype != torch.float32 or x.dtype == torch.float64:
        raise ValueError(
            f"{op}: expected select_dtype to be None, float32 or the dtype of x, {x.dtype}, "
            f"got {select_dtype}"
        )
    return EncodeInput(
        x.float(),
        W_enc.float(),
        None if b_enc is None else b_enc.float(),
        None if b_dec is None else b_dec.float(),
        False,
        x.dtype,
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save inputs and the selected entries; never anything of size [n, d_sae]."""
    x, W_enc, b_enc, b_dec = inputs[:4]
    offsets = output[2] if len(output) > 2 else None
    ctx.has_bias = b_enc is not None
    ctx.b_enc = b_enc if _tape.of(W_enc) else None
    ctx.save_for_backward(x, W_enc, b_dec, output[0], output[1], offsets)


def attachable(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> bool:
    """Return whether `attach` does what the ops do: eagerly, in reverse mode, without autocast."""
    kind = x.device.type
    if not _autograd.reverse_mode_alone() or kind not in ("cpu", "cuda"):
        return False
    if torch.is_autocast_enabled(kind):
        return False
    return all(is_plain(t) for t in (x, W_enc, b_enc, b_dec) if t is not None)


def attach(
    acts: SparseActs, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None
) -> SparseActs:
    """Return the code `acts`, which has no graph, with the gradients that an encode op gives.

    Its values are entries of `(x - b_dec) W_enc^T + b_enc`, found in any way, or 0, and are
    taken over. Only where `attachable`.
    """
    if not torch.is_grad_enabled():
        return acts
    values = acts.values.clone() if acts.values._is_view() else acts.values
    values = _Attached.apply(x, W_enc, b_enc, b_dec, values, acts.indices, acts.offsets)  # type: ignore[no-untyped-call]
    return SparseActs(values, acts.indices, acts.offsets, acts.d_sae)


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        values: Tensor = inputs[4]
        ctx.mark_dirty(values)
        setup_context(ctx, inputs[:4], inputs[4:])
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *gradients(ctx, grads[0]), None, None, None


def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients in x, W_enc, b_enc, b_dec from that of the selected values.

    With g the gradient of the values, 0 where a value is 0:
        dW_enc[f] = sum over the entries of f of g (x - b_dec)[row],  db_enc[f] = sum of g,
        dx[n] = sum over the entries of n of g W_enc[index],  db_dec = -W_enc^T db_enc.
    """
    x, W_enc, b_dec, values, indices, offsets = ctx.saved_tensors
    need_x, need_W, need_b_enc, need_b_dec = ctx.needs_input_grad[:4]
    grad = where_active(values, grad)
    dx = dW = db_enc = db_dec = None
    if need_x:
        dx = _autograd.decode_entries(grad, indices, offsets, W_enc)
    every = need_W and need_b_enc and need_b_dec is (b_dec is not None)
    if every and _tape.take_encoder(W_enc, ctx.b_enc, b_dec, grad, indices, offsets, x, values):
        pass
    elif need_W or need_b_enc or need_b_dec:
        centered = x if b_dec is None else x - b_dec
        dW, db = _autograd.weight_grad(
            grad, indices, offsets, W_enc.shape[0], centered, active=values
        )
        db_enc = db if need_b_enc and ctx.has_bias else None
        if need_b_dec and b_dec is not None:
            db_dec = -(db @ W_enc)
        if not need_W:
            dW = None
    return dx, dW, db_enc, db_dec


def tangent(
    ctx: Any,
    x_t: Tensor | None,
    W_t: Tensor | None,
    b_enc_t: Tensor | None,
    b_dec_t: Tensor | None,
) -> Tensor | None:
    """Return the tangent of the selected values, 0 where a value is 0.

    Of entry (n, f): <x_t - b_dec_t, W_enc[f]> + <x - b_dec, W_t[f]> + b_enc_t[f].
    """
    x, W_enc, b_dec, values, indices, offsets = ctx.saved_tensors
    entries, dot = (values, indices, offsets), torch.ops.fastsae.sparse_decode_values_grad
    moved = _autograd.total(x_t, None if b_dec_t is None else (-b_dec_t).expand_as(x))
    by_x = by_W = by_bias = None
    if moved is not None:
        by_x = dot(moved, *entries, W_enc)
    if W_t is not None:
        by_W = dot(x if b_dec is None else x - b_dec, *entries, W_t)
    if b_enc_t is not None:
        by_bias = torch.where(values != 0, b_enc_t[indices.long()], 0)
    return _autograd.total(by_x, by_W, by_bias)
