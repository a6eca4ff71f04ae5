"""The n best windows of every latent, of a stream of them, in memory that does not grow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Candidates(NamedTuple):
    """Windows in which a latent fires, with what it does there."""

    slot: Tensor
    """Number of the latent among those that are sampled: int64 `[c]`."""
    window: Tensor
    """int32 `[c]`"""
    scale: Tensor
    """Largest absolute activation in the window: float32 `[c]`."""
    shape: Tensor
    """Activations over scale: float16 `[c, width]`, 0 where the latent is silent."""

    def at(self, chosen: Tensor) -> Candidates:
        """Return some of them."""
        return Candidates(*(x[chosen] for x in self))


class Kept:
    """Keeps, for each of m latents, the n candidates of the smallest keys.

    Of equal keys the one that came first stays.

    Args:
        m: latents.
        n: candidates to keep of each.
        width: tokens of a window.
    """

    def __init__(self, m: int, n: int, width: int) -> None:
        self.keys = torch.full((m, n), torch.inf, dtype=torch.float64)
        self.window = torch.full((m, n), -1, dtype=torch.int32)
        self.scale = torch.zeros(m, n)
        self.shape = torch.zeros(m, n, width, dtype=torch.float16)
        self.bound = torch.full((m,), torch.inf if n else -torch.inf, dtype=torch.float64)
        """Candidates of this key or a larger one are not kept."""

    def take(self, keys: Tensor, found: Candidates) -> None:
        """Look at candidates, with a key each: float64 `[c]`."""
        below = (keys < self.bound[found.slot]).nonzero().flatten()
        if not len(below):
            return
        keys, found = keys[below], found.at(below)
        n = self.keys.shape[1]
        touched, owner = found.slot.unique(return_inverse=True)
        held = len(touched) * n  # what is kept comes first, then what is new
        every = torch.cat([self.keys[touched].flatten(), keys])
        latent = torch.cat([torch.arange(len(touched)).repeat_interleave(n), owner])
        order = every.argsort(stable=True)
        order = order[latent[order].argsort(stable=True)]
        counts = torch.bincount(latent, minlength=len(touched))
        rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[latent[order]]
        out = order[(rank >= n) & (order < held)]
        new = order[(rank < n) & (order >= held)] - held  # as many, latent by latent
        row, column = touched[out // n], out % n
        self.keys[row, column] = keys[new]
        self.window[row, column] = found.window[new]
        self.scale[row, column] = found.scale[new]
        self.shape[row, column] = found.shape[new]
        self.bound[touched] = self.keys[touched].amax(1)

    def sort(self, keys: Tensor) -> None:
        """Order what is kept of each latent by keys `[m, n]`, ascending, and stable."""
        order = keys.argsort(dim=1, stable=True)
        self.keys, self.window, self.scale = (
            x.gather(1, order) for x in (self.keys, self.window, self.scale)
        )
        for row, places in enumerate(order):  # not a second copy of the largest one
            self.shape[row] = self.shape[row, places]
