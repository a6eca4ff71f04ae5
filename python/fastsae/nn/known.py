"""Numbers on the device that the host knows, so that it need not wait for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsae.types import is_plain


class Known:
    """A number that is read from a tensor once, and again when the tensor may hold another.

    That is so after a write that torch counts (a state dict that is loaded, an operator in place),
    and for another tensor (a module that was moved or copied). What torch does not count is not
    noticed: a write in place through `.data`, a collective of `torch.distributed`, and the replay
    of a graph, after which `count` is called.
    """

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._version = -1
        self._number = 0

    def __reduce__(self) -> tuple[type[Known], tuple[()]]:
        return Known, ()  # a copy is of another tensor, whose writes are counted from 0

    def of(self, t: Tensor, read: Callable[[Tensor], int] = int) -> int:
        """Return `read(t)`; waits for the device where that is not known."""
        if torch.compiler.is_compiling() or not is_plain(t) or t.is_inference():
            return read(t)
        if self._of is not t or self._version != t._version:
            self.set(t, read(t))
        return self._number

    def set(self, t: Tensor, number: int) -> None:
        """Take note that `number` is what would be read from `t` now."""
        if not torch.compiler.is_compiling() and is_plain(t) and not t.is_inference():
            self._of, self._version, self._number = t, t._version, number

    def count(self, t: Tensor) -> None:
        """Take note that a graph has just added 1 to `t`, whose number was known before."""
        self.set(t, self._number + 1)
