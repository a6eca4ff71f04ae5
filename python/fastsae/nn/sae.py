"""Shared base of every sparse autoencoder: encode, decode, and a loss without units.

    z     = (x - b_dec) W_enc + b_enc          pre-activations, never held as [n, d_sae]
    f     = select(relu(z))                    what a subclass chooses
    x_hat = f W_dec + b_dec
    loss  = fvu(x_hat, x) + auxk_alpha * aux_loss(dead latents) + sparsity_loss(f)

Source: Gao et al. 2024 (arXiv 2406.04093), section 2 and appendix A.2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsae.nn.auxk import LatentRows
from fastsae.nn.context import STEP, StepContext
from fastsae.nn.init import center, directions, one_thread, some_rows
from fastsae.nn.loss import SAEOutput, upcast
from fastsae.nn.objective import dead_rows, loss_of_code
from fastsae.nn.parameters import Parameters, plain
from fastsae.nn.scaler import ActivationScaler, Columns, divided, per_column
from fastsae.types import SparseActs

CENTER_ROWS = 8192
"""Rows that are enough for a center."""


class SAE(Parameters, ABC):
    """A sparse autoencoder; subclasses say which latents stay active.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        dtype: of the four parameters; None: torch's default dtype.
        device: of the four parameters.
        k_aux: dead latents that reconstruct the residual of each token; None takes the power of
            two closest to d_in / 2 (Gao et al. 2024, appendix B.1).
        auxk_alpha: weight of that auxiliary loss; 0 turns it off.
        aux: which latents the auxiliary loss trains: `auxk`, the dead ones, or `zipf`, also those
            that fire far less often than a Zipf fit predicts (`train.UnderusedLatents`).
        apply_b_dec_to_input: whether b_dec is subtracted from x before the encoder. Without, b_enc
            does what it would have done; such SAEs come from elsewhere (Gemma Scope, Llama Scope).

    Raises:
        ValueError: a size below 1, k_aux above d_sae, a negative auxk_alpha, or another aux.
    """

    registry: ClassVar[dict[str, type[SAE]]] = {}
    """Classes by the name in saved files: of the class, with its module outside of fastsae."""

    def __init_subclass__(cls, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # torch derives classes from these (parametrize, fully_shard), whose module is then abc.
        if register and cls.__module__ != "abc":
            inside = cls.__module__.startswith("fastsae.")
            name = cls.__name__ if inside else f"{cls.__module__}.{cls.__qualname__}"
            SAE.registry[name] = cls

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        k_aux: int | None = None,
        auxk_alpha: float = 1 / 32,
        aux: str = "auxk",
        apply_b_dec_to_input: bool = True,
    ) -> None:
        super().__init__(d_in, d_sae, dtype, device)
        self.apply_b_dec_to_input = bool(apply_b_dec_to_input)
        if k_aux is None:
            k_aux = min(self.d_sae, 2 ** max(0, round(math.log2(self.d_in / 2))))
        if not 1 <= k_aux <= d_sae:
            self._fail(f"1 <= k_aux <= d_sae = {d_sae}, got k_aux = {k_aux}")
        if not auxk_alpha >= 0:
            self._fail(f"auxk_alpha >= 0, got {auxk_alpha}")
        if aux not in ("auxk", "zipf"):
            self._fail(f"aux to be auxk or zipf, got {aux!r}")
        self.k_aux, self.auxk_alpha, self.aux = plain(k_aux), plain(auxk_alpha), aux
        self.metadata: dict[str, Any] = {}
        """Free-form facts saved along (model_name, hook_name, ...); JSON types only."""

    @abstractmethod
    def _encode(self, x: Tensor, context: StepContext = STEP) -> SparseActs:
        """Select the active latents of `x: [n, d_in]`."""

    def encode_for_training(self, x: Tensor, context: StepContext) -> SparseActs:
        """Encode `x: [n, d_in]` for the loss, and update what gradients do not train, such as a
        running threshold.
        """
        return self._encode(x, context)

    def sparsity_loss(self, acts: SparseActs, context: StepContext) -> Tensor | None:
        """Return the penalty on the code `acts`; None where selection bounds its size."""
        return None

    def reconstruct(self, x: Tensor, acts: SparseActs) -> Tensor:
        """Return the reconstruction `[n, d_in]` from the code `acts` of `x: [n, d_in]`."""
        return self.decode(acts)

    @property
    def adds_rows(self) -> bool:
        """Whether a reconstruction is the sum of rows of W_dec and b_dec, and nothing else."""
        cls = type(self)
        return cls.reconstruct is SAE.reconstruct and cls.decode is SAE.decode

    def step_kind(self, n: int) -> tuple[Any, ...] | None:
        """Return what a recorded training step for n tokens cannot be told, besides the settings:
        facts that its Python would look up. A step is replayed only where they are those of the
        recorded one. None: this step cannot be recorded."""
        return ()

    def count_replay(self) -> None:
        """Do what a training step does to facts of the host, after one that was replayed."""

    @property
    def columns(self) -> Columns:
        """The column blocks of a training batch: here the activations alone."""
        return Columns((self.d_in,))

    def encode_sparse(self, x: Tensor) -> SparseActs:
        """Return the sparse code of `x: [..., d_in]`, leading dimensions flattened to rows."""
        return self._encode(self._rows(x, "x"))

    def encode(self, x: Tensor) -> Tensor:
        """Return the dense code `[..., d_sae]` of `x: [..., d_in]`."""
        return self.encode_sparse(x).to_dense().reshape(*x.shape[:-1], self.d_sae)

    def decode(self, acts: Tensor | SparseActs) -> Tensor:
        """Return `acts W_dec + b_dec`: `[..., d_in]`, or `[n, d_in]` for sparse acts."""
        if acts.shape[-1] != self.d_sae:
            self._fail(f"acts to be [..., d_sae] with d_sae = {self.d_sae}, got {[*acts.shape]}")
        if isinstance(acts, SparseActs):
            return self.parallel.sparse_decode(acts, self.W_dec, self.b_dec)
        return acts @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of `x: [..., d_in]`, in the same shape."""
        return self.reconstruct(self._rows(x, "x"), self.encode_sparse(x)).reshape(x.shape)

    def training_loss(self, batch: Tensor, context: StepContext = STEP) -> SAEOutput:
        """Return the loss of a training batch `[n, sum(columns.widths)]`; see `loss`."""
        x, target, _ = self.columns.split(batch)
        return self.loss(x, None if target is x else target, context=context)

    def loss(
        self, x: Tensor, target: Tensor | None = None, *, context: StepContext = STEP
    ) -> SAEOutput:
        """Compute the training loss of a batch.

            fvu      = sum |x - x_hat|^2 / sum |x - mean x|^2
            aux_loss = sum |e - e_hat|^2 / sum |e - mean e|^2,   e = x - x_hat, detached

        e_hat decodes the `min(k_aux, number dead)` largest dead latents of each token, without a
        bias. The denominators are constants of the batch, so the loss has no unit and the step size
        that Adam needs does not depend on the scale of x.

        Args:
            x: [..., d_in], in the dtype and on the device of the parameters.
            target: what to reconstruct, same shape; None means x.
            context: what else is known of the step. More than 2 k_aux dead latents take turns; see
                `nn.objective.dead_rows`.

        Raises:
            ValueError: wrong shape or device.
            TypeError: not a tensor, or another dtype.
            RuntimeError: recomputed by `torch.utils.checkpoint`, where the loss depends on
                statistics that the first forward has updated.

        Gradients: the four parameters. The auxiliary term reaches the encoder and decoder rows of
        selected dead latents, and b_dec through the encoder's input.
        Numerics: sums in float32 (float64 for float64). A batch whose rows are all equal has no
        variance; its fvu is a very large finite number.
        Source: Gao et al. 2024, section 2.1 and appendix A.2; OpenAI's train.py.
        """
        rows = self._rows(x, "x")
        target = x if target is None else target
        if (n := self._target_rows(target).shape[0]) != rows.shape[0]:
            self._fail(f"target to have {rows.shape[0]} rows like x, got {n}")
        acts = self.encode_for_training(rows, context)
        return self.loss_of(rows, target, acts, dead_rows(self, context), context)

    def loss_of(
        self,
        x: Tensor,
        target: Tensor,
        acts: SparseActs,
        dead: LatentRows | None,
        context: StepContext,
    ) -> SAEOutput:
        """Return the loss for the code `acts` of `x: [n, d_in]` and a target `[..., d_in]`."""
        penalty = self.sparsity_loss(acts, context)
        return loss_of_code(self, x, target, acts, penalty, dead)

    def estimate_threshold_(self, batches: Iterable[Tensor]) -> None:
        """Estimate inference-time thresholds from training inputs `[n, d_in]`; none here."""

    def calibrate_(self, x: Tensor) -> None:
        """Set thresholds such that held-out `x: [..., d_in]` keeps k latents per token; none here.

        Where a class overrides it and has a `k`, `Trainer.fit` calls it in the end.
        """

    @torch.no_grad()
    def initialize_rows_(self, batch: Tensor, seed: int = 0) -> None:
        """Set the rows of both matrices to directions of a training batch, see `init.directions`.

        Rows that are already where the data are have less far to go than random ones. Where the
        target is not the input, an encoder row and its decoder row come from one token. Biases are
        set by `initialize_from_data_` and the length of encoder rows by `fit_encoder_scale_`,
        in this order.
        """
        x, target, _ = self.columns.split(batch)
        rows = self._directions(x, seed)
        self.W_enc_rows.copy_(rows)
        self.W_dec.copy_(rows if target is x else self._directions(target, seed))

    def _directions(self, x: Tensor, seed: int) -> Tensor:
        x = upcast(x)
        middle = center(some_rows(x, CENTER_ROWS, seed), "geometric_median")
        return directions(x - middle, self.start_rows, seed)

    @torch.no_grad()
    def initialize_from_data_(self, batch: Tensor, method: str = "geometric_median") -> None:
        """Set the biases from a training batch, before the first update: b_dec to the center of the
        target, and b_enc to minus the center of x times W_enc where b_dec is not subtracted."""
        x, target, _ = self.columns.split(batch)
        self.initialize_b_dec_(target, method)
        if not self.apply_b_dec_to_input:
            self.b_enc.copy_(-self._projected(center(x, method).to(x.dtype)))

    @torch.no_grad()
    def fit_encoder_scale_(self, batch: Tensor) -> None:
        """Multiply the encoder with the number that makes the reconstruction of a batch best.

            c = sum <y - b_dec, y_hat - b_dec> / sum |y_hat - b_dec|^2

        for the targets y. Rows that point where the data are overlap, so that codes of unit rows
        add up to too much. Nothing happens where c is not positive.
        """
        x, target, _ = self.columns.split(batch)
        part = upcast(self.reconstruct(x, self._encode(x)) - self.b_dec)
        with one_thread():
            factor = (part * upcast(target - self.b_dec)).sum() / part.square().sum()
        if bool(factor > 0) and bool(factor.isfinite()):
            self._scale_encoder_(float(factor))

    @property
    def holds_units(self) -> bool:
        """Whether it holds numbers in the unit of the activations besides its biases."""
        return False

    @torch.no_grad()
    def fold_decoder_norm_(self) -> bool:
        """Scale rows of W_dec to norm 1, and the code by what they had: the same reconstruction.

        Rows of zeros stay. Nothing is done, and False returned, where the choice of latents would
        be another: of TopK, for instance, whose values would change their order.
        """
        if not self.folds_norms:
            return False
        norm = self.decoder_norms()
        self._scale_encoder_(torch.where(norm > 0, norm, 1.0))
        self.normalize_decoder_()
        return True

    @property
    def folds_norms(self) -> bool:
        """Whether the same latents are chosen when pre-activations are scaled latent by latent."""
        return False

    def _scale_encoder_(self, factor: float | Tensor) -> None:
        """Multiply pre-activations, and what they are compared with, by `factor`: a number, or one
        for each latent [d_sae]."""
        if isinstance(factor, Tensor):
            factor = factor.to(self.b_enc.dtype)
        self.W_enc_rows.mul_(factor.unsqueeze(1) if isinstance(factor, Tensor) else factor)
        self.b_enc.mul_(factor)

    @torch.no_grad()
    def initialize_b_dec_(self, x: Tensor, method: str = "geometric_median") -> None:
        """Set b_dec to the center of `x: [..., d_in]`: its `geometric_median` or its `mean`.

        The geometric median minimizes the mean distance to the rows, so a few rows of huge norm
        (attention sinks) hardly move it, whereas they drag the mean along.

        Raises:
            ValueError: x is empty or holds NaN or Inf, or the method is another.
        """
        self.b_dec.copy_(center(self._target_rows(x), method))

    @torch.no_grad()
    def divide_columns_(self, inputs: Sequence[float], targets: Sequence[float]) -> None:
        """Divide the columns of W_enc_rows by a number for each input block, and those of W_dec by
        one for each target block, rounding once; see `ActivationScaler.fold_`."""
        by = per_column(inputs, self.columns.inputs, self.b_enc)
        self.W_enc_rows.copy_(divided(self.W_enc_rows, by))
        by = per_column(targets, self.columns.targets or self.columns.inputs, self.b_enc)
        self.W_dec.copy_(divided(self.W_dec, by))

    def rescale_code_(self, scaler: ActivationScaler) -> None:
        """Divide what a subclass measures in units of the code by `scaler.code_scale`."""

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        keys = ("d_in", "d_sae", "k_aux", "auxk_alpha", "aux", "apply_b_dec_to_input")
        config = {key: getattr(self, key) for key in keys}
        config["d_sae"] = self.parallel.latents(self.d_sae)
        return config

    def extra_repr(self) -> str:
        """Show the constructor arguments in `repr`."""
        return ", ".join(f"{key}={value}" for key, value in self.config().items())

    @property
    def start_rows(self) -> int:
        """How many rows of the data `initialize_rows_` makes both matrices from."""
        return self.d_sae

    def _projected(self, x: Tensor) -> Tensor:
        """Return `x W_enc`: `[d_sae]` for `x: [d_in]`."""
        return x @ self.W_enc

    def _input_bias(self) -> Tensor | None:
        """Return what is subtracted from x before the encoder."""
        return self.b_dec if self.apply_b_dec_to_input else None

    def _target_rows(self, target: Tensor) -> Tensor:
        """Check `target` and flatten its leading dimensions."""
        return self._rows(target, "target")
