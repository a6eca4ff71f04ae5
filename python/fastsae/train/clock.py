"""How long a run has trained, over all its interruptions."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, ClassVar


class Clock:
    """Counts seconds of training: of updates, of their metrics, and of waiting for their batches.

    Validation and the writing of files do not count, so runs that differ in them have one axis. The
    time between an interruption and its continuation does not either, nor do updates that are done
    again because no checkpoint held them.
    """

    now: ClassVar[Callable[[], float]] = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.began = time.time()
        """When the run began, in Unix time."""
        self._counted = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """What was counted until now."""
        running = 0.0 if self._since is None else type(self).now() - self._since
        return self._counted + running

    def start(self) -> None:
        """Count from now on."""
        self._since = type(self).now()

    def stop(self) -> None:
        """Count no longer."""
        self._counted, self._since = self.seconds, None

    @contextmanager
    def paused(self) -> Generator[None]:
        """Do not count what happens inside."""
        self.stop()
        yield
        self.start()

    def state_dict(self) -> dict[str, float]:
        """Return what a continuation counts on from."""
        return {"began": self.began, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on from a state."""
        self.began, self._counted, self._since = state["began"], state["seconds"], None
