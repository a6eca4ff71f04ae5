"""The training loop.

    rate -> loss -> gradients -> remove the parallel decoder gradient -> clip -> optimizer
    -> unit decoder rows -> dead latents

Decoder rows are normalised after the update, so they have norm 1 in every forward.

Source: Gao et al. 2024 (arXiv 2406.04093), appendix A.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastsae.nn import SAE, SAEOutput
from fastsae.train.ahead import ahead
from fastsae.train.batches import Batches, as_batches, bad_rows, sample_rows, scaled
from fastsae.train.checkpoint import (
    TrainState,
    latest,
    load_checkpoint,
    prepare_optimizer,
    read_about,
    save_checkpoint,
)
from fastsae.train.config import TrainConfig
from fastsae.train.dead import DeadLatents, UnderusedLatents
from fastsae.train.interrupt import StopSignals
from fastsae.train.metrics import MetricsLog, Row, fvu_no_outliers, usual_rows, validate
from fastsae.train.schedule import make_plan
from fastsae.train.update import (
    autograd_update,
    compute_dtype,
    fused_update,
    is_fused,
    make_optimizer,
)

SETTLE_BATCHES = 32
"""Training batches from which thresholds are fixed at the end of a run."""


@dataclass
class TrainResult:
    """What `Trainer.fit` returns."""

    sae: SAE
    """The trained module, for raw activations, in eval mode."""
    history: list[Row]
    """Rows of metrics, as in metrics.jsonl."""
    final: Row
    """The last row, with val_* if there was validation data."""


class Trainer:
    """Trains an SAE in place.

    Args:
        sae: the module; it takes and returns raw activations before and after `fit`.
        data: activations `[n, d_in]`, or anything that is a `train.batches.Batches`; SAEs that
            read several sites take their columns side by side, as `SAE.data_widths` says.
        config: the settings; None takes the defaults.
        val: held-out data of the same kind, for val_fvu, val_mse and val_l0.

    Raises:
        TypeError: data or val is of another kind.
        ValueError: another d_in, or data smaller than a batch.
    """

    def __init__(
        self,
        sae: SAE,
        data: Tensor | Batches,
        config: TrainConfig | None = None,
        *,
        val: Tensor | Batches | None = None,
    ) -> None:
        self.sae = sae
        self.config = config or TrainConfig()
        self.data = as_batches(data)
        self.val = None if val is None else as_batches(val)
        for name, given in (("data", self.data), ("val", self.val)):
            if given is not None and given.d_in != sum(sae.data_widths):
                blocks = " + ".join(map(str, sae.data_widths))
                raise ValueError(f"Trainer: expected {name} with d_in = {blocks}, got {given.d_in}")
        self.plan = make_plan(self.config, len(self.data), sae.d_sae)
        self.out = None if self.config.out is None else Path(self.config.out)

    def fit(self, *, resume: bool = False) -> TrainResult:
        """Train to the end of the run.

        With `config.out`, the folder holds metrics.jsonl, checkpoints/, and in the end the module
        itself, which `fastsae.load` reads.

        Args:
            resume: continue from the newest checkpoint in `config.out`, if there is one; the result
                is the same to the last bit as that of a run that was never interrupted.

        Raises:
            ValueError: a batch holds NaN or Inf (nothing is updated by it), `out` holds another
                run, or the checkpoint was made with other settings.
            RuntimeError: the loss is not finite, or a file cannot be written.
            KeyboardInterrupt: on SIGINT or SIGTERM, between two steps, after a checkpoint.
        """
        state = self._start(resume)
        log = MetricsLog(self.out, tensorboard=self.config.tensorboard, start=state.step)
        self.sae.train()
        try:
            with log, StopSignals() as stop:
                self._run(state, log, stop)
        finally:
            self.sae.fold_input_scales_(state.scales)
            self.sae.compute_dtype = None
            self.sae.sparsity_scale = 1.0
            self.sae.eval()
        if self.out is not None:
            self.sae.save(self.out)
        return TrainResult(self.sae, log.history, log.history[-1] if log.history else {})

    def _start(self, resume: bool) -> TrainState:
        """Return the state at the first step to do: a checkpoint's, or a fresh one."""
        self.sae.compute_dtype = compute_dtype(self.sae, self.config)
        optimizer = make_optimizer(self.sae, self.config, self.plan.lr)
        prepare_optimizer(optimizer)
        self.fused = is_fused(self.sae, optimizer, self.config)
        counter = UnderusedLatents if self.sae.aux == "zipf" else DeadLatents
        dead = counter(self.sae.d_sae, self.plan.dead_after_tokens, self.sae.W_enc.device)
        state = TrainState(self.sae, optimizer, dead)
        found = None if self.out is None else latest(self.out / "checkpoints")
        if found is None:
            self._measure(state)
        elif not resume:
            raise ValueError(
                f"Trainer: expected out to hold no earlier run, got {found}; "
                "fit(resume=True) continues it"
            )
        else:
            self._check_same_run(found)
            load_checkpoint(found, state)
        return state

    def _measure(self, state: TrainState) -> None:
        """Set the scales and the biases from a sample, and move the SAE to scaled activations."""
        cfg, sae = self.config, self.sae
        x = sample_rows(self.data, cfg.sample_rows, cfg.batch_size, cfg.seed)
        state.scales = [1.0] * len(sae.data_widths)
        x = self._input(x, state.step, state.scales)
        x = x[usual_rows(sae.split(x)[0], cfg.outlier_norm)]
        if cfg.normalize:
            state.scales = sae.input_scales(x)
            sae.fold_input_scales_([1 / scale for scale in state.scales])
        if cfg.b_dec_init == "zeros":
            sae.b_dec = torch.zeros_like(sae.b_dec)
        elif cfg.b_dec_init != "keep":
            sae.start_(scaled(x, sae.data_widths, state.scales), cfg.b_dec_init)

    def _run(self, state: TrainState, log: MetricsLog, stop: StopSignals) -> None:
        cfg, steps = self.config, self.plan.steps
        show = sys.stderr.isatty() if cfg.progress is None else cfg.progress
        since, since_step = time.perf_counter(), state.step
        with (
            closing(self._inputs(state)) as inputs,
            tqdm(total=steps, initial=state.step, disable=not show, unit="step") as bar,
        ):
            for x in inputs:
                out = self._step(x, state)
                bar.update()
                last = state.step == steps
                if last:
                    recent = islice(self._batches(max(0, steps - SETTLE_BATCHES)), SETTLE_BATCHES)
                    settling = (self._input(batch, steps, state.scales) for batch in recent)
                    self.sae.settle_(self.sae.split(x)[0] for x in settling)
                if last or _due(state.step, cfg.log_every) or _due(state.step, cfg.eval_every):
                    row = self._row(x, out, state)
                    seconds = time.perf_counter() - since
                    tokens = (state.step - since_step) * cfg.batch_size
                    row["tokens_per_second"] = tokens / seconds
                    if self.val is not None and (last or _due(state.step, cfg.eval_every)):
                        row |= validate(self.sae, self.val, cfg.batch_size, state.scales)
                    log.add(row)
                    bar.set_postfix(fvu=f"{row['fvu']:.4f}", dead=int(row["dead"]))
                    since, since_step = time.perf_counter(), state.step
                if last or stop.received or _due(state.step, cfg.checkpoint_every):
                    self._checkpoint(state)
                if stop.received and not last:
                    raise KeyboardInterrupt(self._how_to_resume(state, stop.received))

    def _batches(self, step: int) -> Iterator[Tensor]:
        """Yield the batches of updates `step`, `step + 1`, ... of the run."""
        cfg, per_epoch = self.config, self.plan.batches_per_epoch
        while step < self.plan.steps:
            epoch, start = divmod(step, per_epoch)
            end = min(self.plan.steps, (epoch + 1) * per_epoch)
            batches = self.data.batches(cfg.batch_size, cfg.seed, epoch, start)
            for batch in islice(batches, end - step):
                step += 1
                yield batch
            if step < end:
                got = step % per_epoch
                raise RuntimeError(
                    f"Trainer: expected {per_epoch} batches in epoch {epoch}, got {got}"
                )

    def _inputs(self, state: TrainState) -> Generator[Tensor]:
        """Yield what the SAE takes at each step from here on; for a GPU, a thread works ahead."""
        batches = enumerate(self._batches(state.step), state.step)
        inputs = (self._input(batch, step, state.scales) for step, batch in batches)
        device = self.sae.W_enc.device
        return ahead(inputs, device) if device.type == "cuda" else inputs

    def _input(self, batch: Tensor, step: int, scales: Sequence[float]) -> Tensor:
        """Return the batch as the SAE takes it in training, checked."""
        x = batch.to(self.sae.W_enc.device, self.sae.W_enc.dtype)
        bad = bad_rows(x)
        if bad:
            raise ValueError(
                f"Trainer: expected finite activations at step {step}, got {bad} of "
                f"{batch.shape[0]} rows with NaN or Inf; nothing was updated with them"
            )
        return scaled(x, self.sae.data_widths, scales)

    def _step(self, x: Tensor, state: TrainState) -> SAEOutput:
        """Do one update with the batch `x: [batch_size, columns]`."""
        sae, optimizer, dead = state.sae, state.optimizer, state.dead
        for group in optimizer.param_groups:
            group["lr"] = self.plan.lr_at(state.step)
        sae.sparsity_scale = self.plan.sparsity_at(state.step)
        sae.progress = state.step / self.plan.steps
        # No latent can be dead before that many tokens, so the first part of a run never asks.
        some_may_be = state.step * x.shape[0] >= dead.after_tokens
        revive = dead.to_revive() if some_may_be else None
        if self.fused:
            out = fused_update(sae, optimizer, x, revive, self.config, state.step + 1)
        else:
            out = autograd_update(sae, optimizer, x, revive, self.config)
        dead.count(out.acts.counts(), x.shape[0])
        state.step += 1
        return out

    def _row(self, x: Tensor, out: SAEOutput, state: TrainState) -> Row:
        """Return the metrics of the update just done, read from the device at once."""
        values = {
            "loss": out.loss,
            "fvu": out.fvu,
            "mse": out.mse / self.sae.error_scale(state.scales) ** 2,
            "aux_loss": out.aux_loss,
            "sparsity_loss": out.sparsity_loss,
            "l0": out.acts.l0(),
            "dead": state.dead.mask().sum(),
            "fvu_no_outliers": fvu_no_outliers(
                self.sae.split(x)[1], out.reconstruction, self.config.outlier_norm
            ),
        }
        numbers = torch.stack([value.detach().double() for value in values.values()]).tolist()
        row: Row = {"step": state.step, "tokens": state.step * self.config.batch_size}
        row |= dict(zip(values, numbers, strict=True))
        row["lr"] = self.plan.lr_at(state.step - 1)
        if not math.isfinite(row["loss"]):
            raise RuntimeError(
                f"Trainer: expected a finite loss, got {row['loss']} at step {state.step} with "
                f"lr = {row['lr']:.3g}; checkpoints hold no such weights"
            )
        return row

    def _checkpoint(self, state: TrainState) -> None:
        if self.out is None:
            return
        if not all(bool(p.isfinite().all()) for p in state.sae.parameters()):
            raise RuntimeError(
                f"Trainer: expected finite weights, got NaN or Inf at step {state.step}; "
                "the last checkpoint is kept"
            )
        folder = self.out / "checkpoints"
        save_checkpoint(folder, state, self._about(), self.config.keep_checkpoints)

    def _about(self) -> dict[str, Any]:
        """Return what must be the same for a run and its continuation."""
        sae = {"class": type(self.sae).__name__, "dtype": str(self.sae.W_enc.dtype)}
        settings = {**sae, **self.sae.config(), "rows": len(self.data), **self.config.to_dict()}
        free = ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints")
        return {
            name: value
            for name, value in settings.items()
            if name not in (*free, "out", "tensorboard", "progress")
        }

    def _check_same_run(self, checkpoint: Path) -> None:
        theirs = {"optimizer": "adam"} | read_about(checkpoint)  # older ones have no such setting
        ours = self._about()
        for name in ours:
            if theirs.get(name) != ours[name]:
                raise ValueError(
                    f"Trainer: expected {name} = {theirs.get(name)!r} as in {checkpoint}, "
                    f"got {ours[name]!r}"
                )

    def _how_to_resume(self, state: TrainState, signal_name: str) -> str:
        done = f"{signal_name} at step {state.step} of {self.plan.steps}"
        if self.out is None:
            return f"{done}; nothing was saved, because config.out is None"
        return f"{done}; a checkpoint is in {self.out}, fit(resume=True) continues from it"


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
