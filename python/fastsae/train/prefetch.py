"""Prepare batches in a thread while the GPU works on earlier ones."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor

WAIT = 0.1  # seconds between two checks for whether the consumer is still there


class Prepared(NamedTuple):
    """A batch that is ready for a step."""

    x: Tensor
    """[batch_size, columns], on the device, checked and scaled."""
    position: Any
    """State of the data after this batch; None if it has none."""


def prefetch(
    batches: Iterator[Prepared], device: torch.device, depth: int = 2
) -> Generator[Prepared]:
    """Yield what `batches` yields, in order, made by a thread that is up to `depth` ahead.

    On a GPU the thread has a stream of its own: reading, checking and copying a batch overlap with
    the work on the current stream, which waits for nothing but the batch that it gets.

    Args:
        batches: run in the thread, all of it.
        device: that the tensors come to lie on.
        depth: batches that wait at most, besides the one being made.

    Raises:
        Exception: what `batches` raised, in its turn: batches before it are yielded first.
    """
    gpu = device.type == "cuda"
    stream = torch.cuda.Stream(device) if gpu else None
    Ready = tuple[Prepared, torch.cuda.Event | None]
    waiting: Queue[Ready | BaseException | None] = Queue(depth)  # None: the end
    stopped = Event()

    def put(item: Ready | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return waiting.put(item, timeout=WAIT)
            except Full:
                continue

    def work() -> None:
        try:
            with torch.cuda.stream(stream):
                for batch in batches:
                    put((batch, stream.record_event() if stream is not None else None))
                    if stopped.is_set():
                        return
            put(None)
        except BaseException as error:
            put(error)

    thread = Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item = waiting.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            batch, ready = item
            if ready is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(ready)
                batch.x.record_stream(current)
            yield batch
    finally:
        stopped.set()
        thread.join()
