"""Exact selection across processes, in a fixed number of collectives.

Only candidates or counts cross the wire. Every process ends with which of its own entries are kept,
and all together keep what one process would have kept, ties included: the lowest latent of a row,
or the lowest row and then latent of a batch, wins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsae import ops
from fastsae.types import SparseActs

if TYPE_CHECKING:
    from fastsae.distributed.mesh import Peers

DIGIT = 11
"""Bits of a key that one histogram decides on."""


def keep_largest_of_rows(key: Tensor, k: int, width: int, latent: Peers) -> Tensor:
    """Return which entries are among the k largest of their row over all processes: bool [n, own].

    Args:
        key: [n, own], the candidates of the latents here, in ascending order of these.
        k: entries to keep of a row.
        width: of the widest process, at least own.
        latent: the processes that have the other latents, in ascending order of these.
    """
    n, own = key.shape
    padded = key.new_full((n, width), float("-inf"))
    padded[:, :own] = key
    every = latent.gather(padded).transpose(0, 1).reshape(n, -1)
    # Columns are in the order of the dictionary, so that the op's rule for ties is the rule.
    first = latent.rank * width
    chosen = ops.topk(every, min(k, every.shape[1])).indices.long() - first
    here = (chosen >= 0) & (chosen < own)
    kept = torch.zeros(n, own + 1, dtype=torch.bool, device=key.device)
    kept.scatter_(1, chosen.where(here, own), True)
    return kept[:, :own]


def keep_largest(
    acts: SparseActs, budget: int, data: Peers, latent: Peers
) -> tuple[SparseActs, Tensor]:
    """Return what all processes keep of their candidates: the `budget` largest entries.

    Args:
        acts: the candidates here, values above 0, without padding: at least those that are kept.
        budget: entries to keep in all.
        data: the processes with other tokens; those of an earlier one come first.
        latent: the processes with other latents, in ascending order of these.

    Returns:
        The entries that are kept here, and the smallest value kept anywhere, inf if nothing is.
    """
    assert acts.offsets is not None
    values, offsets, n = acts.values, acts.offsets, acts.n
    smallest, above = _kth_largest(values, budget, data, latent)
    tied = values == smallest
    before = torch.zeros(len(values) + 1, dtype=torch.int64, device=values.device)
    torch.cumsum(tied, 0, out=before[1:])
    ends = before[offsets.long()]
    counts = latent.gather(ends.diff().int()).t()  # [n, latent]
    every = data.gather(counts).long().flatten()  # by group, row and process
    earlier = (every.cumsum(0) - every).view(data.size, n, latent.size)
    first = earlier[data.rank, :, latent.rank]
    rows = acts.rows()
    place = before[:-1] - ends[rows] + first[rows]  # among all that are tied
    kept = (values > smallest) | (tied & (place < budget - above))
    return _those(acts, kept), smallest


def _kth_largest(values: Tensor, k: int, data: Peers, latent: Peers) -> tuple[Tensor, int]:
    """Return the k-th largest of what all processes have, or the smallest where there are fewer,
    and how many are above it; inf and 0 where there are none.

    A radix select on the bits of positive numbers, which are in the order of the numbers.

    Args:
        values: [m], float32 or float64, above 0.
    """
    bits = values.element_size() * 8
    keys = values.contiguous().view(torch.int32 if bits == 32 else torch.int64).long()
    found, above, left = 0, 0, k
    for top in range(bits, 0, -DIGIT):
        shift = max(top - DIGIT, 0)
        size = 1 << (top - shift)
        digits = (keys >> shift) & (size - 1)
        counts = data.sum(latent.sum(torch.bincount(digits, minlength=size)))
        larger = counts.flip(0).cumsum(0).flip(0)  # entries with this digit or a larger one
        if top == bits:
            left = min(left, int(larger[0]))
        if left == 0:
            keys, found = keys[:0], -1  # the other collectives are awaited by all
            continue
        digit = int((larger >= left).sum()) - 1
        over = int(larger[digit]) - int(counts[digit])
        above, left = above + over, left - over
        found = (found << (top - shift)) | digit
        keys = keys[digits == digit]
    if found < 0:
        return values.new_full((), float("inf")), 0
    kind = torch.int32 if bits == 32 else torch.int64
    key = torch.tensor([found], dtype=kind, device=values.device)
    return key.view(values.dtype).squeeze(0), above


def keep_largest_of_columns(
    acts: SparseActs, budget: Tensor, own: Tensor, data: Peers
) -> SparseActs:
    """Return what all processes keep of their candidates: the largest entries of every latent.

    Args:
        acts: the candidates here, values above 0, without padding: of latent j the own[j] largest.
        budget: [d_sae], entries of each latent to keep in all.
        own: [d_sae], how many candidates of a latent a process has at most, the same on all.
        data: the processes with other tokens; those of an earlier one come first.
    """
    if data.size == 1:
        return acts
    assert acts.offsets is not None
    values, latents = acts.values, acts.indices.long()
    starts = own.long().cumsum(0) - own.long()
    by_latent = torch.argsort(latents, stable=True)  # rows ascend inside
    counts = torch.bincount(latents, minlength=len(own))
    ranks = torch.arange(len(values), device=values.device)
    ranks -= (counts.cumsum(0) - counts)[latents[by_latent]]
    places = starts[latents[by_latent]] + ranks
    listed = values.new_zeros(int(own.sum()))
    listed[places] = values[by_latent]
    # By latent, then from the largest on; of equal ones the earlier process and row first.
    every = data.gather(listed)
    columns = torch.repeat_interleave(torch.arange(len(own), device=own.device), own.long())
    order = torch.argsort(every.flatten(), descending=True, stable=True)
    of_entry = columns.repeat(data.size)[order]
    again = torch.argsort(of_entry, stable=True)
    order, of_entry = order[again], of_entry[again]
    firsts = data.size * starts
    rank = torch.arange(len(order), device=order.device) - firsts[of_entry]
    chosen = torch.zeros(every.numel(), dtype=torch.bool, device=values.device)
    chosen[order] = rank < budget.long()[of_entry]
    here = chosen.view_as(every)[data.rank]
    kept = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    kept[by_latent] = here[places]
    return _those(acts, kept)


def _those(acts: SparseActs, kept: Tensor) -> SparseActs:
    """Return the entries that are kept, of a code without padding."""
    assert acts.offsets is not None
    totals = torch.zeros(len(kept) + 1, dtype=torch.int32, device=kept.device)
    torch.cumsum(kept, 0, dtype=torch.int32, out=totals[1:])
    offsets = totals[acts.offsets.long()]
    return SparseActs(acts.values[kept], acts.indices[kept], offsets, acts.d_sae)
