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
INTEGERS += ("hold_back", "start_seed")
NUMBERS = ("lr", "eps", "epochs", "decay_fraction", "clip_grad_norm", "outlier_norm")
SWITCHES: tuple[str, ...] = ("normalize", "clip_outliers", "tensorboard", "progress")
SWITCHES += ("async_checkpoints", "capture", "weight_copies")
STRINGS: tuple[str, ...] = (
    "optimizer",
    "update",
    "compute_dtype",
    "b_dec_init",
    "weight_init",
    "adam_dtype",
)
STRINGS += ("decode_dtype",)


@dataclass
class TrainConfig:
    """Settings of a `Trainer`; docs/training.md says how the defaults were found.

    Raises:
        ValueError: a value is of another type or out of range, or two exclude each other.
    """

    lr: float | None = None
    """Peak learning rate; None takes that of `train.defaults.default_lr`, a rule fitted to sweeps,
    from the sizes of the SAE and the number of updates."""
    betas: tuple[float, float] = (0.5, 0.999)
    """Decay rates of Adam's two averages."""
    eps: float = 6.25e-10
    """Adam's epsilon; small, because the gradient of one weight is."""
    batch_size: int | None = None
    """Tokens per update; None takes that of `train.defaults.default_batch_size`: 1024 on a CPU,
    4096 on a GPU, fewer where that would be less than 256 updates."""
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
    adam_dtype: str = "float32"
    """What Adam's averages of matrices are stored in: float32, which means the dtype of the
    parameters, or bfloat16, rounded stochastically by random bits of `seed`, so that an average
    moves as it should on the mean. A weight and its averages then take 8 bytes instead of 12. For
    the fused update, Adam and float32 parameters."""
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
    capture: bool = False
    """Record a step as a CUDA graph, and replay it: the same step to the last bit, started by one
    call instead of more than a hundred. For every class that the fused update trains, on one GPU
    (`train.captured_step.why_not_captured`); others run as without, and the log says so."""
    weight_copies: bool = False
    """Keep a bfloat16 copy of W_enc, 2 bytes a weight, that the fused update writes along with it:
    for a GPU, whose encoder then converts no matrix in a step. Takes compute_dtype="bfloat16", and
    changes no bit of what is trained. After a write to the parameter from outside the copy is made
    anew; one in place through `.data` or by numpy, which torch does not count, is not noticed."""
    decode_dtype: str = "float32"
    """What the decoder reads the rows of W_dec in while training: float32, which means the dtype of
    the parameters, or bfloat16: a copy, 2 bytes a weight, that the fused update writes along with
    W_dec. The reconstruction and the gradient of the code are made of it; W_dec itself, its
    gradient, sums and the auxiliary loss of dead latents are float32. For the fused update, float32
    parameters, one process, and classes that decode by `ops.sparse_decode`."""
    dead_after_tokens: int | None = None
    """Tokens without firing that make a latent dead; None: a fortieth of the run, at least those in
    which a latent fires 20 times on average, at most 10^7."""
    normalize: bool = True
    """Train on activations times one number, such that their mean squared distance from the mean is
    d_in. Adam moves every weight by about `lr`, so the two biases, which alone carry the unit of
    the activations, need this for one `lr` to fit all models. The number is folded into the biases
    (and thresholds) of every SAE that leaves the trainer: it takes and returns raw activations."""
    b_dec_init: str = "geometric_median"
    """Where b_dec starts: geometric_median, mean, or zeros. A module whose biases are not all zero
    has been trained before, and keeps them."""
    weight_init: str = "data"
    """Where the rows of a module that was just constructed start: data, at directions of the
    sample (`SAE.initialize_rows_`), or random, where the constructor put them."""
    sample_rows: int = 8192
    """Rows that the scale and the start of the parameters are measured on."""
    outlier_norm: float = 3.0
    """Rows whose norm is above this many medians (attention sinks reach 100) are outliers: left out
    of those measurements and of fvu_no_outliers."""
    clip_outliers: bool = True
    """Scale outliers down to `outlier_norm` medians in training, where the norm of one would drown
    the gradient of its batch. Their code and reconstruction follow, as both are proportional to a
    row but for the biases. Validation and the trained SAE see them as they are."""
    calibration_rows: int | None = None
    """Rows that are kept from training, on which `fit` calibrates thresholds in the end, for SAEs
    that have some and a k: BatchTopK, FeatureChoice, JumpReLU and what is made of them. They are
    pieces of 64 rows spread evenly over the data, or the rows that follow in an iterator. None
    takes a twentieth of the data, 512 to 8192 rows, or none where that is more than a tenth. 0:
    thresholds are those of the last training batches."""
    hold_back: int | None = None
    """Rows that are kept from training whatever the class, in place of `calibration_rows`: SAEs of
    several classes then train on the same rows. Thresholds, if there are some, are calibrated on
    them. None: as `calibration_rows` says."""
    seed: int = 0
    """Seed of the order of the data."""
    start_seed: int | None = None
    """Seed of where the rows of a new module start; None: `seed`. Runs that differ in nothing else
    read the same batches."""
    mesh: tuple[int, int] | None = None
    """Processes of a job over which tokens and latents are spread, (data, latent), as torchrun has
    started them: see `fastsae.distributed`. `batch_size` is that of all together. None: this
    process alone."""
    log_every: int = 50
    """Updates between two rows of metrics."""
    eval_every: int | None = None
    """Updates between two validations on all validation data. None validates on all at the end, and
    before that after 1/64, 1/32, ... 1/2 of the run (`val_fvu_sample` on up to 16,384 rows drawn
    once; `val_fvu` where these are all), if that takes at most about 3 % of the run: 6 readings
    of 1/400 of the rows trained on, at least 512. Before the end thresholds
    are those of training, so val_l0 may be far from k."""
    checkpoint_every: int | None = None
    """Updates between two checkpoints; None writes one when interrupted and at the end."""
    async_checkpoints: bool = False
    """Write checkpoints in a thread while training goes on, from a copy of parameters and averages.
    What cannot be written is an error at the next checkpoint or at the end of the run."""
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
        for name in ("epochs", "sample_rows", "log_every", "keep_checkpoints"):
            self._expect(getattr(self, name) > 0, f"{name} > 0", name)
        optional = (
            "lr",
            "batch_size",
            "steps",
            "total_tokens",
            "dead_after_tokens",
            "clip_grad_norm",
        )
        for name in (*optional, "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            self._expect(value is None or 0 < value < math.inf, f"{name} > 0 or None", name)
        self._expect(all(0 <= b < 1 for b in self.betas), "two betas in [0, 1)", "betas")
        self._expect(self.eps > 0, "eps > 0", "eps")
        for name in ("warmup_steps", "sparsity_warmup_steps", "calibration_rows", "hold_back"):
            value = getattr(self, name)
            self._expect(value is None or value >= 0, f"{name} >= 0 or None", name)
        self._expect(0 <= self.decay_fraction <= 1, "0 <= decay_fraction <= 1", "decay_fraction")
        self._expect(self.outlier_norm > 1, "outlier_norm > 1", "outlier_norm")
        self._expect(0 <= self.seed < 2**32, "0 <= seed < 2^32", "seed")
        start = 0 if self.start_seed is None else self.start_seed
        self._expect(0 <= start < 2**32, "0 <= start_seed < 2^32 or None", "start_seed")
        self._expect(
            self.hold_back is None or self.calibration_rows is None,
            "at most one of hold_back and calibration_rows",
            "hold_back",
        )
        self._expect(
            self.steps is None or self.total_tokens is None,
            "at most one of steps and total_tokens",
            "steps",
        )
        for name, choices in (
            ("optimizer", ("adam", "adam_mini", "sgd_sai")),
            ("adam_dtype", ("float32", "bfloat16")),
            ("decode_dtype", ("float32", "bfloat16")),
            ("update", ("auto", "fused", "autograd")),
            ("compute_dtype", ("auto", "float32", "bfloat16")),
            ("b_dec_init", ("geometric_median", "mean", "zeros")),
            ("weight_init", ("data", "random")),
        ):
            known = getattr(self, name) in choices
            self._expect(known, f"{name} in {', '.join(choices)}", name)
        if self.adam_dtype == "bfloat16":
            for name, wanted in (("optimizer", "adam"), ("mesh", None)):
                expected = f"{name}={wanted!r} with adam_dtype='bfloat16'"
                self._expect(getattr(self, name) == wanted, expected, name)
            self._expect(
                self.update != "autograd", "a fused update with adam_dtype='bfloat16'", "update"
            )
        if self.decode_dtype == "bfloat16":
            given = "decode_dtype='bfloat16'"
            self._expect(self.mesh is None, f"mesh=None with {given}", "mesh")
            self._expect(self.update != "autograd", f"a fused update with {given}", "update")
        if self.weight_copies:
            for name, wanted in (("compute_dtype", "bfloat16"), ("mesh", None)):
                expected = f"{name}={wanted!r} with weight_copies"
                self._expect(getattr(self, name) == wanted, expected, name)
            self._expect(self.update != "autograd", "a fused update with weight_copies", "update")
        self._check_mesh()
        if self.out is None:
            for name in ("checkpoint_every", "tensorboard"):
                self._expect(
                    not getattr(self, name), f"out to be a folder when {name} is set", "out"
                )

    def _check_mesh(self) -> None:
        if self.mesh is None:
            return
        sizes = tuple(self.mesh) if isinstance(self.mesh, list | tuple) else ()
        right = len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)
        self._expect(right, "mesh to be two numbers of processes (data, latent) or None", "mesh")
        self.mesh = (sizes[0], sizes[1])
        self._expect(self.update != "autograd", "update='auto' or 'fused' with a mesh", "update")
        no_clip = self.clip_grad_norm is None
        self._expect(no_clip, "clip_grad_norm=None with a mesh", "clip_grad_norm")

    def _check_types(self) -> None:
        for names, kinds, what in (
            (INTEGERS, (int,), "an integer"),
            (NUMBERS, (int, float), "a number"),
            (SWITCHES, (bool,), "True or False"),
            (STRINGS, (str,), "a string"),
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

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["betas"] = list(self.betas)
        values["mesh"] = None if self.mesh is None else list(self.mesh)
        values["out"] = None if self.out is None else os.fspath(self.out)
        return values


NONE_IS_DEFAULT = {field.name: field.default is None for field in fields(TrainConfig)}
