"""A bfloat16 copy of a matrix, and whether it still is one.

The encoder's matmul rounds its factors to bfloat16, and to convert the matrix takes a pass over it
in every step; a decoder that reads rows of bfloat16 reads half the bytes. `sparse_adam_step_`
writes the copies while it holds the rows that it has just moved.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fastsae.types import StepTensors


class Rounded:
    """A copy of a float32 matrix in bfloat16, and of which state of the matrix it is one.

    A write to the matrix changes torch's counter of writes, and other memory its address. The fused
    optimizers of torch do not count, so that a step of any optimizer of a matrix counts here. What
    else torch does not count is not noticed: a write in place through `.data`, a collective of
    `torch.distributed`, and another library that has the same memory (numpy, DLPack).

    Args:
        matrix: [d_sae, d].
    """

    def __init__(self, matrix: Tensor) -> None:
        self.copy = torch.empty_like(matrix, dtype=torch.bfloat16)
        self._of: Tensor | None = None  # keeps its memory, so that the address is no other's
        self._version = -1
        _watch_optimizers()
        _alive.add(self)

    def is_of(self, matrix: Tensor) -> bool:
        """Return whether the copy is one of what `matrix` holds now."""
        known = self._of
        if known is None or matrix.shape != known.shape or matrix.stride() != known.stride():
            return False
        return matrix.data_ptr() == known.data_ptr() and matrix._version == self._version

    def written(self, matrix: Tensor) -> None:
        """Take note that the copy has just been written together with `matrix`."""
        self._of, self._version = matrix.detach(), matrix._version

    def refresh(self, matrix: Tensor) -> None:
        """Make the copy anew unless it is one of what `matrix` holds."""
        if not self.is_of(matrix):
            self.copy.copy_(matrix.detach())
            self.written(matrix)

    def forget(self, storages: set[int]) -> None:
        """Be a copy of nothing if the matrix is in one of these storages."""
        if self._of is not None and self._of.untyped_storage().data_ptr() in storages:
            self._of = None


class Copies(NamedTuple):
    """Copies of the matrices of a dictionary; None of one that is read itself."""

    W_enc: Rounded | None = None
    W_dec: Rounded | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """What an update writes."""
        enc, dec = self
        return None if enc is None else enc.copy, None if dec is None else dec.copy

    def refresh(self, parameters: StepTensors) -> None:
        """Make copies anew that are not of what the parameters hold."""
        for rounded, matrix in zip(self, parameters, strict=False):
            if rounded is not None:
                rounded.refresh(matrix)

    def written(self, parameters: StepTensors) -> None:
        """Take note that all copies have just been written together with the parameters."""
        for rounded, matrix in zip(self, parameters, strict=False):
            if rounded is not None:
                rounded.written(matrix)


_alive: WeakSet[Rounded] = WeakSet()


def _forget_moved(optimizer: Optimizer, *_: Any) -> None:
    """Forget the copies of what an optimizer has moved."""
    if not _alive:
        return
    moved = (p for group in optimizer.param_groups for p in group["params"])
    storages = {p.untyped_storage().data_ptr() for p in moved if p.layout == torch.strided}
    for rounded in list(_alive):
        rounded.forget(storages)


@cache
def _watch_optimizers() -> None:
    """Look at every step of an optimizer of torch from now on: once there is a copy at all."""
    register_optimizer_step_post_hook(_forget_moved)
