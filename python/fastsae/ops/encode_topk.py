"""The TopK encoder: a linear layer and the k largest of every row, without the matrix between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _autograd, _check, _encode, _flops, _vmap
from fastsae.types import TopK


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    b_dec: Tensor | None = None,
    mask: Tensor | None = None,
    relu: bool = True,
    absolute: bool = False,
    select_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> TopK:
    """Return the k largest entries of every row of `(x - b_dec) W_enc^T + b_enc`.

    Args:
        x: [..., d_in], float32 | float64 | bfloat16 | float16.
        W_enc: [d_sae, d_in], the dtype of `x`; one row per latent, contiguous.
        b_enc: [d_sae] or None.
        k: entries per row, 1 <= k <= d_sae.
        b_dec: [d_in] or None, subtracted from `x` first.
        mask: [d_sae] bool or None. Only latents where it is true carry values; when there are fewer
            than k of them, the rest of a row are other latents with value 0.
        relu: replace selected negative values by 0.
        absolute: select the k largest absolute values instead; values keep their sign, whatever
            `relu` is.
        select_dtype: float32 casts 16-bit inputs to float32 first. None multiplies them as they
            are; the sums are float32 and are selected on before rounding either way.
        compute_dtype: bfloat16 lets the matmul of float32 inputs round both factors to bfloat16,
            with float32 sums, where the processor has instructions for that (AVX-512 BF16, `fastsae
            info`); elsewhere it changes nothing. The backward stays in float32.

    Returns:
        `TopK(values [..., k], indices [..., k])` in ascending index: the dtype of `x`, and int32.

    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ.
        ValueError: a shape, a device or `k` is not as stated.

    Gradients:
        In `x`, `W_enc`, `b_enc` and `b_dec`, from the selected entries only. An entry whose value
        is exactly 0 gets none. Of any order, in reverse and forward mode, under `torch.func` and
        vmap: one call for a batch of `x`, one per model for a batch of weights.

    Numerics:
        Sums accumulate in float32 (float64 for float64). Selection is exact for the pre-activations
        computed, with the order of `topk`. On the CPU each of these is one sum over d_in in order,
        so a row gives the same bits in every batch of 32 or more rows and with any number of
        threads; fewer rows of float32 or float64 go through torch's own matmul. Under autocast `x`,
        `W_enc` and the biases are cast as those of `F.linear`; the selection is still on float32
        sums.

    Cost:
        2 n d_in d_sae flops; W_enc is read once per 512 rows of x and thread; about 25 MiB of
        scratch per thread.

    Source:
        Gao et al., "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), equation 3.
    """
    a = _encode.check("encode_topk", x, W_enc, b_enc, b_dec, mask, select_dtype, compute_dtype)
    _check.k_in_range("encode_topk", k, W_enc.shape[0])
    values, indices = torch.ops.fastsae.encode_topk(
        a.x, a.W_enc, a.b_enc, a.b_dec, k, mask, relu and not absolute, absolute, a.bf16_product
    )
    shape = (*x.shape[:-1], k)
    return TopK(values.to(a.out_dtype).view(shape), indices.view(shape))


@fake("encode_topk")
def _fake(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    mask: Tensor | None,
    relu: bool,
    absolute: bool,
    bf16_product: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


@fallback("encode_topk")
def _plain(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    mask: Tensor | None,
    relu: bool,
    absolute: bool,
    bf16_product: bool,
) -> tuple[Tensor, ...]:
    found = reference.encode_topk(
        x, W_enc, b_enc, k, b_dec=b_dec, mask=mask, relu=relu, absolute=absolute
    )
    return tuple(found)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_encode.gradients(ctx, grad), None, None, None, None, None


def _jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    return _encode.tangent(ctx, *tangents[:4]), None


_autograd.register("encode_topk", setup_context=_encode.setup_context, backward=_backward, jvp=_jvp)
_vmap.register("encode_topk", rows=("x",))
_flops.register("encode_topk", _flops.encode)
