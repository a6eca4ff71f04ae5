"""Codes of several layers: one code of all their latents, and again those of the layers.

Latent i of layer l is latent `l d_layer + i` of the whole, so the entries of a row come layer by
layer. Nothing here asks the device how many entries there are; on a CPU, where looking is free,
codes are cut to what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsae import ops
from fastsae.types import BatchTopK, SparseActs, TopK, can_look


def joined(parts: Sequence[SparseActs]) -> SparseActs:
    """Return the code of all layers: `parts` of the same n tokens, each over d_layer latents.

    Returns:
        `SparseActs` over `len(parts) * d_layer` latents; in the fixed layout where all parts have
        it, else in the variable one, which all parts must have. Differentiable in their values.
    """
    n, d_layer = parts[0].shape
    parts = [p if p.offsets is None or not can_look(p.offsets) else p.trimmed() for p in parts]
    latents = torch.cat(
        [part.indices + d_layer * layer for layer, part in enumerate(parts)], dim=-1
    )
    values = torch.cat([part.values for part in parts], dim=-1)
    if all(part.offsets is None for part in parts):
        return SparseActs(values, latents, None, d_layer * len(parts))
    starts = torch.stack([part.offsets for part in parts if part.offsets is not None])
    counts = starts.diff(dim=1)
    before = counts.cumsum(0) - counts  # entries of a row that are of earlier layers
    offsets = starts.sum(0).int()
    # Entry e of layer l and row r goes to offsets[r] + before[l, r] + (e - starts[l, r]).
    shift = F.pad(offsets[:-1] + before - starts[:, :-1], (0, 1))
    places = []
    for layer, part in enumerate(parts):
        rows = part.rows()
        entry = torch.arange(rows.shape[0], device=rows.device)
        places.append(torch.where(rows < n, entry + shift[layer, rows], values.shape[0]))
    return _placed(values, latents, torch.cat(places), offsets, d_layer * len(parts))


def separated(acts: SparseActs, n_layers: int) -> list[SparseActs]:
    """Return the codes of the layers, each over `acts.d_sae / n_layers` latents.

    In the fixed layout a layer keeps the places of all, with value 0 where an entry is of another.
    """
    d_layer = acts.d_sae // n_layers
    owner = torch.div(acts.indices, d_layer, rounding_mode="floor")
    within = acts.indices - d_layer * owner
    parts = []
    if acts.offsets is None:
        for layer in range(n_layers):
            inside = owner == layer
            values, indices = (torch.where(inside, t, 0) for t in (acts.values, within))
            parts.append(SparseActs(values, indices, None, d_layer))
        return parts
    rows = acts.rows()
    for layer in range(n_layers):
        inside = (owner == layer) & (rows < acts.n)
        places = torch.where(inside, inside.cumsum(0) - 1, rows.shape[0])
        offsets = _offsets(torch.where(inside, rows, acts.n), acts.n)
        parts.append(_placed(acts.values, within, places, offsets, d_layer))
    return parts


def largest(parts: Sequence[TopK], d_layer: int, k: int | None) -> SparseActs:
    """Return the k largest entries of every token, given as many of each layer as can be among
    them: ascending latents, and the lowest first among equals. None keeps all."""
    acts = joined([SparseActs(*part, None, d_layer) for part in parts])
    if k is None:
        return acts
    chosen = ops.topk(acts.values.detach(), k).indices.long()
    return SparseActs(
        acts.values.gather(1, chosen), acts.indices.gather(1, chosen), None, acts.d_sae
    )


def largest_of_batch(parts: Sequence[SparseActs], budget: int) -> BatchTopK:
    """Return the `budget` largest positive entries of a batch, and the smallest kept value, given
    as many of each layer as can be among them; the lowest (row, latent) first among equals."""
    acts = joined(parts)
    found, smallest = ops.batch_topk(acts.values.detach().unsqueeze(0), budget)
    assert found.offsets is not None
    place = found.indices.long()
    kept = torch.arange(place.shape[0], device=place.device) < found.offsets[-1]
    rows = torch.where(kept, acts.rows()[place], acts.n)
    values, indices = (torch.where(kept, t[place], 0) for t in (acts.values, acts.indices))
    return BatchTopK(SparseActs(values, indices, _offsets(rows, acts.n), acts.d_sae), smallest)


def _offsets(rows: Tensor, n: int) -> Tensor:
    """Return the offsets `[n + 1]` of entries of `rows`; row n is padding."""
    counts = torch.zeros(n + 1, dtype=torch.int32, device=rows.device)
    counts.index_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))
    return F.pad(counts[:-1].cumsum(0, dtype=torch.int32), (1, 0))


def _placed(
    values: Tensor, indices: Tensor, places: Tensor, offsets: Tensor, d_sae: int
) -> SparseActs:
    """Return the code whose entry `places[e]` is entry e; `values.shape[0]` leaves it out."""
    size = values.shape[0]
    if can_look(offsets):
        held = int(offsets[-1])
        places = torch.where(places < size, places, held)
        size = held
    moved = values.new_zeros(size + 1).scatter(0, places, values)[:-1]
    latents = indices.new_zeros(size + 1).scatter_(0, places, indices)[:-1]
    return SparseActs(moved, latents, offsets, d_sae)
