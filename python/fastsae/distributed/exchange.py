"""Rows and codes of all data groups, brought together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsae.distributed.mesh import Peers
from fastsae.types import SparseActs


def sends_entries(rows: int, entries: float, sums: int, processes: int) -> bool:
    """Return whether gathering entries and their rows moves fewer bytes than adding up gradients.

    Args:
        rows: numbers of the rows that entries weigh.
        entries: how many there are; each is a value, a gradient and an index.
        sums: numbers of the gradients.
        processes: of the dimension.
    """
    gathered = (processes - 1) * (rows + 3 * entries)
    return gathered <= 2 * (processes - 1) / processes * sums


def gather_rows(x: Tensor, peers: Peers) -> Tensor:
    """Return the rows of all processes, those of an earlier one first: [size n, d]."""
    return peers.gather(x).flatten(0, 1)


@torch.no_grad()
def gather_codes(
    acts: SparseActs, grads: Tensor | SparseActs, peers: Peers
) -> tuple[SparseActs, Tensor | SparseActs]:
    """Return a code and its gradients of the tokens of all processes, those of an earlier one
    first.

    Args:
        acts: of the tokens here, equally many rows on every process.
        grads: the gradient of each of its values, or a code of its own.
        peers: the processes.

    Returns:
        Both in the variable layout, without padding; gradients as one code with `acts` where all
        processes have them so.

    Collectives: how many entries there are, integers, numbers.
    """
    together = isinstance(grads, Tensor)
    codes = [acts] if isinstance(grads, Tensor) else [acts, grads]
    known = [len(_listed(code)[0]) for code in codes]
    sizes = peers.gather(torch.tensor([known[0], -1 if together else known[1]]))
    if isinstance(grads, Tensor) and bool((sizes[:, 1] >= 0).any()):  # somebody has two
        grads = SparseActs(grads, acts.indices, acts.offsets, acts.d_sae)
    if isinstance(grads, SparseActs):
        first, second = _joined([acts, grads], sizes.where(sizes >= 0, sizes[:, :1]), peers)
        return first, second
    values, indices, offsets = _listed(acts)
    pairs = torch.stack([values, grads.reshape(-1)[: len(values)]], 1)
    (code,) = _joined([SparseActs(pairs, indices, offsets, acts.d_sae)], sizes[:, :1], peers)
    ours, theirs = (part.contiguous() for part in code.values.unbind(1))
    return SparseActs(ours, code.indices, code.offsets, code.d_sae), theirs


def _joined(codes: Sequence[SparseActs], sizes: Tensor, peers: Peers) -> list[SparseActs]:
    """Return several codes of all processes, given how many entries each has: [peers, codes]."""
    listed = [_listed(code) for code in codes]
    most = sizes.max(0).values.tolist()
    integers, numbers = [], []
    for (values, indices, offsets), room in zip(listed, most, strict=True):
        integers += [offsets.diff(), indices, indices.new_zeros(room - len(indices))]
        numbers += [values, values.new_zeros(room - len(values), *values.shape[1:])]
    wholes, wanted = peers.gather(torch.cat(integers)), peers.gather(torch.cat(numbers))
    found, at_whole, at_number = [], 0, 0
    for i, (code, (_, _, offsets)) in enumerate(zip(codes, listed, strict=True)):
        n, held = len(offsets) - 1, sizes[:, i].tolist()
        counts = wholes[:, at_whole : at_whole + n].flatten()
        ends = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
        torch.cumsum(counts, 0, dtype=torch.int32, out=ends[1:])
        start = at_whole + n
        places = [part[start : start + size] for part, size in zip(wholes, held, strict=True)]
        parts = [
            part[at_number : at_number + size] for part, size in zip(wanted, held, strict=True)
        ]
        found.append(SparseActs(torch.cat(parts), torch.cat(places), ends, code.d_sae))
        at_whole, at_number = start + most[i], at_number + most[i]
    return found


def _listed(acts: SparseActs) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, indices and offsets of a code in the variable layout, without padding."""
    if acts.offsets is None:
        n, k = acts.values.shape
        offsets = torch.arange(n + 1, dtype=torch.int32, device=acts.values.device) * k
        return acts.values.reshape(-1), acts.indices.reshape(-1), offsets
    count = int(acts.offsets[-1])
    return acts.values[:count], acts.indices[:count], acts.offsets
