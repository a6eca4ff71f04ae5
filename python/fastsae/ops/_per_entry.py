"""Numbers of latents, such as thresholds, one for each entry of a code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae.ops import _autograd
from fastsae.types import SparseActs, can_look


def per_entry(acts: SparseActs, *numbers: Tensor) -> tuple[Tensor, ...]:
    """Return `numbers[i][acts.indices]` of tensors `[d_sae]`, in the shape of `acts.values`.

    Gradients are added up in the order of the entries: torch's own, of `index_select`, come from
    atomic additions on a GPU, in another order each time. Padding has none there. Forward mode
    takes torch's.
    """
    if can_look(numbers[0]) or _autograd.in_forward_mode():
        flat = acts.indices.flatten()
        return tuple(t.index_select(0, flat).view(acts.indices.shape) for t in numbers)
    found: tuple[Tensor, ...] = _PerEntry.apply(acts.indices, acts.offsets, *numbers)  # type: ignore[no-untyped-call]
    return found


class _PerEntry(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(indices: Tensor, offsets: Tensor | None, *numbers: Tensor) -> tuple[Tensor, ...]:
        flat = indices.flatten()
        return tuple(t.index_select(0, flat).view(indices.shape) for t in numbers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        indices, offsets, *numbers = inputs
        ctx.save_for_backward(indices, offsets)
        ctx.d_sae = numbers[0].shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        indices, offsets = ctx.saved_tensors
        native = torch.ops.fastsae
        lists = native.group_by_latent(torch.ones_like(grads[0]), indices, offsets, ctx.d_sae)
        n = indices.shape[0] if offsets is None else offsets.shape[0] - 1
        no_columns = grads[0].new_zeros(n, 0)
        sums = (native.sparse_weight_grad(g, *lists, no_columns)[1] for g in grads)
        needed = ctx.needs_input_grad[2:]
        return None, None, *(g if need else None for g, need in zip(sums, needed, strict=True))
