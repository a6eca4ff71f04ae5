"""The trainer: a step that anyone may call, and `fit`, the loop around it.

    learning rate -> loss -> gradients -> no gradient along decoder rows -> clip -> optimizer
    -> unit decoder rows -> dead latents

Decoder rows are normalized after the update, so they have norm 1 in every forward.

Source: Gao et al. 2024 (arXiv 2406.04093), appendix A.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import weakref
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastsae._files import checksum
from fastsae._files.lock import locked
from fastsae._files.write import sealed, sweep, write_json
from fastsae._log import logger
from fastsae._signals import StopSignals
from fastsae.data.source import (
    ActivationSource,
    as_source,
    fingerprint,
    sample_rows,
    source_len,
)
from fastsae.interop.folder import CONFIG, WEIGHTS, contents, write
from fastsae.nn import SAE, ActivationScaler, SAEOutput, StepContext
from fastsae.train.calibration import Calibration
from fastsae.train.captured_step import CapturedStep, Move, StepInputs, make_captured_step, own_copy
from fastsae.train.checkpoint import (
    check_same_run,
    latest,
    load_checkpoint,
    newest_state,
    prune,
    save_checkpoint,
    save_spread_checkpoint,
    settings_of,
)
from fastsae.train.clock import Clock
from fastsae.train.config import TrainConfig
from fastsae.train.dead import DeadLatents, UnderusedLatents
from fastsae.train.early import EarlyValidations
from fastsae.train.feed import Feed
from fastsae.train.gap import Gap, measure_gap
from fastsae.train.metrics import (
    METRICS,
    MetricsLog,
    Row,
    as_json_row,
    from_json_row,
    step_metrics,
    validate,
)
from fastsae.train.outliers import clip_rows_
from fastsae.train.precision import bad_rows, compute_dtype
from fastsae.train.prefetch import Prepared, prefetch
from fastsae.train.recent import RecentBatches
from fastsae.train.saver import Saver, copied
from fastsae.train.schedule import make_plan
from fastsae.train.start import start_, start_rows
from fastsae.train.state import check_state
from fastsae.train.team import make_team
from fastsae.train.update import Update, kind_of, make_update

FREE_SETTINGS: tuple[str, ...] = (
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "out",
)
FREE_SETTINGS += ("tensorboard", "progress", "mesh", "async_checkpoints", "capture")
FREE_SETTINGS += ("weight_copies",)
"""What may differ between a run and its continuation."""
RUN, RUN_FORMAT = "run.json", "fastsae-run"
"""Written last: the run has come to its end, and these are its files."""


@dataclass
class TrainResult:
    """What `Trainer.fit` returns."""

    sae: SAE
    """The trained module, for raw activations, in eval mode."""
    history: list[Row]
    """Rows of metrics, as in metrics.jsonl."""
    final: Row
    """The last row, with val_* if there was validation data."""
    gap: Gap | None = None
    """How the SAE does on validation and on training rows, if both have a length."""


class Trainer:
    """Trains an SAE in place.

        trainer = Trainer(sae, data, TrainConfig(...))
        result = trainer.fit()

    or, in a loop of your own:

        trainer.prepare()
        for batch in batches:
            out = trainer.step(batch)
        trainer.finish()

    Between `prepare` and `finish` the module takes scaled activations; before and after, raw ones.

    Args:
        sae: the module.
        data: activations `[n, d_in]`, an iterable of such tensors, or a `data.ActivationSource`;
            SAEs that read several sites take their columns next to each other, as `SAE.columns`
            says. None: you call `prepare(sample)` and `step` yourself.
        config: the settings; None takes the defaults.
        val: held-out data of the same kind, for val_fvu, val_mse and val_l0.

    Raises:
        TypeError: the module is no SAE, data or val is of another kind, or something that will be
            saved is not JSON.
        ValueError: another d_in, data smaller than a batch, more rows to hold back than there can
            be, or no number of steps.
    """

    def __init__(
        self,
        sae: SAE,
        data: Tensor | ActivationSource | Iterable[Tensor] | None = None,
        config: TrainConfig | None = None,
        *,
        val: Tensor | ActivationSource | None = None,
    ) -> None:
        if not isinstance(sae, SAE):
            inner = " (give the SAE itself, not a wrapper)" if hasattr(sae, "module") else ""
            raise TypeError(f"Trainer: expected sae to be an SAE, got {type(sae).__name__}{inner}")
        self.sae = sae
        if not isinstance(config, TrainConfig | None):
            raise TypeError(
                f"Trainer: expected config to be a TrainConfig, got {type(config).__name__}"
            )
        self.config = config or TrainConfig()
        self.data = None if data is None else as_source("Trainer", "data", data)
        self.val = None if val is None else as_source("Trainer", "val", val)
        for name, given in (("data", self.data), ("val", self.val)):
            if given is not None and given.d_in != sum(sae.columns.widths):
                blocks = " + ".join(map(str, sae.columns.widths))
                raise ValueError(f"Trainer: expected {name} with d_in = {blocks}, got {given.d_in}")
        if self.val is not None and source_len(self.val) == 0:
            raise ValueError("Trainer: expected val to have at least one row, got none")
        rows = None if self.data is None else source_len(self.data)
        d_in = sum(sae.columns.inputs)
        device = sae.W_enc_rows.device.type
        sizes: dict[str, Any] = {"d_in": d_in, "d_sae": sae.d_sae, "k": getattr(sae, "k", None)}
        self.plan = make_plan(self.config, rows, **sizes, device=device)
        self._team = make_team(sae, self.config)
        self._saver = Saver(self.config.async_checkpoints)
        if self.plan.batch_size % self._team.data_groups:
            raise ValueError(
                f"Trainer: expected batch_size to be a multiple of {self._team.data_groups} data "
                f"groups, got {self.plan.batch_size}"
            )
        self._calibration = Calibration(self.config, sae, self.data, self.plan)
        self._folder = None if self.config.out is None else Path(self.config.out)
        self.out = self._folder if self._team.is_first else None
        if self._folder is not None:
            contents(sae)  # raises now what would be raised after the last update
        self.scaler = ActivationScaler(sae.columns)
        """What data are multiplied by in training."""
        self.limits: list[float] = []
        """Norms that rows of each block are clipped at in training, in scaled units."""
        self.steps_done = 0
        """Updates done."""
        self._tokens_done = 0
        self._clock = Clock()
        self._early = EarlyValidations(self.val, self.config, self.plan)
        self._update: Update | None = None
        self._captured: CapturedStep | None = None
        self._position: Any = None  # of the data after the last step
        self._stopped = False  # by a signal, after the last step
        self._log: MetricsLog | None = None
        self._pending: dict[str, Any] | None = None  # a row that is not in the log yet
        self._fingerprint: str | None = None
        self._since = 0.0, 0  # seconds and steps at the last row
        self._saved: int | None = None  # step of the newest checkpoint in out

    # -- the run, step by step -----------------------------------------------------------------

    def prepare(self, sample: Tensor | None = None) -> None:
        """Get ready for the first step: measure the scale of the data, and start the biases.

        A module whose biases are not all zero has been trained before, and keeps them.

        Args:
            sample: raw rows `[n, columns]` for all this; None draws `config.sample_rows` from the
                data, and as many for new rows of the matrices as there are latents.

        Raises:
            ValueError: there are neither data nor a sample, rows are not finite, or all equal.
        """
        self._close()  # of a run that was not finished
        if not self.sae.parallel.is_alone:
            raise ValueError("Trainer: expected an SAE in one piece, got one that is spread")
        update = None if self.config.mesh else make_update(self.sae, self.config)
        self.steps_done, self._tokens_done = 0, 0
        self._position = self._saved = None
        few = None
        if sample is None:
            sample, few = self._sample(start_rows(self.sae, self.config)), self.config.sample_rows
        self.scaler, self.limits = start_(self.sae, self._checked(sample), self.config, few)
        logger.info("Trainer: %s", self.plan)
        self._team.shard_(self.sae)
        self._count_from_zero()
        self._begin_updates(update or make_update(self.sae, self.config))

    def step(self, batch: Tensor) -> SAEOutput:
        """Do one update.

        Args:
            batch: raw rows `[n, columns]`, in any floating dtype and on any device. With a mesh,
                rows of this process, as many as on the others: those of a data group are put
                together, in the order of the processes.

        Returns:
            What `training_loss` gave before the update, without a graph; `reconstruction` and
            `mse` in raw units (`mse` in scaled ones for several targets).

        Raises:
            RuntimeError: `prepare` was not called, or all steps are done.
            ValueError: a row holds NaN or Inf; nothing was updated.
        """
        x = self._checked(batch, own=True)
        self._expect_step()
        out = self._step(self._scaled(self._team.gathered(x)))
        out = out if self._captured is None else own_copy(out)
        for name in ("loss", "fvu", "aux_loss", "sparsity_loss"):
            setattr(out, name, getattr(out, name).detach())
        out.mse = out.mse / self.scaler.error_scale**2
        out.reconstruction = self.scaler.unscale_target(out.reconstruction)
        return out

    def finish(self) -> SAE:
        """Estimate thresholds, fold the scale into the module, and put it into eval mode.

        Thresholds are estimated from the last batches of the run, if all steps are done. In a loop
        of your own nobody knows which rows the module has not seen: `SAE.calibrate_` takes them.
        """
        if self._update is None:
            return self.sae
        self._recent.estimate_threshold_()
        self._close()
        return self.sae

    def validate(self) -> Row:
        """Return val_fvu, val_mse and val_l0 on the validation data.

        Raises:
            RuntimeError: there are none.
        """
        if self.val is None:
            raise RuntimeError("Trainer: expected validation data (val=), got none")
        return validate(self.sae, self.val, self.plan.batch_size, self.scaler)

    def fit(self, *, resume: bool | str | os.PathLike[str] = False) -> TrainResult:
        """Train to the end of the run.

        Thresholds are calibrated on `config.calibration_rows` rows that are not trained on.

        With `config.out`, the folder holds metrics.jsonl, checkpoints/, and in the end the module
        itself, which `fastsae.load` reads, and run.json. No other run can use it meanwhile.

        Args:
            resume: continue from the newest checkpoint in `config.out`, if there is one, or from
                the one given; the result is the same to the last bit as that of a run that was
                never interrupted.

        Raises:
            ValueError: a batch holds NaN or Inf (nothing is updated by it), `out` holds another
                run or SAE, the checkpoint is damaged, or was made with other settings or data.
            RuntimeError: the loss is not finite, the data end early, a file cannot be written, or
                another process has `out`.
            KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP, between two steps, after a checkpoint.
        """
        with nullcontext() if self.out is None else locked(self.out, "Trainer"):
            return self._fit(resume)

    def _fit(self, resume: bool | str | os.PathLike[str]) -> TrainResult:
        with self.opened(resume):
            self._read_recent()
            with StopSignals() as stop:
                self._run(stop)
            return self.complete()

    # -- the parts of fit, for a loop over several trainers --------------------------------------

    @contextmanager
    def opened(self, resume: bool | str | os.PathLike[str] = False) -> Iterator[None]:
        """Begin a run or continue it as `fit` does, and have its log open meanwhile.

        Inside, `advance` takes one batch after the other, and `complete` ends the run. The lock of
        `config.out` is the caller's.

        Args:
            resume: as in `fit`. Batches from `begins_at` on are to be given again: `advance` takes
                those that have been trained on for what they are.
        """
        if self.out is not None:
            sweep(self.out)
            sweep(self.out / "checkpoints")
        self._pending = None
        mark = self._begin(resume)
        log = MetricsLog(
            self.out,
            tensorboard=self.config.tensorboard,
            start=self.steps_done,
            mark=mark,
            began=self._clock.began,
        )
        try:
            with log:
                self._log = log
                self._since = self._clock.seconds, self.steps_done
                yield
        except BaseException:
            self._close(together=False)
            with suppress(Exception):  # there is one to be said already
                self._saver.wait()
            raise
        finally:
            self._log = None
            self._close()

    @property
    def begins_at(self) -> tuple[int, Any]:
        """The update whose batch is the first that `advance` needs, counted from 0, and the state
        of the data before it; None at their start."""
        begin = self._recent.begin
        if begin is None or self.steps_done == self.plan.steps:
            return self.steps_done, self._position
        return begin["step"], begin["data"]

    @property
    def held_back(self) -> int:
        """Rows that `fit` keeps from training, if the data can hold some back."""
        return self._calibration.rows

    def check_out(self, resume: bool) -> None:
        """Raise ValueError if `config.out` holds an SAE without a checkpoint, or a run, unless it
        is to be resumed and has these settings and data. A damaged one is left to `opened`."""
        if self.out is None:
            return
        if not resume:
            self._expect_no_run(self.out)
        found = latest(self.out / "checkpoints")
        if found is None:
            self._expect_no_sae()
            return
        about: dict[str, Any] | None = None
        with suppress(FileNotFoundError, ValueError):
            about = settings_of(found)
        if about is not None:
            check_same_run(str(found), about, self._about())

    def read(self, rows: ActivationSource, position: Any, count: int) -> Generator[Prepared]:
        """Yield `count` raw batches of `rows`, fewer at their end, in the order of this run.

        Args:
            rows: to train on.
            position: state of the data before the first batch; None: their start.
            count: of batches.
        """
        iterator: Iterator[Tensor] = rows.batches(self.plan.batch_size, seed=self.config.seed)
        stateful = hasattr(iterator, "state_dict") and hasattr(iterator, "load_state_dict")
        if position is not None:
            if not stateful:
                raise ValueError(self._no_position())
            iterator.load_state_dict(position)  # type: ignore[attr-defined]
        for _ in range(count):
            batch = next(iterator, None)
            if batch is None:
                return
            state = iterator.state_dict() if stateful else None  # type: ignore[attr-defined]
            yield Prepared(batch, state)

    def write_pending(self) -> None:
        """Write the row of metrics that was being validated when the run was interrupted."""
        if self._pending is not None:
            self._write_row(from_json_row(self._pending["row"]))

    def advance(self, batch: Tensor, position: Any, update: int) -> None:
        """Do what `fit` does with one batch: the update, and the metrics, validation and checkpoint
        that are due after it.

        Args:
            batch: raw rows `[n, columns]`.
            position: state of the data after the batch; None if they have none.
            update: number of the update that the batch is for, counted from 0. One that was done
                before an interruption is remembered for the thresholds, or passed over.

        Raises:
            ValueError, RuntimeError: as `fit`.
        """
        if update < self.begins_at[0]:
            return
        x = self._scaled(self._team.own_rows(self._checked(batch)))
        if update < self.steps_done:
            self._recent.add(x, self.steps_done)
            return
        self._expect_step()
        self._clock.start()
        try:
            self._advance(x, position)
        finally:
            self._clock.stop()

    def save(self) -> None:
        """Write a checkpoint, if there is none of the last update."""
        if self.steps_done and self._saved != self.steps_done:
            self._checkpoint()
        self._saver.wait()

    def complete(self) -> TrainResult:
        """Finish the run, and write the SAE: the end of `fit`, inside `opened`."""
        assert self._log is not None
        log = self._log
        self._saver.wait()
        self.finish()
        if self.out is not None:
            seal = write(self.sae, self.out)
            end = {"format": RUN_FORMAT, "steps": self.steps_done, METRICS: log.mark()}
            write_json(self.out / RUN, sealed({**end, WEIGHTS: seal}))
        final = log.history[-1] if log.history else {}
        return TrainResult(self.sae, log.history, final, self._gap())

    def _gap(self) -> Gap | None:
        """Compare validation and training rows, and log one line if they differ much."""
        if self.data is None or self.val is None:
            return None
        size, tokens = self.plan.batch_size, self._tokens_done
        gap = measure_gap(self.sae, self.data, self.val, self.config, size=size, tokens=tokens)
        if gap is not None and gap.large:
            logger.info("Trainer: %s", gap)
        return gap

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an exact continuation needs: live tensors and JSON values.

        The position of the data is part of it when `fit` reads them, not when you do; nor are the
        last batches that you gave, from which `finish` estimates thresholds.
        """
        if self._update is None:
            raise RuntimeError("Trainer: expected prepare() before state_dict()")
        rng = {"cpu": torch.get_rng_state()}
        device = self.sae.W_enc_rows.device
        if device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(device)
        return {
            "about": self._about(),
            "step": self.steps_done,
            "tokens": self._tokens_done,
            "scales": self.scaler.scales,
            "limits": self.limits,
            "sae": self.sae.state_dict(),
            "update_kind": kind_of(self._update),
            "update": self._update.state_dict(),
            "dead": self._dead.tensors(),
            "rng": rng,
            "data": self._whole(self._position),
            "recent_from": self._whole_begin(),
            "metrics": None if self._log is None else self._log.mark(),
            "pending": self._pending,
            "clock": self._clock.state_dict(),
        }

    def _whole(self, position: Any) -> Any:
        """Return the state of the data with what other processes have of it."""
        whole = getattr(self.data, "whole_state", None)
        return position if whole is None else whole(position)

    def _whole_begin(self) -> dict[str, Any] | None:
        begin = self._recent.begin
        return None if begin is None else {**begin, "data": self._whole(begin["data"])}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, bit for bit, in place of `prepare`; restores torch's RNG too.

        Raises:
            ValueError: it is of a run with other settings, or of another update.
        """
        self._restore(state, "the state")

    # -- inside --------------------------------------------------------------------------------

    def _restore(self, state: dict[str, Any], where: str) -> None:
        update = make_update(self.sae, self.config)
        self._check_state(state, where, update)
        self._count_from_zero()
        self.steps_done, self._tokens_done = state["step"], state["tokens"]
        self.scaler = ActivationScaler(self.sae.columns, state["scales"])
        self.limits = list(state["limits"])
        self.sae.load_state_dict(state["sae"])
        update.load_state_dict(state["update"])
        for name, tensor in self._dead.tensors().items():
            tensor.copy_(state["dead"][name])
        torch.set_rng_state(state["rng"]["cpu"])
        device = self.sae.W_enc_rows.device
        if device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], device)
        self._position, self._recent.begin = state["data"], state["recent_from"]
        self._clock.load_state_dict(state.get("clock", self._clock.state_dict()))
        self._begin_updates(update)
        self.sae.train()

    def _check_state(self, state: dict[str, Any], where: str, update: Update) -> None:
        """Raise ValueError unless `state` is one of this run; nothing changes before that."""
        ours = {
            "scales": self.scaler.scales,
            "limits": self.scaler.scales,
            "sae": self.sae.state_dict(),
            "update": update.state_dict(),
            "dead": self._counter().tensors(),
        }
        check_state(
            state,
            where,
            about=self._about(),
            kind=kind_of(update),
            steps=self.plan.steps,
            ours=ours,
            clock=self._clock.state_dict(),
        )

    def _count_from_zero(self) -> None:
        """Make what steps need besides the update, before anything is measured or loaded."""
        self._clock = Clock()
        self._dead = self._counter()
        self._recent = RecentBatches(self.sae, self.plan.steps, self.plan.batch_size)
        self._compute_dtype = compute_dtype(self.sae, self.config)

    def _begin_updates(self, update: Update) -> None:
        """Take the update of the steps to come, and record them if that is asked for."""
        self._update, self._captured = update, None
        if self.config.capture:
            run = weakref.WeakMethod(self._on_device)  # a cycle would keep memory of the device
            self._captured = make_captured_step(run, self.sae, update, self._dead)

    def _counter(self) -> DeadLatents:
        cls = UnderusedLatents if self.sae.aux == "zipf" else DeadLatents
        return cls(self.sae.d_sae, self.plan.dead_after_tokens, self.sae.W_enc_rows.device)

    def _begin(self, resume: bool | str | os.PathLike[str]) -> dict[str, Any] | None:
        """Prepare a fresh run, or load a checkpoint; return where the metrics were cut then."""
        self._expect_same_everywhere()
        self._calibration.hold_back()
        if self._update is not None and self.steps_done:
            raise RuntimeError(
                f"Trainer: expected fit() before any step, got it after {self.steps_done}; go on "
                "with step(), then finish()"
            )
        found = None
        if self.out is not None and resume is False:
            self._expect_no_run(self.out)
        if not isinstance(resume, bool):
            self._team.shard_(self.sae)
            found = Path(resume), load_checkpoint(Path(resume), self._team.layout)
        elif self._folder is not None:
            folder = self._folder / "checkpoints"
            if self._team.from_first(latest(folder) is not None):
                self._team.shard_(self.sae)
                found = newest_state(folder, self._team.layout)
            if self._team.is_first:
                prune(folder, self.config.keep_checkpoints)
        if found is None:
            self._expect_no_sae()
            self.prepare()
            return None
        path, state = found
        if 0 < state["step"] < self.plan.steps and state["data"] is None:
            raise ValueError(self._no_position())
        self._restore(state, str(path))
        self._saved = self.steps_done if resume is True else None
        self._pending = state["pending"]
        mark: dict[str, Any] | None = state["metrics"]
        return mark

    def _expect_same_everywhere(self) -> None:
        """Raise ValueError unless all processes of a mesh have the same settings and data."""
        if self.config.mesh is None:
            return
        if not self.sae.parallel.is_alone:
            raise ValueError("Trainer: expected an SAE in one piece, got one that is spread")
        hint = "the same settings and data (distributed.gathered takes rows of each process)"
        self._team.expect_same(self._about(), hint)

    def _expect_no_run(self, out: Path) -> None:
        if found := latest(out / "checkpoints"):
            raise ValueError(
                f"Trainer: expected out to hold no earlier run, got {found}; "
                "fit(resume=True) continues it"
            )

    def _expect_no_sae(self) -> None:
        for name in (WEIGHTS, CONFIG, RUN):
            if self.out is not None and (self.out / name).exists():
                raise ValueError(
                    f"Trainer: expected out to hold no SAE, got {self.out / name} and no "
                    "checkpoint that it came from; choose another folder, or remove it"
                )

    def _close(self, together: bool = True) -> None:
        """Fold the scale into the module and leave the run; a second time does nothing.

        Args:
            together: whether all processes of a mesh do so: then each has all latents again.
        """
        if self._update is None:
            return
        self.scaler.fold_(self.sae)
        if together:
            self._team.unshard_(self.sae)
        self.scaler = ActivationScaler(self.sae.columns)
        self._update = self._captured = None
        self._recent.clear()
        self.sae.eval()

    def _sample(self, n: int) -> Tensor:
        rows = self._calibration.training_rows
        if rows is None:
            raise ValueError("Trainer: expected prepare(sample) without data, got no sample")
        return sample_rows(rows, n, self.plan.batch_size, self.config.seed)

    def _checked(self, batch: Tensor, own: bool = False) -> Tensor:
        """Return raw rows in the dtype and on the device of the module, if they are finite; `own`
        ones are not those of the other processes, which refuse them as well."""
        if not isinstance(batch, Tensor) or not batch.is_floating_point():
            got = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
            raise TypeError(f"Trainer: expected rows to be a floating-point Tensor, got {got}")
        width = sum(self.sae.columns.widths)
        if batch.ndim != 2 or batch.shape[1] != width or len(batch) == 0:
            raise ValueError(
                f"Trainer: expected rows [n, {width}] with n >= 1, got {[*batch.shape]}"
            )
        x = batch.to(self.sae.W_enc_rows.device, self.sae.W_enc_rows.dtype)
        bad = bad_rows(x)
        if own:
            bad, most, least = self._team.largest(bad, len(x), -len(x))
            if most != -least:
                raise ValueError(
                    f"Trainer: expected equally many rows of each process, got {-least} to {most}"
                )
        if bad:
            raise ValueError(
                f"Trainer: expected finite activations at step {self.steps_done}, got {bad} of "
                f"{batch.shape[0]} rows with NaN or Inf; nothing was updated with them"
            )
        return x

    def _expect_step(self) -> None:
        if self._update is None or self.steps_done >= self.plan.steps:
            why = "after prepare()" if self._update is None else f"of {self.plan.steps} steps"
            raise RuntimeError(f"Trainer: expected a step {why}, got one more")

    def _scaled(self, x: Tensor) -> Tensor:
        """Return raw rows as they are trained on."""
        x = self.scaler.scale(x)
        return clip_rows_(x, self.sae.columns, self.limits) if self.config.clip_outliers else x

    def _step(self, x: Tensor) -> SAEOutput:
        """Do one update with the scaled batch `x: [n, columns]`; what it returns is scaled too."""
        assert self._update is not None
        done, plan = self.steps_done, self.plan
        # No latent can be dead before that many tokens: the first part of a run has no AuxK.
        may_have_dead = self._tokens_done >= self._dead.after_tokens
        if not self.sae.training:  # somebody has looked at inference meanwhile
            self.sae.train()
        lr, scale = plan.lr_at(done), plan.sparsity_at(done)
        inputs = StepInputs(x, lr, done + 1, scale, done / plan.steps, may_have_dead)
        if self._captured is None:
            out = self._on_device(inputs, partial(self._update.step, lr=lr))
        else:
            out = self._captured.step(inputs)
        self.steps_done += 1
        self._tokens_done += self.sae.parallel.tokens(x.shape[0])
        self._recent.add(x, self.steps_done)
        return out

    def _on_device(self, inputs: StepInputs, update: Move) -> SAEOutput:
        """Do the part of a step that a graph can record: all of it but its bookkeeping."""
        x, parallel = inputs.x, self.sae.parallel
        context = StepContext(
            dead=self._dead.to_revive() if inputs.may_have_dead else None,
            turn=inputs.number,
            sparsity_scale=inputs.sparsity_scale,
            progress=inputs.progress,
            compute_dtype=self._compute_dtype,
            recorded=inputs.recorded,
        )
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            out = update(x, context)
        counts = parallel.sum_over_tokens(out.acts.counts())
        self._dead.count(counts, parallel.tokens(x.shape[0]))
        return out

    def _run(self, stop: StopSignals) -> None:
        steps = self.plan.steps
        show = sys.stderr.isatty() if self.config.progress is None else self.config.progress
        self.write_pending()
        self._clock.start()
        with (
            closing(self._prepared()) as batches,
            tqdm(total=steps, initial=self.steps_done, disable=not show, unit="step") as bar,
        ):
            for x, position in batches:
                row = self._advance(x, position, stop)
                bar.update()
                if row is not None:
                    bar.set_postfix(fvu=f"{row['fvu']:.4f}", dead=int(row["dead"]))
                # The signal may have come after the row was begun; processes have to agree.
                if self._team.layout is None:
                    self._stopped = stop.received is not None
                if self._stopped and self.steps_done < steps:
                    self.save()
                    raise KeyboardInterrupt(self._how_to_resume(stop.received or "a signal"))
        self.expect_all_steps()

    def expect_all_steps(self) -> None:
        """Raise RuntimeError unless all updates are done."""
        if self.steps_done < self.plan.steps:
            raise RuntimeError(
                f"Trainer: expected data for {self.plan.steps} steps, got {self.steps_done}"
            )

    def _advance(self, x: Tensor, position: Any, stop: StopSignals | None = None) -> Row | None:
        """Do one update with the scaled batch `x: [n, columns]`, and what is due after it.

        Returns:
            The row of metrics, if one was due.
        """
        cfg = self.config
        self._recent.at_step(self.steps_done, self._position)
        out = self._step(x)
        self._position = position
        last = self.steps_done == self.plan.steps
        evaluates = last or _due(self.steps_done, cfg.eval_every)
        evaluates |= self.steps_done in self._early.steps
        if last:
            self._recent.estimate_threshold_()
            self._calibration.set_thresholds_(lambda rows: self.scaler.scale(self._checked(rows)))
        row: Row | None = None
        if evaluates or _due(self.steps_done, cfg.log_every):
            row = self._row(x, out)
            row["seconds"] = self._clock.seconds
            since, since_step = self._since
            tokens = (self.steps_done - since_step) * self.sae.parallel.tokens(len(x))
            row["tokens_per_second"] = tokens / max(row["seconds"] - since, 1e-9)
            self._pending = {"row": as_json_row(row), "validate": evaluates}
        # Before anything that may fail: validation, and writing the row.
        received = stop is not None and stop.received is not None
        self._stopped = self._team.total(int(received)) > 0
        if last or self._stopped or _due(self.steps_done, cfg.checkpoint_every):
            with self._paused():
                self._checkpoint()
        if row is not None:
            with self._paused():
                self._write_row(row)
            self._since = row["seconds"], self.steps_done
        return row

    def _paused(self) -> AbstractContextManager[None]:
        """Stop the clock meanwhile, once the device has done what was asked of it."""
        device = self.sae.W_enc_rows.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self._clock.paused()

    def _write_row(self, row: Row) -> None:
        """Complete the pending row and put it into the log."""
        assert self._pending is not None
        assert self._log is not None
        if self.val is not None and self._pending["validate"]:
            row |= self._early.sample_row(self.sae, self.scaler)
            if self._early.needs_all(int(row["step"])):
                row |= self.validate()
        self._log.add(row)
        self._pending = None

    def _prepared(self) -> Generator[Prepared]:
        """Yield the batches of the steps to come; for a GPU, a thread works ahead."""
        device = self.sae.W_enc_rows.device
        batches = self._read(self._position, self.plan.steps - self.steps_done)
        ahead = device.type == "cuda" and self._team.layout is None
        return prefetch(batches, device) if ahead else batches

    def _read(self, position: Any, count: int) -> Generator[Prepared]:
        """Yield `count` batches of the data from `position` on, checked and scaled."""
        rows = self._calibration.training_rows
        if rows is None:
            raise ValueError("Trainer: expected data for fit(), got None; call step() yourself")
        own = getattr(rows, "of_data_group", False)
        feed = Feed(self.sae.W_enc_rows.device)
        for number, (batch, state) in enumerate(self.read(rows, position, count)):
            x = self._checked(feed(batch), own=own)
            if number == 0 and not own and self._team.layout is not None:
                hint = "the same batches (distributed.gathered takes rows of each process)"
                self._team.expect_same(checksum.of_rows(x.cpu()), hint)
            yield Prepared(self._scaled(x if own else self._team.own_rows(x)), state)

    def _read_recent(self) -> None:
        """Read again what the interrupted run remembered."""
        begin = self._recent.begin
        if begin is None or self.steps_done == self.plan.steps:
            return  # a finished run has estimated its thresholds
        for x, _ in self._read(begin["data"], self.steps_done - begin["step"]):
            self._recent.add(x, self.steps_done)

    def _row(self, x: Tensor, out: SAEOutput) -> Row:
        """Return the metrics of the update just done, read from the device at once."""
        out.mse = out.mse / self.scaler.error_scale**2
        target, parallel = self.sae.columns.split(x).target, self.sae.parallel
        numbers = step_metrics(out, target, self.config.outlier_norm)
        if not parallel.is_alone:
            tokens = parallel.tokens(1)
            numbers["l0"] = float(parallel.sum_over_all(out.acts.l0())) / tokens
        numbers["dead"] = float(parallel.count(int(self._dead.mask().sum())))
        row: Row = {"step": self.steps_done, "tokens": self._tokens_done, **numbers}
        row["lr"] = self.plan.lr_at(self.steps_done - 1)
        if not abs(row["loss"]) < float("inf"):
            raise RuntimeError(
                f"Trainer: expected a finite loss, got {row['loss']} at step {self.steps_done} "
                f"with lr = {row['lr']:.3g}; checkpoints hold no such weights"
            )
        return row

    def _checkpoint(self) -> None:
        if self._folder is None:
            return
        bad = sum(not bool(p.isfinite().all()) for p in self.sae.parameters())
        if self._team.total(bad):
            raise RuntimeError(
                f"Trainer: expected finite weights, got NaN or Inf at step {self.steps_done}; "
                "the last checkpoint is kept"
            )
        folder, keep = self._folder / "checkpoints", self.config.keep_checkpoints
        layout, state = self._team.layout, self.state_dict()
        state = copied(state) if self._saver.beside else state
        if layout is not None:
            group = self._team.saving
            self._saver.save(lambda: save_spread_checkpoint(folder, state, keep, layout, group))
        else:
            sae, steps = self._raw_copy(), self.plan.steps
            self._saver.save(lambda: save_checkpoint(folder, sae, state, keep, steps))
        self._saved = self.steps_done

    def _raw_copy(self) -> SAE:
        """Return a copy of the SAE that takes raw activations; it shares what folding keeps."""
        shares = self.scaler.keeps_matrices and not self._saver.beside
        kept = self.sae.matrices if shares else []
        shared: dict[int, Any] = {id(p): p for p in kept if p is not None}
        sae = copy.deepcopy(self.sae, shared)
        self.scaler.fold_(sae)
        return sae

    def _about(self) -> dict[str, Any]:
        """Return what must be the same for a run and its continuation, as JSON values."""
        sae = {"class": type(self.sae).__name__, "dtype": str(self.sae.W_enc_rows.dtype)}
        rows = None if self.data is None else source_len(self.data)
        if self._fingerprint is None and self.data is not None:
            self._fingerprint = fingerprint(self.data)
        data = {"rows": rows, "data": self._fingerprint}
        planned = {"lr": self.plan.lr, "batch_size": self.plan.batch_size}
        settings = {**sae, **self.sae.config(), **data, **self.config.to_dict(), **planned}
        kept = {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
        about: dict[str, Any] = json.loads(json.dumps(kept))
        return about

    def _no_position(self) -> str:
        return (
            "Trainer: expected data whose batches have state_dict and load_state_dict to resume, "
            f"got {type(self.data).__name__}"
        )

    def _how_to_resume(self, signal_name: str) -> str:
        done = f"{signal_name} at step {self.steps_done} of {self.plan.steps}"
        if self._folder is None:
            return f"{done}; nothing was saved, because config.out is None"
        return f"{done}; a checkpoint is in {self._folder}, fit(resume=True) continues from it"


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
