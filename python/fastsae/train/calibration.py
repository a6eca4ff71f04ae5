"""Which rows are kept from training, so that thresholds can be calibrated on them at its end.

Weights memorize rows that they see many times: a threshold with which those have k active latents
gives new ones more. SmolLM2, block 15, BatchTopK on 16,637 tokens, 16 passes, k = 32: an L0 of 40
to 42 on other documents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsae._log import logger
from fastsae.data.source import ActivationSource, hold_back, known_rows
from fastsae.nn import SAE
from fastsae.train.config import TrainConfig
from fastsae.train.schedule import RunPlan

FEWEST_ROWS, MOST_ROWS = 512, 8192
"""The number of active latents varies from row to row by about half its mean (SmolLM2, k = 32: by
15), so 512 rows tell the L0 of new ones to 2 %."""
MOST_BYTES = 1 << 29
"""What the rows may take together."""


def calibrates(sae: SAE) -> bool:
    """Return whether `sae` has thresholds that rows can set: `calibrate_`, and a target k."""
    return type(sae).calibrate_ is not SAE.calibrate_ and getattr(sae, "k", None) is not None


def calibration_rows(config: TrainConfig, sae: SAE, rows: int | None, plan: RunPlan) -> int:
    """Return how many rows are held back.

    Args:
        config: of the run; its `calibration_rows` counts if the class calibrates, its `hold_back`
            in any case.
        sae: what is trained.
        rows: of the data; None: nobody knows, and those that the run needs count instead.
        plan: length of the run and of a batch.

    Raises:
        ValueError: so many do not fit.
    """
    asked, name = config.hold_back, "hold_back"
    if asked is None:
        if not calibrates(sae) or config.calibration_rows == 0:
            return 0
        asked, name = config.calibration_rows, "calibration_rows"
    total = plan.steps * plan.batch_size if rows is None else rows
    if (n := asked) is not None:
        most = min(total // 2, total - plan.batch_size)
        if rows is not None and n > most:
            raise ValueError(
                f"Trainer: expected {name} <= {max(most, 0)} of {rows} rows of data with "
                f"batch_size = {plan.batch_size}, got {n}"
            )
        return n
    row = sum(sae.columns.widths) * sae.W_enc_rows.element_size()
    n = min(MOST_ROWS, max(FEWEST_ROWS, total // 20), MOST_BYTES // row)
    return 0 if n > total // 10 or n > total - plan.batch_size else n


class Calibration:
    """The rows of a run that thresholds are calibrated on, and those that are left to train on.

    Args:
        config: of the run.
        sae: what is trained.
        data: what it has; None: a loop that somebody else calls.
        plan: length of the run and of a batch.

    Raises:
        ValueError: the rows asked for do not fit.
    """

    def __init__(
        self, config: TrainConfig, sae: SAE, data: ActivationSource | None, plan: RunPlan
    ) -> None:
        self._config, self._sae, self._data, self._plan = config, sae, data, plan
        self.rows = calibration_rows(config, sae, None if data is None else known_rows(data), plan)
        """How many are held back."""
        self._held: ActivationSource | None = None
        self.training_rows = data
        """The data without what is held back."""

    def hold_back(self) -> None:
        """Keep rows of the data from training, if the class has thresholds to calibrate, or if the
        settings say so."""
        data, n, parts = self._data, self.rows, None
        self.training_rows, self._held = data, None
        if data is None:
            return
        none = 0 in (self._config.hold_back, self._config.calibration_rows)
        if not n and (none or not calibrates(self._sae)):
            return
        if n:
            parts = hold_back(data, n)
        if parts is not None:
            self.training_rows, self._held = parts
            return
        why = f"{type(data).__name__} has no hold_back" if n else "the data are few"
        logger.info("Trainer: thresholds are those of training, with no rows held back: %s", why)

    def set_thresholds_(self, scaled: Callable[[Tensor], Tensor]) -> None:
        """Calibrate the thresholds on the rows held back, if any.

        Args:
            scaled: checks raw rows `[n, columns]` and returns what the module takes.
        """
        if self._held is None or not calibrates(self._sae):
            return
        rows = list(self._held.batches(self._plan.batch_size, seed=None))
        try:
            if not rows:
                raise ValueError("the data have ended")
            self._sae.calibrate_(self._sae.columns.split(scaled(torch.cat(rows))).x)
        except ValueError as error:  # no reason to lose a run
            logger.warning(
                "Trainer: thresholds are those of training, as nothing was calibrated: %s", error
            )
