"""What the drop-ins compute: a code with a graph, prefixes of a dictionary, dead latents.

Both matrices are feature-major here: `W_enc [d_sae, d_in]` and `W_dec [d_sae, d_in]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsae import ops
from fastsae.types import SparseActs

Select = Callable[[Tensor, Tensor, Tensor], SparseActs]
"""From x, W_enc and b_enc to the entries of a code."""

SPARSE_FROM = 1.5
"""Dead latents per selected one from which gathering rows is cheaper than dense matmuls."""


def rows_first_(parameter: Tensor) -> None:
    """Store a matrix `[d_in, d_sae]` with one contiguous row per latent; its values stay."""
    parameter.data = parameter.data.t().contiguous().t()


def rows_of(parameter: Tensor) -> Tensor:
    """Return the contiguous `[d_sae, d_in]` of a matrix `[d_in, d_sae]`, in its graph.

    A view if it is stored that way, otherwise a copy.
    """
    return parameter.t().contiguous()


def select(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, rule: Select, norm: Tensor | None
) -> SparseActs:
    """Return the positive entries that `rule` keeps of z = x W_enc^T + b_enc, with their graph.

    Args:
        x: [n, d_in].
        W_enc: [d_sae, d_in], contiguous.
        b_enc: [d_sae].
        rule: selects, from the matrices it is given.
        norm: [d_sae] or None. The rule sees z times norm; the values returned are z.

    Gradients:
        In x, W_enc and b_enc.
    """
    if norm is None:
        return rule(x, W_enc, b_enc)
    with torch.no_grad():
        chosen = exact(rule(x, W_enc * norm.unsqueeze(1), b_enc * norm))
    z = ops.sparse_decode_values_grad(x, chosen, W_enc) + at(b_enc, chosen.indices)
    # A z next to 0 may come out on its other side.
    values = torch.where(chosen.values > 0, z, 0).relu()
    return SparseActs(values, chosen.indices, chosen.offsets, chosen.d_sae)


def exact(acts: SparseActs) -> SparseActs:
    """Return the entries without padding. It asks the device how many there are."""
    if acts.offsets is None or (end := int(acts.offsets[-1])) == acts.values.shape[0]:
        return acts
    return SparseActs(acts.values[:end], acts.indices[:end], acts.offsets, acts.d_sae)


def at(vector: Tensor, indices: Tensor) -> Tensor:
    """Return the elements of a vector at `indices` of any shape."""
    return vector.index_select(0, indices.flatten().long()).view(indices.shape)


def coo(acts: SparseActs, values: Tensor) -> Tensor:
    """Return a sparse COO tensor `[n, d_sae]` of the entries of `exact(acts)`.

    Gradients:
        In `values`, which stand for `acts.values`.
    """
    places = torch.stack([acts.rows().flatten(), acts.indices.flatten().long()])
    return torch.sparse_coo_tensor(
        places, values.flatten(), acts.shape, check_invariants=False, is_coalesced=True
    )


def prefixes(acts: SparseActs, W_dec: Tensor, b_dec: Tensor, ends: Sequence[int]) -> Tensor:
    """Return the reconstructions `[g, n, d_in]` from the latents below each of `ends`.

    Every group of latents is decoded as tokens of its own, in one call: so the gradient of W_dec is
    one matrix, not one for each prefix.

    Args:
        acts: entries without padding.
        W_dec: [d_sae, d_in].
        b_dec: [d_in].
        ends: ascending; the last one is d_sae.
    """
    acts, n, g = acts._variable(), acts.n, len(ends)
    borders = torch.tensor(ends, dtype=torch.int32, device=acts.values.device)
    row = torch.bucketize(acts.indices, borders, right=True) * n + acts.rows()
    order = row.argsort(stable=True)
    counts = torch.bincount(row, minlength=g * n)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    grouped = SparseActs(
        acts.values.index_select(0, order), acts.indices[order], offsets, acts.d_sae
    )
    return ops.sparse_decode(grouped, W_dec).view(g, n, -1).cumsum(0) + b_dec


def from_dead(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    k: int,
    *,
    norm: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Return what the k largest pre-activations of dead latents decode to, `[n, d_in]`, no bias.

    Args:
        x: [n, d_in].
        W_enc: [d_sae, d_in].
        b_enc: [d_sae].
        W_dec: [d_sae, d_in].
        dead: [e] int64, the latents.
        k: latents per token, at most e.
        norm: [d_sae] or None; pre-activations are compared after multiplying by it.
        relu: whether negative pre-activations are 0.

    Gradients:
        In x and the parameters.
    """
    W, b, D = (tensor.index_select(0, dead) for tensor in (W_enc, b_enc, W_dec))
    scale = None if norm is None else norm.index_select(0, dead)
    if len(dead) > SPARSE_FROM * k:
        return ops.sparse_decode(_largest(x, W, b, k, scale, relu), D)
    z = torch.addmm(b, x, W.t())
    if k < len(dead):
        score = z.detach() if scale is None else z.detach() * scale
        kept = torch.zeros_like(z, dtype=torch.bool)
        z = z.where(kept.scatter_(1, ops.topk(score, k).indices.long(), True), 0)
    return (z.relu() if relu else z) @ D


def _largest(
    x: Tensor, W: Tensor, b: Tensor, k: int, scale: Tensor | None, relu: bool
) -> SparseActs:
    if scale is None:
        return SparseActs(*ops.encode_topk(x, W, b, k, relu=relu), None, len(W))
    with torch.no_grad():
        top = ops.encode_topk(x, W * scale.unsqueeze(1), b * scale, k, relu=False)
    chosen = SparseActs(torch.ones_like(top.values), top.indices, None, len(W))
    z = ops.sparse_decode_values_grad(x, chosen, W) + at(b, top.indices)
    return SparseActs(z.relu() if relu else z, top.indices, None, len(W))
