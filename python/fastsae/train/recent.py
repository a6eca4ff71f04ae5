"""The last batches of a run, from which inference-time thresholds are estimated."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

from fastsae.nn import SAE

LAST_BATCHES = 32
"""Training batches from which thresholds are estimated at the end of a run,"""
LAST_BYTES = 1 << 29
"""as far as this many bytes hold them."""


class RecentBatches:
    """The encoded inputs of the last steps, for classes that estimate thresholds from them.

    Args:
        sae: whose thresholds are estimated.
        steps: of the whole run.
        batch_size: rows of a batch.
    """

    def __init__(self, sae: SAE, steps: int, batch_size: int) -> None:
        self._sae = sae
        self._inputs: deque[Tensor] = deque()
        width = sum(sae.columns.inputs) * sae.W_enc_rows.element_size()
        count = min(LAST_BATCHES, max(1, LAST_BYTES // (batch_size * width)))
        if type(sae).estimate_threshold_ is SAE.estimate_threshold_:
            count = 0
        self.first_step = max(0, steps - count)
        """Steps done before the first batch that is kept."""
        self.begin: dict[str, Any] | None = None
        """Where in the run and in the data the kept batches begin; None before that."""

    def at_step(self, step: int, position: Any) -> None:
        """Note the position of the data before update `step`, counted from 0."""
        if step == self.first_step:
            self.begin = {"step": step, "data": position}

    def add(self, x: Tensor, steps_done: int) -> None:
        """Keep the scaled batch `x: [n, columns]` of the update just done, if it is one of them."""
        if steps_done > self.first_step:
            self._inputs.append(self._sae.columns.split(x).x)

    def estimate_threshold_(self) -> None:
        """Estimate the thresholds of the SAE from what is kept, and keep it no longer."""
        if self._inputs:
            self._sae.estimate_threshold_(self._inputs)
            self.clear()

    def clear(self) -> None:
        """Keep nothing of what was added."""
        self._inputs.clear()
