"""Batches made ready by a thread while the GPU works on those before."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from queue import Full, Queue
from threading import Event, Thread

import torch
from torch import Tensor

Ready = tuple[Tensor, torch.cuda.Event | None]
WAIT = 0.1  # seconds between two looks at whether somebody still reads


def ahead(batches: Iterator[Tensor], device: torch.device, depth: int = 2) -> Generator[Tensor]:
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
                for x in batches:
                    put((x, stream.record_event() if stream is not None else None))
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
            x, ready = item
            if ready is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(ready)
                x.record_stream(current)
            yield x
    finally:
        stopped.set()
        thread.join()
