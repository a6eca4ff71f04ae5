"""Which rows are kept from training, so that thresholds can be calibrated on them at its end.

Weights memorize rows that they see many times: a threshold with which those have k active latents
gives new ones more. SmolLM2, block 15, BatchTopK on 16,637 tokens, 16 passes, k = 32: an L0 of 40
to 42 on other documents.
"""

from __future__ import annotations

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
        config: of the run; its `calibration_rows` counts if the class calibrates.
        sae: what is trained.
        rows: of the data; None: nobody knows, and those that the run needs count instead.
        plan: length of the run and of a batch.

    Raises:
        ValueError: so many do not fit.
    """
    if not calibrates(sae) or config.calibration_rows == 0:
        return 0
    total = plan.steps * plan.batch_size if rows is None else rows
    if (n := config.calibration_rows) is not None:
        most = min(total // 2, total - plan.batch_size)
        if rows is not None and n > most:
            raise ValueError(
                f"Trainer: expected calibration_rows <= {max(most, 0)} of {rows} rows of data with "
                f"batch_size = {plan.batch_size}, got {n}"
            )
        return n
    row = sum(sae.columns.widths) * sae.W_enc_rows.element_size()
    n = min(MOST_ROWS, max(FEWEST_ROWS, total // 20), MOST_BYTES // row)
    return 0 if n > total // 10 or n > total - plan.batch_size else n
