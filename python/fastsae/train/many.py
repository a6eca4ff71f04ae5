"""Train several SAEs at once: every batch of the data is read one time, for all of them.

    batch -> run 1: columns of its sites -> Trainer.advance
          -> run 2: ...

Each run is a `Trainer` with a folder of its own, and ends in the bits that `Trainer.fit` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastsae._files.lock import locked
from fastsae._log import logger
from fastsae._signals import StopSignals
from fastsae.data.source import ActivationSource, as_source, hold_back
from fastsae.nn import SAE
from fastsae.train.config import TrainConfig
from fastsae.train.lane import Lane, Run, RunResult
from fastsae.train.prefetch import Prepared, prefetch
from fastsae.train.shared import Shared, shared


def train_many(
    runs: Iterable[Run | tuple[Any, ...]],
    data: Tensor | ActivationSource | Iterable[Tensor],
    *,
    val: Tensor | ActivationSource | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    progress: bool | None = None,
    started: Callable[[dict[str, TrainConfig]], None] | None = None,
    part: tuple[int, int] = (0, 1),
) -> dict[str, RunResult]:
    """Train the SAEs of all runs, each batch of the data being read once.

        results = train_many(
            [
                ("narrow", lambda: TopKSAE(768, 6144, 32), TrainConfig(steps=2000)),
                ("wide", lambda: TopKSAE(768, 24576, 32), TrainConfig(steps=2000)),
            ],
            data,
            out="sweep",
        )

    Each SAE has the bits that `Trainer(sae, data, config).fit()` gives alone on the device, with
    `results[name].config`, and with `only_sites(data, sites)` for a run that has sites. Runs take
    the same batches, so `batch_size` and `seed` are the same in all of them, and so is the number
    of rows that are held back; where classes differ in that by default, all hold back the most
    that one of them does. Everything else may differ: class, width, k, sites, steps, rate, and
    `start_seed`.

    A run that fails (NaN at its site, an error in its step, a file that cannot be written) ends
    there, and the others go on: its `error` says why, its folder has a failed.json, and one line is
    logged at the end.

    Args:
        runs: each a `Run`, or a tuple of its fields.
        data: as of a `Trainer`.
        val: held-out data, as of a `Trainer`; every run reads them for itself.
        out: folder; that of a run is `out/NAME`, with what `Trainer.fit` writes. None: a run has
            the folder in its config, or none.
        resume: continue each run from its newest checkpoint, those that failed too. Runs without
            one begin, and finished ones stay as they are.
        checkpoint_every: updates between two checkpoints of each run whose config does not say.
        progress: show a progress bar; None shows it on a terminal only.
        started: called with the settings of all runs, by name, once everything was checked and
            before anything is trained.
        part: (i, n) trains every n-th run from the i-th on, for n processes that are given the same
            runs; nothing has to pass between them.

    Returns:
        Name -> result, in the order of the runs of this part.

    Raises:
        TypeError, ValueError: a run is not one, two have the same name or the same module, they
            cannot share batches, or what `Trainer` raises for one of them; nothing was trained.
        RuntimeError: another process has one of the folders.
        KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP, between two batches, after a checkpoint of
            each run.
        Exception: what the data raise, after a checkpoint of each run.

    Cost: memory for all modules and their optimizers; time is that of the runs one after the other,
        less what reading takes. `seconds` in the metrics of a run is the time of its own updates,
        without reading; on a GPU, which works later than it is asked to, only roughly.
    """
    given = [_as_run(run) for run in runs]
    _check_names(given)
    source = shared(as_source("train_many", "data", data))
    held_out = None if val is None else shared(as_source("train_many", "val", val))
    folder = None if out is None else Path(out)
    lanes = [Lane(run, source, held_out, folder, checkpoint_every) for run in given]
    if len({id(lane.trainer.sae) for lane in lanes}) < len(lanes):
        raise ValueError("train_many: expected a module for each run, got the same one twice")
    _agree(lanes, source)
    plan, seed = lanes[0].trainer.plan, lanes[0].trainer.config.seed
    for rows in (source, held_out):
        if rows is not None:
            rows.batch_size, rows.seed = plan.batch_size, seed
    configs = {lane.run.name: lane.trainer.config for lane in lanes}
    first, parts = part
    if not 0 <= first < parts:
        raise ValueError(f"train_many: expected part to be (i, n) with 0 <= i < n, got {part}")
    lanes = lanes[first::parts]
    with ExitStack() as stack:
        if folder is not None and first == 0:
            stack.enter_context(locked(folder, "train_many"))
        for lane in lanes:
            if lane.trainer.out is not None:
                stack.enter_context(locked(lane.trainer.out, "train_many"))
            lane.trainer.check_out(resume)
        if started is not None:
            started(configs)
        with StopSignals() as stop:
            for lane in lanes:
                stack.callback(lane.close)
                lane.open(resume)
            source.forget()
            _train(lanes, source, stop, progress)
    for lane in lanes:
        if lane.error is not None:
            logger.warning("train_many: run %s failed: %s", lane.run.name, lane.error)
    return {lane.run.name: lane.outcome() for lane in lanes}


def _train(lanes: list[Lane], source: Shared, stop: StopSignals, progress: bool | None) -> None:
    """Give every batch to all runs, from the first one that a run needs to the last."""
    live = [lane for lane in lanes if lane.live]
    if not live:
        return
    update, position = min((lane.trainer.begins_at for lane in live), key=lambda at: at[0])
    steps = max(lane.trainer.plan.steps for lane in live)
    bar = tqdm(
        total=steps, initial=update, disable=None if progress is None else not progress, unit="step"
    )
    with closing(_prepared(live[0], source, position, steps - update)) as batches, bar:
        while live:
            if stop.received:
                raise KeyboardInterrupt(_saved(live, stop.received))
            try:
                prepared = next(batches, None)
            except Exception:
                _saved(live, "the data failed")
                raise
            for lane in live:
                if prepared is None:
                    lane.expect_all_steps()
                else:
                    lane.take(prepared.x, prepared.position, update)
            update += 1
            bar.update()
            live = [lane for lane in live if lane.live]


def _prepared(lane: Lane, source: Shared, position: Any, count: int) -> Any:
    """Return `count` batches of all columns from `position` on; for a GPU, a thread works ahead."""
    trainer = lane.trainer
    device = trainer.sae.W_enc_rows.device
    parts = hold_back(source, trainer.held_back) if trainer.held_back else None
    rows = source if parts is None else parts[0]
    batches = trainer.read(rows, position, count)
    return prefetch(_moved(batches, device), device) if device.type == "cuda" else batches


def _moved(batches: Iterator[Prepared], device: torch.device) -> Iterator[Prepared]:
    return (Prepared(x.to(device), position) for x, position in batches)


def _saved(lanes: list[Lane], why: str) -> str:
    """Write a checkpoint of each run, and say how to go on."""
    for lane in lanes:
        lane.save()
    kept = [lane.trainer for lane in lanes if lane.live and lane.trainer.steps_done]
    saved = sum(trainer.out is not None for trainer in kept)
    if not saved:
        return f"{why}; nothing was saved, because no run has a folder and an update"
    return (
        f"{why}; checkpoints of {saved} of {len(lanes)} unfinished runs are in their folders, "
        "resume=True continues them"
    )


def _as_run(run: Any) -> Run:
    """Return a run that was given as one, or as a tuple of its fields."""
    if isinstance(run, tuple) and 2 <= len(run) <= 4:
        run = Run(*run)
    if not isinstance(run, Run):
        raise TypeError(
            f"train_many: expected runs to be (name, sae, config), got {type(run).__name__}"
        )
    if not (isinstance(run.sae, SAE) or callable(run.sae)):
        raise TypeError(
            f"train_many: expected the sae of run {run.name} to be an SAE or to make one, got "
            f"{type(run.sae).__name__}"
        )
    if not isinstance(run.config, TrainConfig):
        raise TypeError(
            f"train_many: expected the config of run {run.name} to be a TrainConfig, got "
            f"{type(run.config).__name__}"
        )
    return run


def _check_names(runs: list[Run]) -> None:
    """Raise ValueError unless every run has a name of its own that a folder can have."""
    if not runs:
        raise ValueError("train_many: expected at least one run, got none")
    seen: set[str] = set()
    for run in runs:
        name: Any = run.name
        plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\")
        if not plain or not name or name.startswith("."):
            raise ValueError(f"train_many: expected a name that a folder can have, got {name!r}")
        if name in seen:
            raise ValueError(f"train_many: expected a name for each run, got {name!r} twice")
        seen.add(name)


def _agree(lanes: list[Lane], source: Shared) -> None:
    """Have all runs take the same batches.

    Raises:
        ValueError: their settings forbid it.
    """
    for what, values in (
        ("seed", {lane.run.name: lane.trainer.config.seed for lane in lanes}),
        ("batch_size", {lane.run.name: lane.trainer.plan.batch_size for lane in lanes}),
    ):
        _expect_one(what, values, "; start_seed may differ" if what == "seed" else "")
    asked = {
        lane.run.name: n
        for lane in lanes
        for n in (lane.trainer.config.hold_back, lane.trainer.config.calibration_rows)
        if n is not None
    }
    rows = _expect_one("number of rows to hold back", asked) if asked else None
    if rows is None:
        rows = max(lane.trainer.held_back for lane in lanes)
    others = [lane for lane in lanes if lane.trainer.held_back != rows]
    if others:
        logger.info("train_many: all runs hold back %d rows, as one of them does", rows)
    for lane in others:
        config = replace(lane.trainer.config, calibration_rows=None, hold_back=rows)
        lane.configure(config)
    steps = {lane.run.name: lane.trainer.plan.steps for lane in lanes}
    parts = hold_back(source, rows) if rows else None
    if parts is not None and parts[0] is source:
        why = (
            "; the rows that follow the last one calibrate thresholds, calibration_rows=0 has none"
        )
        _expect_one("number of steps", steps, why)


def _expect_one(what: str, values: dict[str, int], why: str = "") -> int:
    """Return the value that all runs have."""
    first, value = next(iter(values.items()))
    for name, other in values.items():
        if other != value:
            raise ValueError(
                f"train_many: expected one {what} for all runs, which take the same batches, got "
                f"{value} ({first}) and {other} ({name}){why}"
            )
    return value
