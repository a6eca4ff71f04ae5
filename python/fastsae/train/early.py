"""Validation on the way, for runs whose settings do not say when: a curve for little time."""

from __future__ import annotations

from fastsae.data.source import ActivationSource, TensorSource, sample_rows, source_len
from fastsae.nn import SAE, ActivationScaler
from fastsae.train.config import TrainConfig
from fastsae.train.metrics import Row, validate
from fastsae.train.schedule import RunPlan

HALVINGS = 6
"""Early validations: after 1/64, 1/32, ... 1/2 of the run,"""
FIRST_STEP = 10
"""but none before that many updates."""
SHARE = 400
"""Each reads one row of this many that the run trains on. In eval mode a row took 1.1 (TopK) to 1.7
times (BatchTopK) what it took in an update (576 to 2304, CPU with AVX-512 BF16, which only updates
use), so the seven readings of a sample take 2 to 3 % of a run."""
ROWS = (512, 16384)
"""With fewer rows than the first there are none; more than the second tell nothing new."""


class EarlyValidations:
    """When a run validates early, and on which rows.

    They are all rows of small validation data; of larger ones a sample, the same at every
    validation of the run. Data without a length may be an iterator that can be read once, so there
    are none on such data.

    Args:
        val: the validation data, if any.
        config: of the run; with `eval_every` there are no early validations.
        plan: length of the run and of a batch.
    """

    def __init__(self, val: ActivationSource | None, config: TrainConfig, plan: RunPlan) -> None:
        self._val, self._seed, self._batch_size = val, config.seed, plan.batch_size
        self._source: ActivationSource | None = None
        available = (source_len(val) or 0) if val is not None else 0
        self.rows = min(available, plan.steps * plan.batch_size // SHARE, ROWS[1])
        """Read by each."""
        self.steps: set[int] = set()
        """Updates after which they are made."""
        if config.eval_every is None and self.rows >= ROWS[0]:
            halved = {plan.steps >> i for i in range(1, HALVINGS + 1)}
            self.steps = {step for step in halved if step >= FIRST_STEP}
        self.sampled = bool(self.steps) and self.rows < available
        """Whether these rows are not all."""

    def sample_row(self, sae: SAE, scaler: ActivationScaler) -> Row:
        """Return val_fvu_sample, where these rows are not all; they are drawn once, at random where
        the data can do that."""
        if not self.sampled:
            return {}
        if self._source is None:
            assert self._val is not None
            sample = sample_rows(self._val, self.rows, self._batch_size, self._seed)
            self._source = TensorSource(sample[: self.rows])
        on_sample = validate(sae, self._source, self._batch_size, scaler)
        return {"val_fvu_sample": on_sample["val_fvu"]}

    def needs_all(self, step: int) -> bool:
        """Return whether all validation data are read after update `step`, too."""
        return not (self.sampled and step in self.steps)
