"""Where rows of activations come from: one protocol for tensors, stores, streams and your own.

A source is asked for batches, and the iterator that it returns may be asked for its state. The
trainer, validation and `eval.evaluate` read nothing else.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor

from fastsae._files import checksum

Span = tuple[int, int]
"""Rows from the first number on, up to the second."""
PIECE = 64
"""Rows in a row that are held back: neighbors in a text are alike, so many short pieces say more
than few long ones."""


@runtime_checkable
class ActivationSource(Protocol):
    """Rows of `d_in` numbers.

    Optional: `__len__`, the number of rows of one pass, without which a run needs its number of
    steps; `sample(n) -> Tensor [<= n, d_in]`, rows drawn from all of them for statistics, without
    which the first batches serve; `fingerprint() -> str`, the same for the same content only,
    without which a run may be resumed on other data unnoticed; and `hold_back(n) -> (rest, held)`,
    two sources without a common row, the second of about `n` rows that stand for all of them, the
    same at every call, without which thresholds come from rows that were trained on.
    """

    d_in: int

    def batches(self, batch_size: int, *, seed: int | None = 0) -> Iterator[Tensor]:
        """Return an iterator of batches `[<= batch_size, d_in]`, floating point, on any device.

        With a seed: shuffled, full batches, pass after pass, the same ones in every process. With
        None: one pass in order, all rows, the last batch as small as it comes.

        An iterator that also has `state_dict() -> dict` and `load_state_dict(dict)` makes runs
        resumable: a new iterator of the same arguments continues after loading where the state was
        taken. States hold JSON values and tensors.
        """


class EpochBatches:
    """Endless shuffled epochs of full batches, with a state.

    Args:
        epoch_batches: from the number of an epoch and of a batch to the batches of the epoch from
            that one on.
        per_epoch: full batches in an epoch, at least 1.
    """

    def __init__(
        self, epoch_batches: Callable[[int, int], Iterator[Tensor]], per_epoch: int
    ) -> None:
        self._epoch_batches, self._per_epoch = epoch_batches, per_epoch
        self._epoch = self._batch = 0
        self._current: Iterator[Tensor] | None = None

    def __iter__(self) -> EpochBatches:
        return self

    def __next__(self) -> Tensor:
        if self._batch >= self._per_epoch:
            self._epoch, self._batch, self._current = self._epoch + 1, 0, None
        if self._current is None:
            self._current = self._epoch_batches(self._epoch, self._batch)
        batch = next(self._current, None)
        if batch is None:
            raise RuntimeError(
                f"batches: expected {self._per_epoch} batches in epoch {self._epoch}, "
                f"got {self._batch}"
            )
        self._batch += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the epoch and the number of batches taken from it."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position that `state_dict` returned."""
        self._epoch, self._batch, self._current = state["epoch"], state["batch"], None


class TensorSource:
    """The rows of `x: [n, d_in]`, permuted anew each epoch; the last partial batch is dropped.

    Raises:
        ValueError: x is not a floating-point matrix.
    """

    def __init__(self, x: Tensor) -> None:
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(
                f"TensorSource: expected floating x [n, d_in], got {x.dtype} {[*x.shape]}"
            )
        self.x = x
        self.d_in = x.shape[1]
        self._spans = [(0, len(x))] if len(x) else []

    def __len__(self) -> int:
        """Return the number of rows."""
        return sum(stop - start for start, stop in self._spans)

    def batches(self, batch_size: int, *, seed: int | None = 0) -> Iterator[Tensor]:
        """See `ActivationSource.batches`."""
        if seed is None:
            return (part for a, b in self._spans for part in self.x[a:b].split(batch_size))
        return EpochBatches(
            lambda epoch, start: self._epoch(batch_size, seed, epoch, start),
            len(self) // batch_size,
        )

    def _epoch(self, batch_size: int, seed: int, epoch: int, start: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed((seed << 24) + epoch)
        order = self._places(torch.randperm(len(self), generator=generator))
        for i in range(start, len(self) // batch_size):
            yield self._take(order[i * batch_size : (i + 1) * batch_size])

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Return `min(n, len(self))` different rows, drawn at random, in order."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self), generator=generator)[:n].sort().values
        return self._take(self._places(chosen))

    def fingerprint(self) -> str:
        """Return a checksum of all rows of x."""
        return checksum.of_rows(self.x)

    def hold_back(self, n: int) -> tuple[Self, Self]:
        """Return a source of all but `n` rows, and one of these; nothing is copied.

        They are pieces of 64 rows at equal distances.
        """
        parts = copy.copy(self), copy.copy(self)
        for part, spans in zip(parts, spread(len(self), n), strict=True):
            part._spans = within(self._spans, spans)
        return parts

    def _take(self, rows: Tensor) -> Tensor:
        return self.x[rows.to(self.x.device)]

    def _places(self, chosen: Tensor) -> Tensor:
        """Return where in x the rows `chosen: [m]` of this source are."""
        if len(self._spans) > 1 or (self._spans and self._spans[0][0]):
            chosen = torch.cat([torch.arange(*span) for span in self._spans])[chosen]
        return chosen


class IterableSource:
    """Rows from any iterable of tensors `[m, d_in]`, such as a DataLoader or a generator.

    Rows are taken in the order in which they come and cut into batches. An iterable that can be
    iterated again is, for further passes; an iterator ends where it ends. If it has `state_dict`
    and `load_state_dict`, runs are resumable.

    Args:
        rows: yields floating-point tensors; the first one is looked at here.

    Raises:
        TypeError: not an iterable of tensors.
        ValueError: it yields nothing, or a tensor of another shape.
    """

    def __init__(self, rows: Iterable[Tensor]) -> None:
        self._rows = rows
        self._waiting: deque[tuple[Any, Tensor]] = deque()
        self._iterator = iter(rows)
        if not self._pull():
            raise ValueError("IterableSource: expected at least one tensor, got none")
        self.d_in: int = self._waiting[0][1].shape[1]

    def batches(self, batch_size: int, *, seed: int | None = 0) -> Iterator[Tensor]:
        """See `ActivationSource.batches`; the order is that of the iterable."""
        if seed is None and self._rows is not self._iterator:  # one pass, from the start
            self._waiting.clear()
            self._iterator = iter(self._rows)
        return _Rebatched(self, batch_size, endless=seed is not None)

    def known_rows(self) -> int | None:
        """Return the number of rows of a list or tuple, None of another iterable."""
        listed = isinstance(self._rows, list | tuple)
        return sum(map(len, self._rows)) if listed else None

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Return about `n` rows: the first that are still to come, which are not lost by it."""
        while sum(len(chunk) for _, chunk in self._waiting) < n and self._pull():
            pass
        return torch.cat([chunk for _, chunk in self._waiting])[:n]

    def hold_back(self, n: int) -> tuple[ActivationSource, ActivationSource]:
        """Return a source of all but `n` rows, and one of these.

        Of a list or tuple they are pieces of 64 rows at equal distances. Of other iterables, the
        `n` rows that come next when they are asked for, after training: no row of an iterator is
        lost by it, and there are none if it has ended.
        """
        if not isinstance(self._rows, list | tuple):
            return self, _Following(self, n)
        rest, held = spread(sum(map(len, self._rows)), n)
        return IterableSource(_cut(self._rows, rest)), IterableSource(_cut(self._rows, held))

    def take(self, endless: bool) -> tuple[Any, Tensor] | None:
        """Return the next tensor and the state before it; None at the end."""
        if not self._waiting and not self._pull():
            if not endless or self._rows is self._iterator:
                return None
            self._iterator = iter(self._rows)
            if not self._pull():
                return None
        return self._waiting.popleft()

    @property
    def stateful(self) -> Any:
        """What has the state of the iteration: the iterator, the iterable, or None."""
        for candidate in (self._iterator, self._rows):
            if hasattr(candidate, "state_dict") and hasattr(candidate, "load_state_dict"):
                return candidate
        return None

    def position(self) -> Any:
        """Return the state from which the next tensor comes."""
        return self._waiting[0][0] if self._waiting else self.stateful.state_dict()

    def restart(self, state: Any) -> None:
        """Continue the iterable at `state`."""
        stateful = self.stateful
        stateful.load_state_dict(state)
        self._waiting.clear()
        if stateful is not self._iterator:
            self._iterator = iter(self._rows)

    def _pull(self) -> bool:
        while True:
            state = self.stateful.state_dict() if self.stateful is not None else None
            chunk = next(self._iterator, None)
            if chunk is None:
                return False
            if not isinstance(chunk, Tensor) or len(chunk):
                break
        if not isinstance(chunk, Tensor) or not chunk.is_floating_point() or chunk.ndim != 2:
            got = [*chunk.shape] if isinstance(chunk, Tensor) else type(chunk).__name__
            raise TypeError(f"IterableSource: expected floating tensors [m, d_in], got {got}")
        self._waiting.append((state, chunk))
        return True


class _Following:
    """One batch of the next `n` rows of a stream, if it still has as many."""

    def __init__(self, stream: IterableSource, n: int) -> None:
        self.d_in, self._stream, self._n = stream.d_in, stream, n

    def batches(self, batch_size: int, *, seed: int | None = 0) -> Iterator[Tensor]:
        """See `ActivationSource.batches`; the size is `n`, whatever is asked for."""
        return islice(_Rebatched(self._stream, self._n, endless=True), 1)


class _Rebatched:
    """Batches of one size from the tensors of an `IterableSource`."""

    def __init__(self, source: IterableSource, batch_size: int, endless: bool) -> None:
        self._source, self._size, self._endless = source, batch_size, endless
        self._chunk: Tensor | None = None
        self._state: Any = None  # of the source, before `_chunk`
        self._used = 0

    def __iter__(self) -> _Rebatched:
        return self

    def __next__(self) -> Tensor:
        parts: list[Tensor] = []
        missing = self._size
        while missing:
            if self._chunk is None:
                taken = self._source.take(self._endless)
                if taken is None:
                    break
                self._state, self._chunk = taken
                self._used = 0
            part = self._chunk[self._used : self._used + missing]
            parts.append(part)
            self._used += len(part)
            missing -= len(part)
            if self._used >= len(self._chunk):
                self._chunk = None
        if not parts or (self._endless and missing):
            raise StopIteration
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __getattr__(self, name: str) -> Any:
        # Only an iterable with a state gives iterators with one.
        if name in ("state_dict", "load_state_dict") and self._source.stateful is not None:
            return {"state_dict": self._save, "load_state_dict": self._load}[name]
        raise AttributeError(name)

    def _save(self) -> dict[str, Any]:
        if self._chunk is None:
            return {"source": self._source.position(), "used": 0}
        return {"source": self._state, "used": self._used}

    def _load(self, state: dict[str, Any]) -> None:
        self._source.restart(state["source"])
        self._chunk, self._used = None, 0
        if state["used"] and (taken := self._source.take(self._endless)) is not None:
            (self._state, self._chunk), self._used = taken, state["used"]


def as_source(owner: str, name: str, data: Any) -> ActivationSource:
    """Return `data` as a source: a tensor, an iterable of tensors, or a source as it is.

    Raises:
        TypeError: data is something else.
        ValueError: a tensor that is no floating-point matrix.
    """
    if isinstance(data, Tensor):
        return TensorSource(data)
    if isinstance(data, ActivationSource):
        return data
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | dict):
        return IterableSource(cast("Iterable[Tensor]", data))
    raise TypeError(
        f"{owner}: expected {name} to be a tensor [n, d_in], an iterable of such tensors, or to "
        f"have d_in and batches, got {type(data).__name__}"
    )


def spread(rows: int, n: int) -> tuple[list[Span], list[Span]]:
    """Return all but `n` of `rows` rows, and these: pieces of `PIECE` rows at equal distances.

    Each lies in the middle of its part of the rows; `n` is at most half of them.
    """
    count = -(-n // PIECE)
    rest, held, at = [], [], 0
    for i in range(count):
        part = i * rows // count, (i + 1) * rows // count
        size = (i + 1) * n // count - i * n // count
        start = (part[0] + part[1] - size) // 2
        rest.append((at, start))
        held.append((start, start + size))
        at = start + size
    rest.append((at, rows))
    return [(a, b) for a, b in rest if a < b], held


def within(spans: list[Span], chosen: list[Span]) -> list[Span]:
    """Return where the rows `chosen` of those in `spans` are; both ascending."""
    found, at = [], 0
    for start, stop in spans:
        for a, b in chosen:
            first, last = max(a - at, 0), min(b - at, stop - start)
            if first < last:
                found.append((start + first, start + last))
        at += stop - start
    return found


def _cut(tensors: list[Tensor] | tuple[Tensor, ...], chosen: list[Span]) -> list[Tensor]:
    """Return views of the rows `chosen` of all tensors."""
    found, at = [], 0
    for tensor in tensors:
        spans = within([(at, at + len(tensor))], [(a - at, b - at) for a, b in chosen])
        found += [tensor[a - at : b - at] for a, b in spans]
        at += len(tensor)
    return found


def hold_back(source: ActivationSource, n: int) -> tuple[ActivationSource, ActivationSource] | None:
    """Return a source of all but `n` rows, and one of these; None where the source cannot."""
    method = getattr(source, "hold_back", None)
    return None if method is None else method(n)


def known_rows(source: ActivationSource) -> int | None:
    """Return the number of rows of one pass, of a list of tensors too; None where nobody knows."""
    method = getattr(source, "known_rows", None)
    return source_len(source) if method is None else method()


def source_len(source: ActivationSource) -> int | None:
    """Return the number of rows of one pass, None where the source does not know."""
    return len(source) if isinstance(source, Sized) else None


def fingerprint(source: ActivationSource) -> str | None:
    """Return what stands for the content of a source, None where the source does not know."""
    known = getattr(source, "fingerprint", None)
    return None if known is None else str(known())


def sample_rows(source: ActivationSource, n: int, batch_size: int, seed: int = 0) -> Tensor:
    """Return about `n` rows for statistics: `source.sample(n)`, or the first batches."""
    sample = getattr(source, "sample", None)
    if sample is not None:
        rows: Tensor = sample(n)
        return rows
    parts: list[Tensor] = []
    for batch in source.batches(batch_size, seed=seed):
        parts.append(batch)
        if sum(map(len, parts)) >= n:
            break
    return torch.cat(parts)
