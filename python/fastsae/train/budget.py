"""How many updates fit into a time: a short rehearsal on a copy of the module.

    steps = (seconds - spent - once) / (update + validation on the way per update)

An update is timed after a few others. The first ones are up to a quarter faster (BatchTopK) or
several times slower (a penalty before it bites) than those of the rest of the run.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastsae.data.source import ActivationSource, TensorSource, as_source, sample_rows, source_len
from fastsae.nn import SAE
from fastsae.train.config import TrainConfig
from fastsae.train.defaults import default_batch_size
from fastsae.train.early import HALVINGS, ROWS, SHARE
from fastsae.train.gap import GAP_ROWS
from fastsae.train.recent import RecentBatches
from fastsae.train.trainer import Trainer

SPAN = 0.08
"""Share of the time that updates are rehearsed for,"""
UPDATES = (8, 200)
"""but at least and at most that many updates. The second half of them is measured."""
LONG = 10_000
"""Updates of the run that is rehearsed: no latent of it can be dead."""
STREAM_BATCHES = 4
"""Batches that are rehearsed with, where the data have no length."""
Timed = Callable[[Callable[[], object]], float]
"""Calls a function and returns how long that took."""


@dataclass(frozen=True)
class Rehearsal:
    """What the parts of a run take, in seconds."""

    update: float
    """One update, with reading its batch."""
    along: float
    """What is logged and validated on the way, per update."""
    once: float
    """Start, thresholds at the end, and the last validation."""
    spent: float
    """The rehearsal itself."""

    def steps_within(self, seconds: float) -> int:
        """Return how many updates end `seconds` after the rehearsal began.

        Raises:
            ValueError: not one.
        """
        each = self.update + self.along
        steps = int((seconds - self.spent - self.once) / each)
        if steps < 1:
            least = self.spent + self.once + each
            raise ValueError(
                f"rehearse: expected at least {least:.1f} s, which one update takes with the start "
                f"and the end of the run, got {seconds:g} s"
            )
        return steps


def steps_within(
    sae: SAE,
    data: Tensor | ActivationSource | Iterable[Tensor],
    config: TrainConfig,
    seconds: float,
    *,
    val: Tensor | ActivationSource | None = None,
) -> int:
    """Return how many updates of a run fit into `seconds`, from now to the end of `fit`.

        steps = steps_within(sae, data, config, 600, val=val)
        Trainer(sae, data, replace(config, steps=steps), val=val).fit()

    See `rehearse` for what is measured and what is not.

    Args:
        sae: the module; it stays as it is, and so does torch's RNG.
        data: what it will be trained on. Of an iterator make a `data.IterableSource` and give that
            to the run as well: what was tried is then still to come.
        config: the settings; `steps`, `total_tokens` and `epochs` do not matter.
        seconds: for everything: the rehearsal, the start, the updates, validation.
        val: the validation data of the run.

    Raises:
        TypeError: data or val is an iterator, of which rows would be lost.
        ValueError: not one update fits, or what `Trainer` raises.
    """
    return rehearse(sae, data, config, seconds, val=val).steps_within(seconds)


def rehearse(
    sae: SAE,
    data: Tensor | ActivationSource | Iterable[Tensor],
    config: TrainConfig,
    seconds: float,
    *,
    val: Tensor | ActivationSource | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> Rehearsal:
    """Time the parts of a run on a copy of `sae`, in about 8 % of `seconds`, at least 8 updates.

    Updates are those of the run, on its batches, and the median counts. Not measured are: writing
    checkpoints; latents that die later, which AuxK makes updates slower for; a disk that is slower
    than the training; and other load on the machine, which may come and go. The memory is that of
    the run and of one more copy of the parameters.

    Args:
        sae, data, config, val: as in `steps_within`.
        seconds: that the run shall take.
        now: returns the time in seconds.

    Raises:
        TypeError: data or val is an iterator, of which rows would be lost.
        ValueError: seconds is not above 0, or what `Trainer` raises.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"rehearse: expected seconds > 0, got {seconds!r}")
    for name, given in (("data", data), ("val", val)):
        if isinstance(given, Iterator) and not isinstance(given, ActivationSource):
            raise TypeError(
                f"rehearse: expected {name} that are still whole afterwards, got a "
                f"{type(given).__name__}; give rehearse and Trainer the same "
                "fastsae.data.IterableSource of it"
            )
    began, device = now(), sae.W_enc_rows.device

    def timed(what: Callable[[], object]) -> float:
        start = now()
        what()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return now() - start

    source = as_source("Trainer", "data", data)
    held_out = None if val is None else as_source("Trainer", "val", val)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        waiting = 0.0
        size = config.batch_size or default_batch_size(device.type, rows=None, tokens=None)
        if source_len(source) is None:
            source, waiting = _drawn(source, config, size, timed)
        short = replace(
            config, steps=LONG, total_tokens=None, warmup_steps=4, sparsity_warmup_steps=4,
            out=None, tensorboard=False, checkpoint_every=None, progress=False,
        )  # fmt: skip
        _prepared(sae, source, short)  # what only the first call in a process takes
        once = timed(lambda: _prepared(sae, source, short))
        trainer = _prepared(sae, source, short)
        update, x, logging = _updates(trainer, SPAN * seconds, timed)
        once += _thresholds(trainer, x, timed)
        along = logging / config.log_every
        if held_out is not None and (rows := source_len(held_out)):
            row = _validation(trainer, held_out, rows, timed)
            once += (rows + 2 * GAP_ROWS) * row
            along += _rows_along(config, rows, trainer.plan.batch_size) * row
    return Rehearsal(update + waiting, along, once, now() - began)


def _prepared(sae: SAE, source: ActivationSource, config: TrainConfig) -> Trainer:
    trainer = Trainer(copy.deepcopy(sae), source, config)
    trainer.prepare()
    return trainer


def _drawn(
    source: ActivationSource, config: TrainConfig, batch_size: int, timed: Timed
) -> tuple[ActivationSource, float]:
    """Return rows of a stream, which are not lost by it, and how long a batch was waited for."""
    size, parts = batch_size, list[Tensor]()
    sample_rows(source, 1, size, config.seed)
    took = timed(
        lambda: parts.append(sample_rows(source, STREAM_BATCHES * size, size, config.seed))
    )
    return TensorSource(parts[0]), took * size / len(parts[0])


def _updates(trainer: Trainer, span: float, timed: Timed) -> tuple[float, Tensor, float]:
    """Return the time of one update, the last batch, and the time of a row of metrics."""
    times: list[float] = []
    last: dict[str, Any] = {}
    with closing(trainer._prepared()) as batches:

        def update() -> None:
            last["x"] = next(batches).x
            last["out"] = trainer._step(last["x"])

        while len(times) < UPDATES[0] or (sum(times) < span and len(times) < UPDATES[1]):
            times.append(timed(update))
    row = timed(lambda: trainer._row(**last))
    return statistics.median(times[len(times) // 2 :]), last["x"], row


def _thresholds(trainer: Trainer, x: Tensor, timed: Timed) -> float:
    """Return how long the estimate of thresholds at the end takes, from that of one batch."""
    steps = trainer.plan.steps
    recent = RecentBatches(trainer.sae, steps, trainer.plan.batch_size)
    seconds = 0.0
    for _ in range(2):  # the first one touches memory for the first time
        recent.add(x, steps)
        seconds = timed(recent.estimate_threshold_)
    return seconds * (steps - recent.first_step)


def _validation(
    trainer: Trainer,
    val: ActivationSource,
    rows: int,
    timed: Timed,
) -> float:
    """Return how long one row of validation takes."""
    size = trainer.plan.batch_size
    trainer.val = TensorSource(sample_rows(val, min(rows, size), size, trainer.config.seed))
    trainer.validate()
    return timed(trainer.validate) / len(trainer.val)


def _rows_along(config: TrainConfig, rows: int, batch_size: int) -> float:
    """Return how many rows are validated on before the end of a run, per update."""
    if config.eval_every is not None:
        return rows / config.eval_every
    return (HALVINGS + 1) * batch_size / SHARE if rows >= ROWS[0] else 0.0
