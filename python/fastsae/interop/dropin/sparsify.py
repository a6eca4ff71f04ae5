"""EleutherAI's sparsify with fastsae's kernels for its encoder and decoder.

    from fastsae.interop.dropin import sparsify as fast
    fast.enable()

Its `SparseCoder`, its trainer, its configs and its files stay what they are. Until `disable()`,
other functions encode, decode, normalize the decoder and project its gradient, and `Trainer.fit`
makes its optimizer's step in one pass over memory. Results and gradients are the same up to
rounding, except for which of several equal values is selected. See docs/dropin.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.interop.dropin import _updates as updates
from fastsae.interop.dropin._pre_acts import PreActs
from fastsae.interop.dropin._sparsify_optimizers import PEER, optimizers_in_one_pass, training
from fastsae.types import SparseActs

__all__ = ["PreActs", "disable", "enable", "enabled", "optimizers_in_one_pass"]

_coder = PEER.module(
    "sparsify.sparse_coder", "SparseCoder", "fused_encoder", "decoder_impl", "EncoderOutput"
)
_encoder = PEER.module("sparsify.fused_encoder", "fused_encoder", "FusedEncoder")
_utils = PEER.module("sparsify.utils", "decoder_impl")

_their_encoder, _their_decoder = _encoder.fused_encoder, _utils.decoder_impl
_DTYPES = (torch.float32, torch.float64)


class _Encode(torch.autograd.Function):
    """The k largest of relu(x W^T + b), with the gradient that sparsify gives them.

    All k entries of a row get it, also those that the relu has set to 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = ops.encode_topk(x, weight, bias, k)
        ctx.save_for_backward(x, weight, indices)
        long = indices.long()
        ctx.mark_non_differentiable(long)
        return values, long

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, indices = ctx.saved_tensors
        grad = grads[0].to(weight.dtype).contiguous()
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        dx = dweight = dbias = None
        if need_x:
            dx = ops.sparse_decode(SparseActs(grad, indices, None, len(weight)), weight)
        if need_weight or need_bias:
            every = SparseActs(torch.ones_like(grad), indices, None, len(weight))
            lists = ops.group_by_latent(every)
            dweight, dbias = ops.sparse_weight_grad(grad, lists, x)
        return dx, dweight if need_weight else None, dbias if need_bias else None, None


def fused_encoder(x: Tensor, weight: Tensor, bias: Tensor, k: int, activation: str) -> Any:
    """Return sparsify's `EncoderOutput`, with `PreActs` for its pre-activations.

    Args:
        x: [n, d_in].
        weight: [num_latents, d_in], float32 or float64. Others are sparsify's own, and so is
            groupmax.
        bias: [num_latents].
        k: entries per row.
        activation: "topk" or "groupmax".

    Numerics:
        Under autocast as `F.linear`; selected from float32 sums, where sparsify selects from sums
        that are rounded to the autocast dtype.
    """
    usual = activation == "topk" and bias is not None and x.ndim == 2 and 1 <= k <= len(weight)
    same = x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
    if not usual or not same or weight.dtype not in _DTYPES or not weight.is_contiguous():
        return _their_encoder(x, weight, bias, k, activation)
    values, indices = _apply(_Encode, x, weight, bias, k)
    rest = PreActs(x.detach(), weight.detach(), bias.detach(), None)
    return _coder.EncoderOutput(values, indices, rest)


def decode(top_indices: Tensor, top_acts: Tensor, W_dec: Tensor) -> Tensor:
    """Return `sum_j top_acts_j W_dec[:, top_indices_j]` for every token.

    Args:
        top_indices: [n, k].
        top_acts: [n, k], the dtype of W_dec.
        W_dec: [d_in, num_latents], a transposed matrix with one row per latent.

    Gradients:
        In top_acts, also where it is 0, and W_dec.
    """
    rows = W_dec.mT
    same = top_acts.ndim == 2 and top_acts.dtype == rows.dtype and rows.is_contiguous()
    if not same or rows.dtype not in _DTYPES:
        out: Tensor = _their_decoder(top_indices, top_acts, W_dec)
        return out
    acts = SparseActs(top_acts.contiguous(), top_indices.int(), None, len(rows))
    with torch.autocast(rows.device.type, enabled=False):  # an embedding bag is not cast either
        return ops.sparse_decode(acts, rows, inactive_grad=True)


def _apply(function: type[_Encode], *inputs: Any) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return out


def _normalize(coder: Any) -> None:
    updates.normalize_(coder.W_dec.detach())


def _project(coder: Any) -> None:
    updates.project_(coder.W_dec.grad, coder.W_dec.detach())


def _fit(trainer: Any) -> Any:
    with optimizers_in_one_pass(trainer.optimizers):
        return _THEIRS[training.Trainer, "fit"](trainer)


# Where a function is called from and by which name -> sparsify's own, and the one here.
_PLACES: list[tuple[Any, str, Any]] = [
    (_coder, "fused_encoder", fused_encoder),
    (_encoder, "fused_encoder", fused_encoder),
    (_coder, "decoder_impl", decode),
    (_utils, "decoder_impl", decode),
    (_coder.SparseCoder, "set_decoder_norm_to_unit_norm", _normalize),
    (_coder.SparseCoder, "remove_gradient_parallel_to_decoder_directions", _project),
    (training.Trainer, "fit", _fit),
]
_THEIRS = {(place, name): getattr(place, name) for place, name, _ in _PLACES}


def enable() -> None:
    """Let every `SparseCoder` and `Trainer` use the functions of this module. Twice is as once.

    Raises:
        ImportError: sparsify is not as this module expects it; nothing has been replaced then.
    """
    _check()
    for place, name, ours in _PLACES:
        setattr(place, name, ours)


def disable() -> None:
    """Let every `SparseCoder` and `Trainer` use sparsify's own functions again."""
    for (place, name), theirs in _THEIRS.items():
        setattr(place, name, theirs)


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`enable()` inside a with statement; afterwards it is as before."""
    before = [(place, name, getattr(place, name)) for place, name, _ in _PLACES]
    enable()
    try:
        yield
    finally:
        for place, name, function in before:
            setattr(place, name, function)


def _check() -> None:
    """Raise ImportError unless what is replaced, and what calls it, are as known here."""
    for place, name, ours in _PLACES:
        found = getattr(place, name)
        if found not in (ours, _THEIRS[place, name]):
            PEER.refuse(f"{place.__name__}.{name} to be its own", f"{found}")
    PEER.parameters(_their_encoder, ("input", "weight", "bias", "k", "activation"))
    PEER.parameters(_their_decoder, ("top_indices", "top_acts", "W_dec"))
    if _coder.EncoderOutput._fields != ("top_acts", "top_indices", "pre_acts"):
        PEER.refuse("EncoderOutput(top_acts, top_indices, pre_acts)", _coder.EncoderOutput._fields)
    coder = _coder.SparseCoder
    PEER.parameters(coder.forward, ("self", "x", "y", "dead_mask", "total_variance"))
    PEER.parameters(coder.encode, ("self", "x"))
    PEER.parameters(coder.decode, ("self", "top_acts", "top_indices"))
    for (place, _), theirs in _THEIRS.items():
        if place in (coder, training.Trainer):
            PEER.parameters(theirs, ("self",))
