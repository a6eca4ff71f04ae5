"""The encoder of gradient SAEs: TopK by value and by effect on what reads the activation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _autograd, _check, _encode, _flops, _vmap
from fastsae.types import TopK


def encode_gradient_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    grad: Tensor,
    W_dec: Tensor,
    beta: float = 1.0,
    normalize: bool = True,
    b_dec: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> TopK:
    """Return relu(z) where a score of value and effect is among the k largest of its row.

        score = relu(z) (1 + beta a),   z = (x - b_dec) W_enc^T + b_enc
        a     = |e|,   e = grad W_dec^T;   over the mean of |e| in the row if `normalize`

    Args:
        x: [..., d_in], float32 | float64 | bfloat16 | float16.
        W_enc: [d_sae, d_in], the dtype of `x`; one row per latent, contiguous.
        b_enc: [d_sae] or None.
        k: entries per row, 1 <= k <= d_sae.
        grad: [..., d_out], gradient of a loss in what W_dec writes, as many rows as `x`.
        W_dec: [d_sae, d_out], the dtype of `x`.
        beta: weight of the effect, positive and finite.
        normalize: whether effects are relative to their mean, so that the unit of `grad` does not
            matter. Without any effect in a row, values alone decide.
        b_dec: [d_in] or None, subtracted from `x` first.
        compute_dtype: as in `encode_topk`, of both matmuls.

    Returns:
        `TopK(values [..., k], indices [..., k])` in ascending index: the dtype of `x`, and int32.

    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ.
        ValueError: a shape, a device, `k` or `beta` is not as stated.

    Gradients:
        In `x`, `W_enc`, `b_enc` and `b_dec` as those of `encode_topk`; none in `grad` and `W_dec`,
        which only select.

    Numerics:
        Both products are sums in float32 (float64 for float64), selected on before they are
        rounded; the score is computed as relu(z) (mean / beta + |e|), which orders a row alike.
        Ties go to the lowest index, NaN is the largest. Autocast as in `encode_topk`, also of
        `grad` and `W_dec`.

    Cost:
        2 n (d_in + d_out) d_sae flops; W_enc and W_dec are read once per up to 512 rows of x and
        thread; 20 MiB per thread of e, or 64 rows of it if these are more.

    Source:
        Olmo et al., "Features that make a difference" (arXiv 2411.10397); normalizing is ours.
    """
    op = "encode_gradient_topk"
    a = _encode.check(op, x, W_enc, b_enc, b_dec, None, None, compute_dtype)
    _check.k_in_range(op, k, W_enc.shape[0])
    _check.dictionary(op, W_dec, W_enc.shape[0])
    _check.floating(op, "grad", grad)
    if grad.ndim == 0 or grad.shape != (*x.shape[:-1], W_dec.shape[1]):
        wanted = [*x.shape[:-1], W_dec.shape[1]]
        raise ValueError(f"{op}: expected grad to be {wanted}, got {list(grad.shape)}")
    if not isinstance(beta, int | float):
        raise TypeError(f"{op}: expected beta to be a number, got {type(beta).__name__}")
    if not 0 < beta < math.inf:
        raise ValueError(f"{op}: expected 0 < beta < inf, got {beta}")
    grad, W_dec = _check.autocast(grad.detach(), W_dec.detach())
    _check.same(op, "grad", grad, "x", a.x)
    _check.same(op, "W_dec", W_dec, "x", a.x)
    values, indices = torch.ops.fastsae.encode_gradient_topk(
        a.x,
        a.W_enc,
        a.b_enc,
        a.b_dec,
        grad.reshape(-1, W_dec.shape[1]),
        W_dec,
        k,
        beta,
        normalize,
        a.bf16_product,
    )
    shape = (*x.shape[:-1], k)
    return TopK(values.view(shape), indices.view(shape))


@fake("encode_gradient_topk")
def _fake(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    grad: Tensor,
    W_dec: Tensor,
    k: int,
    beta: float,
    normalize: bool,
    bf16_product: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


@fallback("encode_gradient_topk")
def _plain(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    grad: Tensor,
    W_dec: Tensor,
    k: int,
    beta: float,
    normalize: bool,
    bf16_product: bool,
) -> tuple[Tensor, ...]:
    found = reference.encode_gradient_topk(
        x,
        W_enc,
        b_enc,
        k,
        grad=grad,
        W_dec=W_dec,
        beta=beta,
        normalize=normalize,
        b_dec=b_dec,
    )
    return tuple(found)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_encode.gradients(ctx, grad), *[None] * 6


def _jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    return _encode.tangent(ctx, *tangents[:4]), None


def _flop_count(
    x: _flops.Shape,
    W_enc: _flops.Shape,
    b_enc: Any,
    b_dec: Any,
    grad: _flops.Shape,
    W_dec: _flops.Shape,
    *_: Any,
    **__: Any,
) -> int:
    return _flops.encode(x, W_enc) + _flops.encode(grad, W_dec)


_autograd.register(
    "encode_gradient_topk", setup_context=_encode.setup_context, backward=_backward, jvp=_jvp
)
_vmap.register("encode_gradient_topk", rows=("x", "grad"))
_flops.register("encode_gradient_topk", _flop_count)
