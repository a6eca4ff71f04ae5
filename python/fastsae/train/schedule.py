"""How long a run is, and the learning rate of every step."""

from __future__ import annotations

from dataclasses import dataclass

from fastsae.train.config import TrainConfig
from fastsae.train.defaults import default_batch_size, default_dead_after, default_lr


@dataclass(frozen=True)
class RunPlan:
    """What a `TrainConfig` comes to for given data and a given number of latents."""

    steps: int
    """Updates of the whole run."""
    batch_size: int
    """Rows of each."""
    lr: float
    """Peak learning rate."""
    warmup_steps: int
    """Updates of linear warm-up."""
    decay_fraction: float
    """Share of the run over which the rate falls to 0."""
    dead_after_tokens: int
    """Tokens without firing that make a latent dead."""
    sparsity_warmup_steps: int
    """Updates over which the sparsity loss rises to its weight."""

    def __str__(self) -> str:
        decay = round(self.decay_fraction * self.steps)
        return (
            f"{self.steps:,} updates of {self.batch_size:,} rows at a rate of {self.lr:.3g}, "
            f"warm-up over {self.warmup_steps:,} and decay over {decay:,} of them"
        )

    def sparsity_at(self, step: int) -> float:
        """Return the share of the sparsity loss in update `step`, counted from 0."""
        return min(1.0, (step + 1) / max(1, self.sparsity_warmup_steps))

    def lr_at(self, step: int) -> float:
        """Return the learning rate of update `step`, counted from 0."""
        return lr_at(
            step,
            lr=self.lr,
            steps=self.steps,
            warmup_steps=self.warmup_steps,
            decay_fraction=self.decay_fraction,
        )


def make_plan(
    config: TrainConfig,
    rows: int | None,
    *,
    d_in: int,
    d_sae: int,
    k: float | None = None,
    device: str = "cpu",
) -> RunPlan:
    """Work out the defaults of `config` for `rows` tokens of data and the sizes of an SAE.

    Args:
        config: the settings.
        rows: of one pass over the data; None: nobody knows how many.
        d_in: width of the encoder's input.
        d_sae: number of latents.
        k: active latents per token, if that is known.
        device: type of the one that trains.

    Raises:
        ValueError: the data do not fill one batch, the run has no step, or neither the data nor
            the settings say how many.
    """
    batch = config.batch_size or _batch_size(config, rows, device)
    if rows is not None and rows < batch:
        raise ValueError(f"Trainer: expected at least batch_size = {batch} rows, got {rows}")
    if config.steps is not None:
        steps = config.steps
    elif config.total_tokens is not None:
        steps = config.total_tokens // batch
    elif rows is not None:
        steps = int(config.epochs * (rows // batch))
    else:
        raise ValueError(
            "Trainer: expected steps or total_tokens for data without a length, got neither"
        )
    if steps == 0:
        raise ValueError(f"Trainer: expected at least one update, got none (batch_size = {batch})")
    warmup = min(1000, steps // 20) if config.warmup_steps is None else config.warmup_steps
    dead_after = config.dead_after_tokens
    if dead_after is None:
        dead_after = default_dead_after(d_sae, k, tokens=steps * batch)
    sparsity_warmup = config.sparsity_warmup_steps
    lr = config.lr
    if lr is None:
        lr = default_lr(config.optimizer, d_in=d_in, d_sae=d_sae, steps=steps)
    return RunPlan(
        steps=steps,
        batch_size=batch,
        lr=lr,
        warmup_steps=warmup,
        decay_fraction=config.decay_fraction,
        dead_after_tokens=dead_after,
        sparsity_warmup_steps=steps // 20 if sparsity_warmup is None else sparsity_warmup,
    )


def _batch_size(config: TrainConfig, rows: int | None, device: str) -> int:
    tokens = config.total_tokens
    if config.steps is None and tokens is None and rows is not None:
        tokens = int(config.epochs * rows)
    return default_batch_size(device, rows=rows, tokens=tokens)


def lr_at(step: int, *, lr: float, steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """Return the learning rate of update `step`, counted from 0, of a run of `steps` updates.

        lr * min(1, (step + 1) / warmup_steps, (steps - step) / (decay_fraction * steps))

    Linear warm-up, constant, linear decay: every update has a positive rate, and the one after the
    last would have 0.
    """
    factor = 1.0
    if warmup_steps:
        factor = min(factor, (step + 1) / warmup_steps)
    if decay_fraction:
        factor = min(factor, (steps - step) / (decay_fraction * steps))
    return lr * factor
