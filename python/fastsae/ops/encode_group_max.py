"""The GroupMax encoder: a linear layer and the largest of each of k groups of latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _autograd, _check, _encode, _flops, _vmap
from fastsae.types import TopK


def encode_group_max(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    b_dec: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> TopK:
    """Return relu of the largest of each of k groups of `z = (x - b_dec) W_enc^T + b_enc`.

    Group g holds latents g d_sae / k ... (g + 1) d_sae / k - 1. The lowest index wins ties, NaN
    over everything.

    Args:
        x: [..., d_in], float32 | float64 | bfloat16 | float16.
        W_enc: [d_sae, d_in], the dtype of `x`; one row per latent, contiguous.
        b_enc: [d_sae] or None.
        k: number of groups, a divisor of d_sae.
        b_dec: [d_in] or None, subtracted from `x` first.
        compute_dtype: as in `encode_topk`.

    Returns:
        `TopK(values [..., k], indices [..., k])`, entry g of group g: the dtype of `x`, and int32.
        A value is 0 where no latent of its group is positive.

    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ.
        ValueError: a shape, a device or `k` is not as stated.

    Gradients:
        As those of `encode_topk`, from the selected entries only.

    Numerics:
        As `encode_topk`: on sums in float32 (float64 for float64), before they are rounded.

    Cost:
        2 n d_in d_sae flops; W_enc is read once per 512 rows of x and thread; nothing of size
        [n, d_sae] is held.

    Source:
        The activation `groupmax` of EleutherAI's sparsify.
    """
    op = "encode_group_max"
    a = _encode.check(op, x, W_enc, b_enc, b_dec, None, None, compute_dtype)
    _check.groups(op, k, W_enc.shape[0])
    values, indices = torch.ops.fastsae.encode_group_max(
        a.x, a.W_enc, a.b_enc, a.b_dec, k, a.bf16_product
    )
    shape = (*x.shape[:-1], k)
    return TopK(values.view(shape), indices.view(shape))


@fake("encode_group_max")
def _fake(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    bf16_product: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


@fallback("encode_group_max")
def _plain(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    bf16_product: bool,
) -> tuple[Tensor, ...]:
    return tuple(reference.encode_group_max(x, W_enc, b_enc, k, b_dec=b_dec))


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_encode.gradients(ctx, grad), None, None


def _jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    return _encode.tangent(ctx, *tangents[:4]), None


_autograd.register(
    "encode_group_max", setup_context=_encode.setup_context, backward=_backward, jvp=_jvp
)
_vmap.register("encode_group_max", rows=("x",))
_flops.register("encode_group_max", _flops.encode)
