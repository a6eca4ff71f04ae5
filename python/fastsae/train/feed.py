"""Copy batches from memory to a GPU while it works on earlier ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Feed:
    """Sends batches through two buffers of pinned memory, in turn.

    From pageable memory the driver copies through a buffer of its own, a piece at a time, and the
    thread waits. From a pinned one the copy engine reads by itself; only before a buffer is filled
    again does the thread wait, for the copy out of it. Numbers travel in the dtype that they have,
    so 16-bit stores send half of the bytes.

    Args:
        device: where batches are wanted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor | None] = [None, None]
        self._sent: list[Any] = [None, None]
        self._turn = 0

    def __call__(self, batch: Tensor) -> Tensor:
        """Return `batch` on the device, ready for what follows on the current stream.

        What does not come from the memory of the CPU, or stays there, is returned as it is.
        """
        if not self._travels(batch):
            return batch
        turn, self._turn = self._turn, 1 - self._turn
        if self._sent[turn] is not None:
            self._sent[turn].synchronize()
        buffer = self._buffers[turn]
        if buffer is None or buffer.dtype != batch.dtype or buffer.numel() < batch.numel():
            self._buffers[turn] = buffer = self._pinned(batch)
        part = buffer[: batch.numel()].view(batch.shape)
        part.copy_(batch)  # torch copies with several threads, without the GIL
        out = self._send(part)
        self._sent[turn] = self._event()
        return out

    def _travels(self, batch: Tensor) -> bool:
        is_here = isinstance(batch, Tensor) and batch.device.type == "cpu"
        return is_here and self.device.type == "cuda"

    def _pinned(self, like: Tensor) -> Tensor:
        return torch.empty(like.numel(), dtype=like.dtype, pin_memory=True)

    def _send(self, part: Tensor) -> Tensor:
        return part.to(self.device, non_blocking=True)

    def _event(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()
