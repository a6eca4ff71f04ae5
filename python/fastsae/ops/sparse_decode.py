"""Sparse activations times a dictionary: the decoder, and the gradient of its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _check
from fastsae.types import SparseActs, accumulator_dtype


def sparse_decode(acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Return `sum_j values_j W_dec[indices_j] + b_dec` for every token.

    Args:
        acts: sparse activations of n tokens over d_sae latents; values in the dtype of `W_dec`, or
            in float32 for a 16-bit `W_dec`.
        W_dec: [d_sae, d_out], float32 | float64 | bfloat16 | float16; one row per latent.
        b_dec: [d_out] or None.

    Returns:
        [n, d_out] in the dtype of `W_dec`.

    Raises:
        TypeError: an argument is not of the stated type or dtype.
        ValueError: shapes or devices do not fit.
        RuntimeError: an index is not in [0, d_sae) (CPU; on CUDA such an entry takes no part).

    Gradients:
        In `acts.values`, `W_dec` and `b_dec`; needs neither [n, d_sae] nor [n, k, d_out]. An entry
        whose value is exactly 0 is inactive and gets none.

    Numerics:
        Accumulates in float32 (float64 for float64) in the order of the entries; deterministic
        whatever the number of threads.

    Cost:
        Reads one row of `W_dec` per active entry.

    Source:
        Gao et al. (arXiv 2406.04093), appendix D, the sparse-dense product.
    """
    if not isinstance(acts, SparseActs):
        raise TypeError(f"sparse_decode: expected acts to be SparseActs, got {type(acts).__name__}")
    _check.floating("sparse_decode", "W_dec", W_dec)
    if W_dec.ndim != 2 or W_dec.shape[0] != acts.d_sae:
        raise ValueError(
            f"sparse_decode: expected W_dec to be [d_sae, d_out] with d_sae = {acts.d_sae}, "
            f"got {list(W_dec.shape)}"
        )
    values = acts.values
    if values.dtype not in (W_dec.dtype, accumulator_dtype(W_dec.dtype)):
        raise TypeError(
            f"sparse_decode: expected values to have the dtype of W_dec, {W_dec.dtype}, or "
            f"{accumulator_dtype(W_dec.dtype)}, got {values.dtype}"
        )
    if values.device != W_dec.device:
        raise ValueError(
            f"sparse_decode: expected values on the device of W_dec, {W_dec.device}, "
            f"got {values.device}"
        )
    if b_dec is not None:
        _check.floating("sparse_decode", "b_dec", b_dec)
        _check.shape("sparse_decode", "b_dec", b_dec, (W_dec.shape[1],), "[d_out]")
        _check.same("sparse_decode", "b_dec", b_dec, "W_dec", W_dec)
    out: Tensor = torch.ops.fastsae.sparse_decode(values, acts.indices, acts.offsets, W_dec, b_dec)
    return out


def _rows(values: Tensor, offsets: Tensor | None) -> int:
    return values.shape[0] if offsets is None else offsets.shape[0] - 1


@fake("sparse_decode")
def _fake(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
) -> Tensor:
    return W_dec.new_empty(_rows(values, offsets), W_dec.shape[1])


@fallback("sparse_decode")
def _plain(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
) -> Tensor:
    return reference.sparse_decode(
        SparseActs(values, indices, offsets, W_dec.shape[0]), W_dec, b_dec
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, offsets, W_dec, _ = inputs
    ctx.save_for_backward(values, indices, offsets, W_dec)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, offsets, W_dec = ctx.saved_tensors
    need_values, _, _, need_W, need_b = ctx.needs_input_grad
    dvalues = dW = db = None
    if need_values:
        dvalues = torch.ops.fastsae.sparse_decode_values_grad(grad, values, indices, offsets, W_dec)
    if need_W:
        lists = torch.ops.fastsae.group_by_latent(values, indices, offsets, W_dec.shape[0])
        dW = torch.ops.fastsae.sparse_weight_grad(values, *lists, grad)[0]
    if need_b:
        db = grad.sum(0)
    return dvalues, None, None, dW, db


torch.library.register_autograd("fastsae::sparse_decode", _backward, setup_context=_setup_context)


@fake("sparse_decode_values_grad")
def _fake_values_grad(
    grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor
) -> Tensor:
    return values.new_empty(values.shape)


@fallback("sparse_decode_values_grad")
def _plain_values_grad(
    grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor
) -> Tensor:
    acc = accumulator_dtype(W_dec.dtype)
    acts = SparseActs(values, indices, offsets, W_dec.shape[0])
    rows = acts.rows()
    active = (values != 0) & (rows < acts.n)
    if acts.n == 0:
        return torch.zeros_like(values)
    picked = W_dec[indices.long()].to(acc) * grad[rows.clamp(max=acts.n - 1)].to(acc)
    return torch.where(active, picked.sum(-1), 0).to(values.dtype)
