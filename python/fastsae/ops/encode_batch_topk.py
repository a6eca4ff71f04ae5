"""The mutual-choice encoder: a linear layer and the k n largest positive entries of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _autograd, _check, _encode, _flops, _vmap
from fastsae.ops.batch_topk import fake_selection
from fastsae.types import BatchTopK, SparseActs, accumulator_dtype


def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: float,
    *,
    b_dec: Tensor | None = None,
    mask: Tensor | None = None,
    select_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    threshold_guess: Tensor | None = None,
) -> BatchTopK:
    """Keep the `int(k * n)` largest positive entries of `(x - b_dec) W_enc^T + b_enc`.

    Args:
        x: [..., d_in], float32 | float64 | bfloat16 | float16; leading dimensions are flattened to
            n rows first.
        W_enc: [d_sae, d_in], the dtype of `x`; one row per latent, contiguous.
        b_enc: [d_sae] or None.
        k: mean number of entries per row, >= 0; may be fractional.
        b_dec: [d_in] or None, subtracted from `x` first.
        mask: [d_sae] bool or None: only latents where it is true are eligible.
        select_dtype: as in `encode_topk`.
        compute_dtype: as in `encode_topk`.
        threshold_guess: [] or None: about what the threshold will be, for instance that of the last
            batch. It changes the time, never the result. A GPU ignores it and takes a sample.

    Returns:
        `BatchTopK(acts, threshold)` as `batch_topk` gives it.

    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ.
        ValueError: a shape, a device or `k` is not as stated.
        RuntimeError: in `torch.jit.trace`, which would fix the number of entries.

    Gradients:
        In `x`, `W_enc`, `b_enc` and `b_dec`, from the kept entries only; the threshold is a
        constant. Otherwise as `encode_topk`; vmap selects in each sample by itself.

    Numerics:
        As `encode_topk`; the selection is that of `batch_topk` on the same pre-activations.

    Cost:
        2 n d_in d_sae flops; without a threshold_guess 32 more rows, the pre-activations of which
        tell where the threshold is; workspace for candidates of a few times the budget. A sample
        that misleads costs a second pass.

    Source:
        BatchTopK (arXiv 2412.06410, section 3); Mutual Choice (arXiv 2411.02124, section 3).
    """
    a = _encode.check(
        "encode_batch_topk", x, W_enc, b_enc, b_dec, mask, select_dtype, compute_dtype
    )
    budget = _check.budget("encode_batch_topk", k, a.x.shape[0], W_enc.shape[0])
    _check.threshold_guess("encode_batch_topk", threshold_guess)
    values, indices, offsets, threshold = torch.ops.fastsae.encode_batch_topk(
        a.x, a.W_enc, a.b_enc, a.b_dec, budget, mask, a.bf16_product, threshold_guess
    )
    return BatchTopK(
        SparseActs(values.to(a.out_dtype), indices, offsets, W_enc.shape[0]), threshold
    )


@fake("encode_batch_topk")
def _fake(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    budget: int,
    mask: Tensor | None,
    bf16_product: bool,
    threshold_guess: Tensor | None,
) -> tuple[Tensor, ...]:
    selection = fake_selection(x, x.shape[0], W_enc.shape[0], budget)
    return *selection, x.new_empty((), dtype=accumulator_dtype(x.dtype))


@fallback("encode_batch_topk")
def _plain(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    budget: int,
    mask: Tensor | None,
    bf16_product: bool,
    threshold_guess: Tensor | None,
) -> tuple[Tensor, ...]:
    pre = reference.pre_activations(x, W_enc, b_enc, b_dec)
    eligible = pre > 0 if mask is None else (pre > 0) & mask
    acts, threshold = reference.keep_largest(pre, eligible, budget)
    assert acts.offsets is not None
    return acts.values.to(x.dtype), acts.indices, acts.offsets, threshold


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _encode.setup_context(ctx, inputs, output)
    ctx.mark_non_differentiable(output[3])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_encode.gradients(ctx, grad), None, None, None, None


def _jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    return _encode.tangent(ctx, *tangents[:4]), None, None, None


_autograd.register("encode_batch_topk", setup_context=_setup_context, backward=_backward, jvp=_jvp)
_vmap.register("encode_batch_topk")
_flops.register("encode_batch_topk", _flops.encode)
