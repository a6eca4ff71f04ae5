"""Which latents fire on a text, out of the windows that a sample keeps of each latent."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsae.interpret import ContextSample

MOST = 1 << 21
"""Tokens of the text, over all windows of all latents, that are looked at; in a sample of 100,000
latents the most common ones have ten times as many."""


class Found(NamedTuple):
    """Latents that fire on a text, the ones that do so most often and most strongly first."""

    latents: Tensor
    """int64 `[m]`"""
    strength: Tensor
    """Largest activation on the text in a window, over the latent's largest one; its mean over all
    windows that the sample has room for, 0 where the text is not: float64 `[m]`."""
    largest: Tensor
    """Largest activation on the text: float32 `[m]`."""
    share: Tensor
    """Share of the drawn windows, which are a uniform sample of those in which the latent fires, in
    which it fires on the text: float64 `[m]`."""
    every: int
    """Of the windows that hold the text, one in so many was looked at; where it is not 1, strength
    and share are estimates."""


class TextSearch:
    """Looks for latents that fire on a text.

    Args:
        sample: the windows; an index of which latents keep which window, 4 bytes each, is made of
            it at the first search.
    """

    def __init__(self, sample: ContextSample) -> None:
        self.sample = sample
        self._lock = Lock()
        self._made: list[_Table] | None = None

    def tables(self) -> list[_Table]:
        """Return the windows of all latents, indexed."""
        with self._lock:
            if self._made is None:
                made = [_Table(self.sample, name) for name in ("top", "drawn")]
                self._made = [table for table in made if table.room]
            return self._made

    def find(self, spellings: Sequence[Sequence[int]]) -> Found:
        """Return the latents that fire on a text.

        Args:
            spellings: token ids of the text, in each way in which it may be written.
        """
        tables, d_sae = self.tables(), self.sample.d_sae
        held, columns = occurrences(self.sample, spellings)
        work = int(sum((table.lengths * held).sum() for table in tables))
        every = -(-work // MOST) or 1
        windows = _drawn(held.nonzero().flatten(), every)
        total, room = torch.zeros(d_sae, dtype=torch.float64), 0
        largest, share = torch.zeros(d_sae), torch.zeros(d_sae, dtype=torch.float64)
        size = self.sample.largest
        for table in tables:
            latent, act = table.look(windows, held, columns)
            total.index_add_(0, latent, act.double())
            largest.scatter_reduce_(0, latent, act, "amax")
            hits = torch.bincount(latent[act > 0], minlength=d_sae).double()
            share = (every * hits / table.kept).clamp(max=1)
            size, room = torch.maximum(size, table.size), room + table.room
        strength = every * total / (size.double() * room).clamp(min=torch.finfo(torch.float32).tiny)
        latents = (total > 0).nonzero().flatten()
        latents = latents[strength[latents].argsort(descending=True, stable=True)]
        return Found(latents, strength[latents], largest[latents], share[latents], every)


def occurrences(sample: ContextSample, spellings: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return the tokens of a text, wherever it occurs within a window.

    Returns:
        held: how many of them each window holds: int64 `[windows]`.
        columns: their places in their windows, window after window: int64 `[sum(held)]`.
    """
    ids, bounds = sample.all_token_ids.numpy(), sample.bounds.numpy()
    marked = [np.zeros(0, dtype=np.int64)]
    for spelling in spellings:
        rows = np.flatnonzero(ids[: max(len(ids) - len(spelling) + 1, 0)] == spelling[0])
        for i, token in enumerate(spelling[1:], 1):
            rows = rows[ids[rows + i] == token]
        last = rows + len(spelling) - 1
        inside = np.searchsorted(bounds, rows, "right") == np.searchsorted(bounds, last, "right")
        marked += [rows[inside] + i for i in range(len(spelling))]
    row = np.unique(np.concatenate(marked))
    window = np.searchsorted(bounds, row, "right") - 1
    held = torch.from_numpy(np.bincount(window, minlength=sample.windows))
    return held, torch.from_numpy(row - bounds[window])


class _Table:
    """The windows of one kind, by window."""

    def __init__(self, sample: ContextSample, name: str) -> None:
        window, self.scale, self.shape = sample.windows_of(name)
        self.room = window.shape[1]
        """Most windows of a latent."""
        self.kept = (window >= 0).sum(1).clamp(min=1)
        """How many a latent has, at least 1: `[d_sae]`."""
        self.size = self.scale.amax(1) if self.room else sample.largest
        """Largest absolute activation in them: `[d_sae]`."""
        flat = window.flatten()
        order = flat.argsort(stable=True)
        order = order.int() if len(flat) < 1 << 31 else order
        self.lengths = torch.bincount(flat[flat >= 0], minlength=sample.windows)
        """How many latents keep each window: `[windows]`."""
        self._starts = self.lengths.cumsum(0) - self.lengths
        self._order = order[len(order) - int(self.lengths.sum()) :]

    def look(self, windows: Tensor, held: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return, for every latent that keeps one of some windows, its largest absolute activation
        on the text there.

        Args:
            windows: int64 `[w]`.
            held: as `occurrences` returns it, like `columns`.
            columns: of all windows.

        Returns:
            latent: int64 `[m]`.
            act: float32 `[m]`.
        """
        lengths = self.lengths[windows]
        pair = self._order[_ranges(self._starts[windows], lengths)].long()
        latent, slot = pair // max(self.room, 1), pair % max(self.room, 1)
        starts = (held.cumsum(0) - held)[windows].repeat_interleave(lengths)
        counts = held[windows].repeat_interleave(lengths)
        column = columns[_ranges(starts, counts)]
        entry = pair.repeat_interleave(counts) * self.shape.shape[2] + column
        acts = self.shape.view(-1)[entry].abs().float()
        best = torch.segment_reduce(acts, "max", lengths=counts) if len(acts) else acts
        return latent, best * self.scale[latent, slot]


def _drawn(windows: Tensor, every: int) -> Tensor:
    """Return one in `every` of some windows, the same ones each time."""
    if every == 1:
        return windows
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    return windows[order[::every]].sort().values


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return start, start + 1, ... of each start, as many as it has length, one after another."""
    before = lengths.cumsum(0) - lengths
    first = (starts - before).repeat_interleave(lengths)
    return first + torch.arange(len(first))
