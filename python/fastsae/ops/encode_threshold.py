"""The inference encoder of batch-wise SAEs: a linear layer and the entries above a threshold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _autograd, _check, _encode, _flops, _vmap
from fastsae.ops.batch_topk import fake_selection
from fastsae.ops.threshold_select import check_threshold
from fastsae.types import SparseActs


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    capacity: int,
    *,
    b_dec: Tensor | None = None,
    select_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> SparseActs:
    """Keep the entries of `(x - b_dec) W_enc^T + b_enc` that are above `threshold`.

    Args:
        x: [..., d_in], float32 | float64 | bfloat16 | float16; leading dimensions are flattened to
            n rows first.
        W_enc: [d_sae, d_in], the dtype of `x`; one row per latent, contiguous.
        b_enc: [d_sae] or None.
        threshold: [] or [d_sae], floating: one threshold for all latents, or one for each. Strict.
        capacity: places for entries, >= 0. When more are above `threshold`, the `capacity` largest
            are kept.
        b_dec: [d_in] or None, subtracted from `x` first.
        select_dtype: as in `encode_topk`.
        compute_dtype: as in `encode_topk`.

    Returns:
        `SparseActs` in the variable layout with `min(capacity, n * d_sae)` places.

    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ.
        ValueError: a shape, a device or `capacity` is not as stated.
        RuntimeError: in `torch.jit.trace`, which would fix the number of entries.

    Gradients:
        In `x`, `W_enc`, `b_enc` and `b_dec`, from the kept entries only; none in `threshold`.
        Otherwise as `encode_topk`; vmap selects in each sample by itself.

    Numerics:
        As `encode_topk`; compared in float32 (float64 for float64 `x`).

    Cost:
        2 n d_in d_sae flops; workspace for the candidates.

    Source:
        BatchTopK (arXiv 2412.06410, section 3), the inference rule; JumpReLU (arXiv 2407.14435).
    """
    a = _encode.check("encode_threshold", x, W_enc, b_enc, b_dec, None, select_dtype, compute_dtype)
    threshold = check_threshold("encode_threshold", threshold, a.x, W_enc.shape[0])
    capacity = _check.capacity("encode_threshold", capacity, a.x.shape[0], W_enc.shape[0])
    values, indices, offsets = torch.ops.fastsae.encode_threshold(
        a.x, a.W_enc, a.b_enc, a.b_dec, threshold, capacity, a.bf16_product
    )
    return SparseActs(values.to(a.out_dtype), indices, offsets, W_enc.shape[0])


@fake("encode_threshold")
def _fake(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    threshold: Tensor,
    capacity: int,
    bf16_product: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_selection(x, x.shape[0], W_enc.shape[0], capacity)


@fallback("encode_threshold")
def _plain(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    threshold: Tensor,
    capacity: int,
    bf16_product: bool,
) -> tuple[Tensor, ...]:
    acts = reference.encode_threshold(x, W_enc, b_enc, threshold, capacity, b_dec=b_dec)
    assert acts.offsets is not None
    return acts.values, acts.indices, acts.offsets


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_encode.gradients(ctx, grad), None, None, None


def _jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    return _encode.tangent(ctx, *tangents[:4]), None, None


_autograd.register(
    "encode_threshold", setup_context=_encode.setup_context, backward=_backward, jvp=_jvp
)
_vmap.register("encode_threshold")
_flops.register("encode_threshold", _flops.encode)
