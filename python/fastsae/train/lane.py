"""A run of `train_many` among others: its trainer, its failure, and its random numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae._files.write import reason, write_json
from fastsae._log import logger
from fastsae.data.by_site import SiteColumns, only_sites
from fastsae.nn import SAE
from fastsae.train.config import TrainConfig
from fastsae.train.shared import Shared
from fastsae.train.trainer import Trainer, TrainResult

FAILED, FAILED_FORMAT = "failed.json", "fastsae-failed"
"""In the folder of a run that failed: why, and after how many updates."""


@dataclass
class Run:
    """One of the runs of `train_many`."""

    name: str
    """Of the run, and of its folder."""
    sae: SAE | Callable[[], SAE]
    """The module, or a function that makes it, which is called after `torch.manual_seed` of
    `config.start_seed` (`config.seed` where that is None)."""
    config: TrainConfig = field(default_factory=TrainConfig)
    """Its settings."""
    sites: str | Sequence[str] | None = None
    """Sites of the data whose columns it reads, in this order; None: all columns."""


@dataclass
class RunResult:
    """What became of a run."""

    name: str
    """Of the run."""
    sae: SAE
    """Its module: trained, or as far as it came."""
    config: TrainConfig
    """Its settings, with `out` and `hold_back` as they came to be."""
    steps: int
    """Updates done."""
    result: TrainResult | None
    """What `Trainer.fit` returns; None: it failed."""
    error: str | None
    """Why it failed, in one line."""


class Lane:
    """A run, its trainer, and the state of torch's random numbers between its steps."""

    def __init__(
        self,
        run: Run,
        source: Shared,
        val: Shared | None,
        folder: Path | None,
        every: int | None,
    ) -> None:
        self.run, self._source, self._val = run, source, val
        self.error: str | None = None
        self.result: TrainResult | None = None
        self._stack = ExitStack()
        self._rng = _rng_state()
        config = run.config
        if folder is not None:
            own = folder / run.name
            if config.out is not None and Path(config.out) != own:
                raise ValueError(
                    f"train_many: expected no out in the config of run {run.name}, whose folder is "
                    f"{own}, got {config.out}"
                )
            config = replace(config, out=own)
        if every is not None and config.checkpoint_every is None:
            config = replace(config, checkpoint_every=every)
        self._sae = run.sae if isinstance(run.sae, SAE) else self._made(run.sae, config)
        self.configure(config)

    def _made(self, make: Callable[[], SAE], config: TrainConfig) -> SAE:
        with self._own_rng():
            torch.manual_seed(config.seed if config.start_seed is None else config.start_seed)
            try:
                return make()
            except (TypeError, ValueError) as error:
                raise type(error)(f"train_many: run {self.run.name}: {error}") from error

    def configure(self, config: TrainConfig) -> None:
        """Make the trainer, of these settings."""
        name = self.run.name
        try:
            self.data: Shared | SiteColumns = self._columns(self._source)
            val = None if self._val is None else self._columns(self._val)
            self.trainer = Trainer(self._sae, self.data, config, val=val)
        except (TypeError, ValueError) as error:
            text = str(error).removeprefix("Trainer: ")
            raise type(error)(f"train_many: run {name}: {text}") from error

    def _columns(self, source: Shared) -> Shared | SiteColumns:
        return source if self.run.sites is None else only_sites(source, self.run.sites)

    @property
    def live(self) -> bool:
        """Whether it needs more batches."""
        return self.error is None and self.result is None

    def open(self, resume: bool) -> None:
        """Begin the run, or continue it; one that has no updates left is completed."""
        with self._guarded():
            if (out := self.trainer.out) is not None:
                (out / FAILED).unlink(missing_ok=True)
            self._stack.enter_context(self.trainer.opened(resume))
            self.trainer.write_pending()
            self._complete_if_done()

    def take(self, batch: Tensor, position: Any, update: int) -> None:
        """Do what the run has to do with a batch of all columns."""
        with self._guarded():
            x = self.data.columns(batch) if isinstance(self.data, SiteColumns) else batch
            self.trainer.advance(x, position, update)
            self._complete_if_done()

    def expect_all_steps(self) -> None:
        """Fail, as the data have ended."""
        with self._guarded():
            self.trainer.expect_all_steps()

    def save(self) -> None:
        """Write a checkpoint, if there is something new."""
        with self._guarded():
            self.trainer.save()

    def close(self) -> None:
        """Leave the run as it is."""
        with self._own_rng():
            self._stack.close()

    def outcome(self) -> RunResult:
        """Return what became of the run."""
        trainer, run = self.trainer, self.run
        steps = trainer.steps_done
        return RunResult(run.name, trainer.sae, trainer.config, steps, self.result, self.error)

    def _complete_if_done(self) -> None:
        if self.trainer.steps_done == self.trainer.plan.steps:
            self.result = self.trainer.complete()
            self._stack.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Have what fails inside end this run and no other; its random numbers are its own."""
        try:
            with self._own_rng():
                yield
        except Exception as error:
            self.result = None
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        text = " ".join(str(error).split()).removeprefix("Trainer: ")
        known = isinstance(error, ValueError | TypeError | RuntimeError | OSError) and text
        self.error = text if known else f"{type(error).__name__}: {text}"
        with suppress(Exception):  # what failed may fail again
            self.close()
        if (out := self.trainer.out) is None:
            return
        said = {"format": FAILED_FORMAT, "steps": self.trainer.steps_done, "error": self.error}
        try:
            write_json(out / FAILED, {**said, "time": time.time()})
        except OSError as failure:
            logger.warning("train_many: could not write %s (%s)", out / FAILED, reason(failure))

    @contextmanager
    def _own_rng(self) -> Iterator[None]:
        others = _rng_state()
        _set_rng_state(self._rng)
        try:
            yield
        finally:
            self._rng = _rng_state()
            _set_rng_state(others)


def _rng_state() -> tuple[Tensor, list[Tensor]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


def _set_rng_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
