"""Who writes checkpoints: the training loop itself, or a thread beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor


class Saver:
    """Writes one checkpoint after the other.

    Args:
        beside: whether a thread writes while training goes on.
    """

    def __init__(self, beside: bool) -> None:
        self.beside = beside
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, write: Callable[[], object]) -> None:
        """Have a checkpoint written, after the one before.

        Args:
            write: writes it; what it reads must stay as it is, see `copied`.

        Raises:
            Exception: what the one before raised, or without a thread this one.
        """
        self.wait()
        if not self.beside:
            write()
            return
        # Not a daemon: the interpreter waits until the file is whole.
        self._thread = threading.Thread(target=self._run, args=(write,), name="fastsae checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was begun is on the disk.

        Raises:
            Exception: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:
            self._error = error


def copied(state: Any) -> Any:
    """Return a state whose tensors training does not change."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {name: copied(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return [copied(value) for value in state]
    return state
