"""Rows straight from a running model: harvest and training at the same time, without a store."""

from __future__ import annotations

import copy
import ctypes
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future
from contextlib import suppress
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastsae._files import checksum
from fastsae.data.contexts import ContextBatches, ContextReader, check_reading, weights_checksum
from fastsae.data.source import TensorSource
from fastsae.models.chunks import Chunk, chunks, held_out, prefix_token
from fastsae.models.threads import alone

HELD_OUT = 0.05
"""Share of the documents that `hold_back` keeps from training."""
WAITING = 2048
"""Contexts that wait to be drawn at random: half a buffer of rows may be three long documents, and
the tokens of many contexts take little memory."""


def stream(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Any],
    sites: str | Sequence[str],
    *,
    buffer_rows: int = 2**17,
    context: int = 256,
    batch_size: int = 8,
    drop_prefix: int = 1,
    prefix_id: int | None = None,
    skip_token_ids: Sequence[int] = (),
    max_norm_ratio: float | None = None,
    threads: int | None = None,
) -> Stream:
    """Return the activations of a model over documents, as a source for `Trainer` and evaluation.

        source = fastsae.data.stream(model, tokenizer, texts, "resid_post.15")
        Trainer(sae, source, TrainConfig(total_tokens=10_000_000)).fit()

    While rows of one half of the buffer are trained on, in random order, a thread fills the other
    half. Documents are cut into contexts as in `harvest`, and these come in random order. A run
    that is resumed continues with the same rows, if `texts` gives the same documents again: those
    before are skipped without running the model, and compared by their checksum.

    Args:
        model: a language model of `transformers`, in eval mode; its weights must stay as they are.
        tokenizer: as in `harvest`, like all that is not said here.
        texts: documents as in `harvest`. A list, a dataset, or anything that can be iterated again
            is, for further passes; an iterator ends where it ends. What can be indexed is trained
            on in random order, which differs from pass to pass; of others 2,048 contexts are mixed.
        sites: one site or several; rows hold their activations next to each other, in this order.
        buffer_rows: rows of both halves together, so what is in memory; half of them are mixed.
        context: tokens of a context, its prefix included.
        batch_size: contexts of a forward pass.
        drop_prefix: positions at the start of a context that give no row.
        prefix_id: the token in front of every context.
        skip_token_ids: tokens that give no row.
        max_norm_ratio: a token whose norm is above this many times the median of the first 4,096
            rows or more gives no row.
        threads: of the thread that runs the model on a CPU, and, as torch has it, of threads that
            begin later; None leaves it to torch.

    Raises:
        ValueError: a site that is not what its name says, or sizes below 1.
    """
    names = [sites] if isinstance(sites, str) else list(sites)
    check_reading("stream", model, names, context, drop_prefix, batch_size, max_norm_ratio)
    if buffer_rows < 1:
        raise ValueError(f"stream: expected buffer_rows >= 1, got {buffer_rows}")
    prefix = prefix_token(tokenizer) if prefix_id is None else prefix_id
    reader = ContextReader(
        model,
        names,
        prefix_id=prefix,
        drop_prefix=drop_prefix,
        skip_token_ids=skip_token_ids,
        owner="stream",
    )
    return Stream(
        reader,
        _Documents(tokenizer, texts, context, prefix, batch_size),
        buffer_rows,
        max_norm_ratio,
        threads,
    )


class _Once:
    """An iterator that can be looked into: what a sample takes of it comes again."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._kept: list[Any] = []
        self.used = False
        """Whether training has begun, after which nothing is kept."""

    def __iter__(self) -> Iterator[Any]:
        yield from list(self._kept)
        for document in self._iterator:
            if not self.used:
                self._kept.append(document)
            yield document


class _Documents:
    """Documents, from the first one on, as often as they can be iterated."""

    def __init__(
        self, tokenizer: Any, texts: Iterable[Any], context: int, prefix: int, size: int
    ) -> None:
        self._once = _Once(texts) if isinstance(texts, Iterator) else None
        self._texts = texts if self._once is None else self._once
        self._tokenizer, self._context, self._prefix = tokenizer, context, prefix
        self._size = size
        self.held: bool | None = None
        """Only documents that are held out, or only others; None: all."""
        count = len(texts) if isinstance(texts, Sized) else 0
        self._share = max(HELD_OUT, 1 / count) if count > 1 else HELD_OUT  # one at least

    @property
    def endless(self) -> bool:
        """Whether they can be iterated again and again."""
        return self._once is None

    def batches(self, order: int | None = None, *, training: bool = False) -> ContextBatches:
        """Return their contexts in batches, from the first one on.

        Args:
            order: a seed of the order in which contexts come, and documents that can be indexed;
                None: as they are.
            training: whether this is what an iterator is kept for.
        """
        if training and self._once is not None:
            if self._once.used:
                raise RuntimeError(
                    "stream: expected texts that can be iterated again, got an iterator that has "
                    "been; give a list, a dataset, or an object whose __iter__ begins anew"
                )
            self._once.used = True
        texts = self._in_order() if order is None else self._mixed(order)
        every = chunks(self._tokenizer, texts, self._context, self._prefix)
        return ContextBatches(every if order is None else _shuffled(every, order), self._size)

    def _wanted(self, number: int) -> bool:
        return self.held is None or held_out(number, self._share) == self.held

    def _in_order(self) -> Iterator[Any]:
        return (text for i, text in enumerate(self._texts) if self._wanted(i))

    def _mixed(self, seed: int) -> Iterator[Any]:
        texts: Any = self._texts
        if not (hasattr(texts, "__getitem__") and hasattr(texts, "__len__")):
            return self._in_order()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(texts), generator=generator).tolist()
        return (texts[i] for i in order if self._wanted(i))


class Stream:
    """What `stream` returns: an `ActivationSource` without a length."""

    def __init__(
        self,
        reader: ContextReader,
        documents: _Documents,
        buffer_rows: int,
        max_norm_ratio: float | None,
        threads: int | None,
    ) -> None:
        self.reader, self.buffer_rows, self.threads = reader, buffer_rows, threads
        self._documents, self._ratio = documents, max_norm_ratio
        self._limit: int | None = None
        self.sites = tuple(site.name for site in reader.sites)
        """In the order of their columns."""
        self.d_in = sum(reader.widths.values())

    @property
    def widths(self) -> dict[str, int]:
        """Site -> its number of columns, in their order."""
        return {name: self.reader.widths[name] for name in self.sites}

    @property
    def max_norm(self) -> float | None:
        """The largest norm that a row has at the first site; None where none is dropped."""
        return self.reader.max_norm.get(self.sites[0])

    def batches(self, batch_size: int, *, seed: int | None = 0) -> Iterator[Tensor]:
        """See `ActivationSource.batches`: of a seed, contexts are mixed, and rows of a half."""
        if seed is None:
            rows = self._rows(self._documents.batches())
            return _cut(rows if self._limit is None else _first(rows, self._limit), batch_size)
        return StreamBatches(self, batch_size, seed)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Return at most `n` rows, drawn at random from the first 2 n; they come again later."""
        parts = list(_first(self._rows(self._documents.batches(seed)), 2 * n))
        if not parts:
            raise ValueError("stream: expected at least one token of text, got none")
        return TensorSource(torch.cat(parts)).sample(n, seed)

    def fingerprint(self) -> str:
        """Return what stands for the model and the sites; the documents are checked on the way."""
        return checksum.of_json([weights_checksum(self.reader.model), self.sites])

    def hold_back(self, n: int) -> tuple[Self, Self]:
        """Return a stream of all documents but every twentieth, or the last of fewer, and `n` rows
        of those."""
        rest, held = copy.copy(self), copy.copy(self)
        for part, is_held in ((rest, False), (held, True)):
            part._documents = copy.copy(self._documents)
            part._documents.held = is_held
        held._limit = n
        return rest, held

    def _rows(self, batches: ContextBatches) -> Iterator[Tensor]:
        """Yield rows `[m, d_in]` of one batch of contexts after the other."""
        self.limit_norms(batches)
        for batch in batches:
            yield self.read(batch)

    def limit_norms(self, batches: ContextBatches) -> None:
        """Find out which norm is usual, if that matters and is not known."""
        if self._ratio is not None and not self.reader.max_norm:
            with alone():
                self.reader.limit_norms(batches, self._ratio)

    def read(self, batch: list[Chunk]) -> Tensor:
        """Return the rows `[m, d_in]` of a batch of contexts."""
        if self.reader.model.training:
            raise RuntimeError(
                f"stream: expected {type(self.reader.model).__name__} in eval mode, got it in "
                "training mode; call model.eval()"
            )
        with alone():
            acts = self.reader.read(batch).acts
        parts = [acts[name] for name in self.sites]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def documents(self, seed: int) -> ContextBatches:
        """Return the contexts to train on, from the first document on, in an order of this seed."""
        return self._documents.batches(seed, training=True)

    @property
    def endless(self) -> bool:
        """Whether there is a pass after each pass."""
        return self._documents.endless


START: dict[str, Any] = {"half": 0, "pass": 0, "contexts": 0, "skip": 0, "checksum": None}
"""Where half a buffer begins: its number, that of the pass over the documents, batches of contexts
before it in this pass, rows of the next one that were in the half before, and what stands for the
documents until there."""


class StreamBatches:
    """Mixed batches of a stream, and where it is.

    A state says which half buffer is being read, how much of it, and with which batch of contexts
    it began; loading runs the model over that half again.
    """

    def __init__(self, source: Stream, batch_size: int, seed: int) -> None:
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        weakref.finalize(self, _end, self._stopping, self._threads)
        half = source.buffer_rows // 2
        if half < batch_size:
            raise ValueError(
                f"stream: expected buffer_rows >= 2 * batch_size = {2 * batch_size}, got "
                f"{source.buffer_rows}"
            )
        self._source, self._batch_size, self._seed = source, batch_size, seed
        self._per_half = half // batch_size * batch_size
        self._begin: dict[str, Any] = dict(START)
        self._batch = 0  # of the half being read
        self._filler: _Filler | None = None
        self._next: Future[_Half | None] | None = None
        self._half: _Half | None = None

    def __iter__(self) -> StreamBatches:
        return self

    def __next__(self) -> Tensor:
        while self._half is None or (self._batch + 1) * self._batch_size > len(self._half.order):
            if not self._advance():
                raise StopIteration
        start = self._batch * self._batch_size
        self._batch += 1
        return self._half.rows[self._half.order[start : start + self._batch_size]]

    def state_dict(self) -> dict[str, Any]:
        """Return the position; see `ActivationSource.batches`."""
        return {**self._begin, "batch": self._batch, "max_norm": dict(self._source.reader.max_norm)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position that `state_dict` returned.

        Raises:
            ValueError: the documents before it are others.
        """
        self._stop()
        self._begin = {name: state[name] for name in self._begin}
        self._batch = state["batch"]
        self._source.reader.max_norm = dict(state["max_norm"])

    def _advance(self) -> bool:
        """Read the next half, and have the one after it filled; False at the end."""
        if self._filler is None:
            self._filler = _Filler(self._source, self._per_half, self._seed, self._begin)
            self._next = self._start(self._filler)
        elif self._half is not None:
            self._batch = 0
        assert self._next is not None
        self._half = None  # its memory is needed
        half = self._next.result()
        if half is None:
            return False
        self._half, self._begin = half, half.begin
        self._next = self._start(self._filler)
        return True

    def _stop(self) -> None:
        """Leave the thread's work."""
        if self._next is not None:
            self._stopping.set()
            self._threads[-1].join()
            self._stopping.clear()
        self._filler = self._next = self._half = None

    def _start(self, filler: _Filler) -> Future[_Half | None]:
        """Fill the next half in a thread, which the process does not wait for at its end."""
        future: Future[_Half | None] = Future()
        stopping = self._stopping

        def fill() -> None:
            try:
                future.set_result(filler.fill(stopping))
            except BaseException as error:  # raised by who waits for it
                future.set_exception(error)

        self._threads[:] = [threading.Thread(target=fill, name="fastsae-stream", daemon=True)]
        self._threads[0].start()
        return future


def _end(stopping: threading.Event, threads: list[threading.Thread]) -> None:
    """Have the thread stop after the batch of contexts that it is at."""
    stopping.set()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(60)


class _Half:
    """Rows of half a buffer, the order in which they are read, and where they began."""

    def __init__(self, rows: Tensor, order: Tensor, begin: dict[str, Any]) -> None:
        self.rows, self.order, self.begin = rows, order, begin


class _Filler:
    """Fills one half after the other, from a place on."""

    def __init__(self, source: Stream, rows: int, seed: int, begin: dict[str, Any]) -> None:
        self._source, self._count, self._seed = source, rows, seed
        self._half, self._pass = begin["half"], begin["pass"]
        self._open()
        for _ in islice(self._batches, begin["contexts"]):
            pass
        if begin["checksum"] not in (None, self._contexts.checksum()):
            raise ValueError(
                "stream: expected the documents that the run began with, got others before batch "
                f"{begin['contexts']} of contexts"
            )
        self._rows: Tensor | None = None  # of the batch of contexts that is being used
        self._used = begin["skip"]
        self._place = self._here()

    def _open(self) -> None:
        self._contexts = self._source.documents((self._seed << 24) + self._pass)
        self._source.limit_norms(self._contexts)
        self._batches = iter(self._contexts)

    def _here(self) -> dict[str, Any]:
        """Return the place of the next batch of contexts."""
        place = {"pass": self._pass, "contexts": self._contexts.count}
        return {**place, "checksum": self._contexts.checksum()}

    def fill(self, stopping: threading.Event) -> _Half | None:
        """Return the next half; None if the documents have ended, or nobody wants it."""
        if self._source.threads is not None:
            torch.set_num_threads(self._source.threads)
        begin: dict[str, Any] | None = None
        half: Tensor | None = None
        filled = 0
        while filled < self._count and not stopping.is_set() and self._more():
            assert self._rows is not None
            if begin is None or half is None:
                begin = {**self._place, "half": self._half, "skip": self._used}
                half = self._rows.new_empty(self._count, self._source.d_in)
            part = self._rows[self._used : self._used + self._count - filled]
            half[filled : filled + len(part)] = part
            filled, self._used = filled + len(part), self._used + len(part)
        _give_back()
        if begin is None or half is None:
            return None
        generator = torch.Generator().manual_seed((self._seed << 24) + self._half)
        self._half += 1
        return _Half(half, torch.randperm(filled, generator=generator), begin)

    def _more(self) -> bool:
        """Have rows that were not used; False if the documents have ended."""
        empty = 0
        while self._rows is None or self._used >= len(self._rows):
            skip = 0 if self._rows is not None else self._used
            self._place = self._here()
            batch = next(self._batches, None)
            if batch is not None:
                self._rows, self._used = self._source.read(batch), skip
                continue
            if not self._source.endless or empty:
                return False
            if self._contexts.count == 0:
                raise ValueError("stream: expected at least one token of text, got none")
            empty += 1
            self._pass += 1
            self._open()
            self._rows, self._used = None, 0
        return True


def _give_back() -> None:
    """Return freed memory to the system: each thread of glibc keeps what its passes took.

    A hundred megabytes for SmolLM2; takes up to 30 ms for half a buffer.
    """
    with suppress(AttributeError, OSError):  # of another libc
        ctypes.CDLL(None).malloc_trim(0)


def _shuffled(contexts: Iterator[Chunk], seed: int) -> Iterator[Chunk]:
    """Yield contexts in random order: one of those that wait, whose place the next one takes."""
    generator = torch.Generator().manual_seed(seed)

    def place(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    waiting = list(islice(contexts, WAITING))
    for context in contexts:
        at = place(len(waiting))
        waiting[at], drawn = context, waiting[at]
        yield drawn
    while waiting:
        at = place(len(waiting))
        waiting[at], waiting[-1] = waiting[-1], waiting[at]
        yield waiting.pop()


def _first(parts: Iterator[Tensor], n: int) -> Iterator[Tensor]:
    """Yield the first `n` rows of some tensors."""
    for part in parts:
        yield part[:n]
        n -= len(part)
        if n <= 0:
            return


def _cut(parts: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Yield the rows of some tensors in batches; the last one is as small as it comes."""
    left = next(parts, None)
    while left is not None:
        while len(left) < size and (more := next(parts, None)) is not None:
            left = torch.cat([left, more])
        if len(left) == 0:
            return
        yield from left[: len(left) // size * size].split(size)
        left = left[len(left) // size * size :]
        more = next(parts, None)
        if more is None:
            if len(left):
                yield left
            return
        left = torch.cat([left, more])
