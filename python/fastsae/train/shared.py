"""A source for several runs: what all of them ask for is read once."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

from torch import Tensor

from fastsae.data.source import ActivationSource, sample_rows


def shared(source: ActivationSource, *, keep: bool = False) -> Shared:
    """Return a source of the rows of `source`, for several runs.

    Args:
        source: read by all of them.
        keep: keep what one pass in order reads, for the next run that asks for it.
    """
    return (_SizedShared if isinstance(source, Sized) else Shared)(source, keep)


class Shared:
    """What `shared` returns: it can do what the source can, and gives what the source gives."""

    def __init__(self, source: Any, keep: bool) -> None:
        self.source, self.d_in = source, int(source.d_in)
        self.batch_size, self.seed = 1, 0
        """Of the runs."""
        self._keep = keep
        self._passes: dict[int, list[Tensor]] = {}
        self._samples: dict[int, Tensor] = {}
        self._parts: dict[int, tuple[Shared, Shared]] = {}
        self._fingerprinted: str | None = None
        for name in ("widths", "known_rows"):
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))
        for name in ("fingerprint", "hold_back"):
            if hasattr(source, name):  # a source need not have these
                setattr(self, name, getattr(self, f"_{name}"))

    def batches(self, batch_size: int, *, seed: int | None = 0) -> Iterator[Tensor]:
        """See `ActivationSource.batches`."""
        if seed is not None or not self._keep:
            batches: Iterator[Tensor] = self.source.batches(batch_size, seed=seed)
            return batches
        if batch_size not in self._passes:
            self._passes[batch_size] = list(self.source.batches(batch_size, seed=None))
        return iter(self._passes[batch_size])

    def sample(self, n: int) -> Tensor:
        """Return about `n` rows, the same ones to every run."""
        if n not in self._samples:
            self._samples[n] = sample_rows(self.source, n, self.batch_size, self.seed)
        return self._samples[n]

    def forget(self) -> None:
        """Keep the samples no longer."""
        for part in (self, *(part for parts in self._parts.values() for part in parts)):
            part._samples.clear()

    def _fingerprint(self) -> str:
        if self._fingerprinted is None:
            self._fingerprinted = str(self.source.fingerprint())
        return self._fingerprinted

    def _hold_back(self, n: int) -> tuple[Shared, Shared]:
        if n not in self._parts:
            rest, held = self.source.hold_back(n)
            ours = self if rest is self.source else shared(rest)
            self._parts[n] = ours, shared(held, keep=True)
            for part in self._parts[n]:
                part.batch_size, part.seed = self.batch_size, self.seed
        return self._parts[n]


class _SizedShared(Shared):
    def __len__(self) -> int:
        return len(self.source)
