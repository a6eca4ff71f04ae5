"""Everything one chooses about a training run."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import Any

from fastsae.nn.parameters import plain

INTEGERS: tuple[str, ...] = ("batch_size", "steps", "total_tokens", "warmup_steps", "seed")
INTEGERS += ("sparsity_warmup_steps", "dead_after_tokens", "sample_rows", "log_every")
INTEGERS += ("eval_every", "checkpoint_every", "keep_checkpoints", "calibration_rows")
NUMBERS = ("lr", "eps", "epochs", "decay_fraction", "clip_grad_norm", "outlier_norm")
SWITCHES = ("normalize", "tensorboard", "progress")


@dataclass
class TrainConfig:
    """Settings of a `Trainer`; the defaults follow Gao et al. 2024 (arXiv 2406.04093), appendix A.

    Raises:
        ValueError: a value is of another type or out of range, or two exclude each other.
    """

    lr: float | None = None
    """Peak learning rate; None takes 2e-4 / sqrt(d_sae / 2^14) for adam, and 0.01 for sgd_sai:
    the largest of a sweep that diverged neither on planted features nor on real activations with
    attention sinks. 0.2 was best without such rows, or with clip_grad_norm 0.01."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's two averages."""
    eps: float = 6.25e-10
    """Adam's epsilon; small, because the gradient of one weight is."""
    batch_size: int = 4096
    """Tokens per update."""
    epochs: float = 1
    """Passes over the data; ignored when `steps` or `total_tokens` is given. Rows held back for
    calibration count, so that all classes are trained on equally many tokens."""
    steps: int | None = None
    """Number of updates; the data are repeated as often as needed."""
    total_tokens: int | None = None
    """The same as a number of tokens, rounded down to whole batches."""
    warmup_steps: int | None = None
    """Updates of linear warm-up; None takes a twentieth of the run, at most 1000."""
    decay_fraction: float = 0.2
    """Share of the run, at its end, over which the learning rate falls linearly to 0."""
    sparsity_warmup_steps: int | None = None
    """Updates over which the sparsity loss rises to its weight, for SAEs that have one; None takes
    a twentieth of the run."""
    clip_grad_norm: float | None = None
    """Largest norm of the whole gradient; None does not clip."""
    optimizer: str = "adam"
    """adam, or sgd_sai: `train.SGDSaI`, with half the state and always the autograd update. `betas`
    and `eps` are Adam's."""
    update: str = "auto"
    """How parameters move: fused (latent by latent, no gradient of a matrix exists), autograd (a
    backward and the optimizer: the same step, slower), or auto: fused where it applies. That
    follows from what the module is, see `train.update.why_not_fused`; asking for fused where it
    does not apply is an error."""
    compute_dtype: str = "auto"
    """What the encoder's matmul rounds its two factors to while training: float32 (nothing),
    bfloat16, or auto: bfloat16 where the processor multiplies it natively (AVX-512 BF16, GPUs from
    compute capability 8.0 on). A GPU rounds the rows that gradients are sums of as well, see
    `ops.sparse_adam_step_`. Parameters, sums, selection, thresholds and statistics are float32 in
    any case."""
    dead_after_tokens: int | None = None
    """Tokens without firing that make a latent dead; None: a tenth of the run, at most 10^7."""
    normalize: bool = True
    """Train on activations times one number, such that their mean squared distance from the mean is
    d_in. Adam moves every weight by about `lr`, so the two biases, which alone carry the unit of
    the activations, need this for one `lr` to fit all models. The number is folded into the biases
    (and thresholds) of every SAE that leaves the trainer: it takes and returns raw activations."""
    b_dec_init: str = "geometric_median"
    """Where b_dec starts: geometric_median, mean, or zeros. A module whose biases are not all zero
    has been trained before, and keeps them."""
    sample_rows: int = 8192
    """Rows that the scale and the start of b_dec are measured on."""
    outlier_norm: float = 3.0
    """Rows whose norm is above this many medians are left out of those two measurements and of
    fvu_no_outliers (attention sinks reach 100 medians); training sees them."""
    calibration_rows: int | None = None
    """Rows that are kept from training, on which `fit` calibrates thresholds in the end, for SAEs
    that have some and a k: BatchTopK, FeatureChoice, JumpReLU and what is made of them. They are
    pieces of 64 rows spread evenly over the data, or the rows that follow in an iterator. None
    takes a twentieth of the data, 512 to 8192 rows, or none where that is more than a tenth. 0:
    thresholds are those of the last training batches."""
    seed: int = 0
    """Seed of the order of the data."""
    log_every: int = 50
    """Updates between two rows of metrics."""
    eval_every: int | None = None
    """Updates between two validations; None validates at the end only. Before the end thresholds
    are those of training, so val_l0 may be far from k."""
    checkpoint_every: int | None = None
    """Updates between two checkpoints; None writes one when interrupted and at the end."""
    keep_checkpoints: int = 2
    """Checkpoints that stay on disk."""
    out: str | os.PathLike[str] | None = None
    """Folder for metrics.jsonl, checkpoints/ and the trained SAE; None writes nothing."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into out/tensorboard."""
    progress: bool | None = None
    """Show a progress bar; None shows it on a terminal only."""

    def __post_init__(self) -> None:
        for field in fields(self):
            setattr(self, field.name, plain(getattr(self, field.name)))
        self._check_types()
        for name in ("batch_size", "epochs", "sample_rows", "log_every", "keep_checkpoints"):
            self._expect(getattr(self, name) > 0, f"{name} > 0", name)
        optional = ("lr", "steps", "total_tokens", "dead_after_tokens", "clip_grad_norm")
        for name in (*optional, "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            self._expect(value is None or 0 < value < math.inf, f"{name} > 0 or None", name)
        self._expect(all(0 <= b < 1 for b in self.betas), "two betas in [0, 1)", "betas")
        self._expect(self.eps > 0, "eps > 0", "eps")
        for name in ("warmup_steps", "sparsity_warmup_steps", "calibration_rows"):
            value = getattr(self, name)
            self._expect(value is None or value >= 0, f"{name} >= 0 or None", name)
        self._expect(0 <= self.decay_fraction <= 1, "0 <= decay_fraction <= 1", "decay_fraction")
        self._expect(self.outlier_norm > 1, "outlier_norm > 1", "outlier_norm")
        self._expect(0 <= self.seed < 2**32, "0 <= seed < 2^32", "seed")
        self._expect(
            self.steps is None or self.total_tokens is None,
            "at most one of steps and total_tokens",
            "steps",
        )
        for name, choices in (
            ("optimizer", ("adam", "sgd_sai")),
            ("update", ("auto", "fused", "autograd")),
            ("compute_dtype", ("auto", "float32", "bfloat16")),
        ):
            known = getattr(self, name) in choices
            self._expect(known, f"{name} in {', '.join(choices)}", name)
        starts = ("geometric_median", "mean", "zeros")
        self._expect(self.b_dec_init in starts, f"b_dec_init in {', '.join(starts)}", "b_dec_init")
        if self.out is None:
            for name in ("checkpoint_every", "tensorboard"):
                self._expect(
                    not getattr(self, name), f"out to be a folder when {name} is set", "out"
                )

    def _check_types(self) -> None:
        for names, kinds, what in (
            (INTEGERS, (int,), "an integer"),
            (NUMBERS, (int, float), "a number"),
            (SWITCHES, (bool,), "True or False"),
            (("optimizer", "update", "compute_dtype", "b_dec_init"), (str,), "a string"),
            (("out",), (str, os.PathLike), "a path"),
        ):
            for name in names:
                value, may_be_none = getattr(self, name), NONE_IS_DEFAULT[name]
                right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
                expected = f"{name} to be {what}{' or None' if may_be_none else ''}"
                self._expect(right or (value is None and may_be_none), expected, name)
        for name in ("epochs", "eps"):
            self._expect(math.isfinite(getattr(self, name)), f"a finite {name}", name)
        betas = tuple(self.betas) if isinstance(self.betas, list | tuple) else ()
        numbers = [isinstance(plain(b), int | float) for b in betas]
        self._expect(numbers == [True, True], "two numbers as betas", "betas")
        self.betas = (plain(betas[0]), plain(betas[1]))

    def _expect(self, condition: bool, expectation: str, name: str) -> None:
        if not condition:
            raise ValueError(f"TrainConfig: expected {expectation}, got {getattr(self, name)!r}")

    def peak_lr(self, d_sae: int) -> float:
        """Return `lr`, or what None takes for `d_sae` latents."""
        if self.lr is not None:
            return self.lr
        return 1e-2 if self.optimizer == "sgd_sai" else 2e-4 / math.sqrt(d_sae / 2**14)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["betas"] = list(self.betas)
        values["out"] = None if self.out is None else os.fspath(self.out)
        return values


NONE_IS_DEFAULT = {field.name: field.default is None for field in fields(TrainConfig)}
