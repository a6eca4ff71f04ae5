"""JumpReLU sparse autoencoder: a threshold for every latent, trained through a bandwidth.

Source: Rajamanoharan et al. 2024, "Jumping ahead" (arXiv 2407.14435), sections 3 and 4.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastsae.nn.auxk import LatentRows
from fastsae.nn.context import STEP, StepContext
from fastsae.nn.loss import SAEOutput
from fastsae.nn.objective import total_loss
from fastsae.nn.parameters import plain
from fastsae.nn.penalized import PenalizedSAE
from fastsae.nn.threshold_sae import factor_for_k
from fastsae.ops._per_entry import per_entry
from fastsae.types import SparseActs

THRESHOLD_CONTROL = 0.1
"""How far a batch moves log_threshold towards the target L0. On a code whose L0 falls by 2 to 3
times as much as its thresholds rise, a quarter of the way."""


class _Elementwise(torch.autograd.Function):
    """An elementwise function of (z, threshold, eps) whose gradients are those of a rule.

    Without a rule for forward mode, which torch refuses then: torch.compile takes no function that
    has one.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


class JumpReLU(_Elementwise):
    """z H(z - threshold) elementwise, with the paper's gradients (eq. 11 and 12).

    d/dz         = H(z - threshold)
    d/dthreshold = -(threshold / eps) K((z - threshold) / eps),   K(u) = 1 where |u| < 1/2
    """

    @staticmethod
    def forward(z: Tensor, threshold: Tensor, eps: Tensor) -> Tensor:
        return torch.where(z > threshold, z, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, threshold, eps = ctx.saved_tensors
        near = (z - threshold).abs() < eps / 2
        return torch.where(z > threshold, grads[0], 0), -grads[0] * near * threshold / eps, None


class Step(_Elementwise):
    """H(z - threshold) elementwise.

    d/dz = 0,   d/dthreshold = -(1 / eps) K((z - threshold) / eps)
    """

    @staticmethod
    def forward(z: Tensor, threshold: Tensor, eps: Tensor) -> Tensor:
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, threshold, eps = ctx.saved_tensors
        near = (z - threshold).abs() < eps / 2
        return None, -grads[0] * near / eps, None


def _apply(function: type[_Elementwise], *inputs: Tensor) -> Tensor:
    out: Tensor = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return out


class JumpReLUSAE(PenalizedSAE):
    """Sparse autoencoder with a trained threshold for every latent.

        f    = z H(z - threshold),   z = (x - b_dec) W_enc + b_enc
        loss = fvu + coefficient * sum_j H(z_j - threshold_j) / d_in
        threshold = unit exp(log_threshold)

    With a target k, every training batch also moves all thresholds by one factor towards it,
    `log_threshold += 0.1 clamp(log(l0 / k), -1, 1)`, and the gradients only say which latents get
    a higher threshold than others (our addition: gradients alone move a threshold by the learning
    rate, so that L0 ran to 4 k, and later to k / 2, before the coefficient had caught up).

    The step has no gradient, so the threshold gets a straight-through estimate from the
    pre-activations within half a bandwidth of it, on both sides; z gets none from the penalty. Only
    those entries and the active ones are ever kept. `log_threshold` is float32 whatever the dtype
    of the other parameters, and gets its estimate in training mode from `forward` too. The paper
    does not subtract b_dec from x; here it is, as in all classes, and b_enc can undo it. See
    `PenalizedSAE` for k, `unit` and the other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: target mean number of active latents per token; None keeps the coefficient fixed.
        bandwidth: of the estimate, in units of `unit`; a wider one averages over more entries and
            is more biased.
        threshold: initial thresholds, in units of `unit`, > 0. None starts them at one value with
            which the first data seen (`initialize_from_data_`, or the first training batch) keep k
            entries per token (our addition: Adam moves log_threshold by lr a step, too little to
            cross the way up in a short run), or at 0.1 without k.
        coefficient: initial weight of the penalty; None takes 0.2 d_in / k, about what the k-th
            latent of a token is worth, or 1 without k.
        auxk_alpha: weight of the auxiliary loss for dead latents, see `SAE`. None takes 1/32 with a
            target k, where without it a seventh of a wide dictionary died, and 0 without k.

    Raises:
        ValueError: bandwidth or threshold is not above 0.
    """

    FLOAT32: ClassVar[tuple[str, ...]] = (*PenalizedSAE.FLOAT32, "log_threshold")

    log_threshold: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: float | None = None,
        *,
        bandwidth: float = 0.2,
        threshold: float | None = None,
        coefficient: float | None = None,
        auxk_alpha: float | None = None,
        **kwargs: Any,
    ) -> None:
        weight = 1.0 if coefficient is None else coefficient
        if auxk_alpha is None:
            auxk_alpha = 0.0 if k is None else 1 / 32
        super().__init__(d_in, d_sae, k, coefficient=weight, auxk_alpha=auxk_alpha, **kwargs)
        if coefficient is None and self.k is not None:
            self.initial_coefficient = 0.2 * self.d_in / self.k
            self.coefficient.fill_(self.initial_coefficient)
        start = 0.1 if threshold is None else threshold
        if not (0 < bandwidth < math.inf and 0 < start < math.inf):
            self._fail(f"bandwidth > 0 and threshold > 0, got {bandwidth} and {threshold}")
        self.bandwidth, self.initial_threshold = plain(bandwidth), plain(threshold)
        logs = torch.full_like(self.b_enc, math.log(start), dtype=torch.float32)
        self.log_threshold = nn.Parameter(logs)
        self._started = threshold is not None or k is None
        self.thresholds_in_units = True
        """Whether thresholds follow `unit` when it is measured: as constructed. Those of a trained
        module stay where they are."""

    @property
    def threshold(self) -> Tensor:
        """[d_sae], float32, in the unit of the activations."""
        return self.unit * self.log_threshold.exp()

    @property
    def _eps(self) -> Tensor:
        eps: Tensor = self.bandwidth * self.unit
        return eps

    def _encode(self, x: Tensor, context: StepContext = STEP) -> SparseActs:
        if self.training and torch.is_grad_enabled():
            return self._open(self._above(x, self.threshold - self._eps / 2, context))
        return self._above(x, self.threshold, context)

    def _open(self, acts: SparseActs) -> SparseActs:
        """Return f from the pre-activations near and above the thresholds."""
        return self._activate(acts, *self._inside(acts))

    def _activate(self, acts: SparseActs, z: Tensor, threshold: Tensor) -> SparseActs:
        values = _apply(JumpReLU, z, threshold, self._eps)
        return SparseActs(values, acts.indices, acts.offsets, self.d_sae)

    def _inside(self, acts: SparseActs) -> tuple[Tensor, Tensor]:
        """Return pre-activations, -inf where padding is, and the threshold of each."""
        assert acts.offsets is not None
        entry = torch.arange(acts.values.shape[0], device=acts.values.device)
        z = torch.where(entry < acts.offsets[-1], acts.values, -math.inf)
        (threshold,) = per_entry(acts, self.threshold)
        return z, threshold

    def decode(self, acts: Tensor | SparseActs) -> Tensor:
        """See `SAE.decode`; entries of value 0 get gradients, which the estimates need."""
        if isinstance(acts, SparseActs) and acts.d_sae == self.d_sae and acts.values.requires_grad:
            return self.parallel.sparse_decode(acts, self.W_dec, self.b_dec, inactive_grad=True)
        return super().decode(acts)

    def encode_for_training(self, x: Tensor, context: StepContext) -> SparseActs:
        """Return the entries that the loss needs: z above threshold - bandwidth / 2."""
        if self.training and not self._started and len(x):
            self._start_threshold(x, context)
        self._measure_unit(x, context)
        return self._above(x, self.threshold - self._eps / 2, context)

    @torch.no_grad()
    def _measure_unit(self, x: Tensor, context: StepContext) -> None:
        before = self.unit.clone()
        super()._measure_unit(x, context)
        if not self.thresholds_in_units:
            self.log_threshold.sub_((self.unit / before).log())

    def step_kind(self, n: int) -> tuple[Any, ...] | None:
        """See `SAE.step_kind`: the step that starts the thresholds is not recorded."""
        return (self.thresholds_in_units,) if self._started else None

    @property
    def holds_units(self) -> bool:
        """See `SAE.holds_units`: thresholds of a trained module."""
        return not self.thresholds_in_units

    @torch.no_grad()
    def initialize_from_data_(self, batch: Tensor, method: str = "geometric_median") -> None:
        """See `SAE.initialize_from_data_`; starts the thresholds too, unless they were given."""
        super().initialize_from_data_(batch, method)
        if not self._started:
            self._start_threshold(self.columns.split(batch).x, STEP)

    def _scale_encoder_(self, factor: float | Tensor) -> None:
        super()._scale_encoder_(factor)
        self.log_threshold.add_(factor.log() if isinstance(factor, Tensor) else math.log(factor))

    @torch.no_grad()
    def _start_threshold(self, x: Tensor, context: StepContext) -> None:
        """Start all thresholds where the first rows `x: [n, d_in]` keep k entries per token."""
        assert self.k is not None
        if any(cls.__name__ == "FSDPModule" for cls in type(self).__mro__):
            raise RuntimeError(
                f"{type(self).__name__}: expected thresholds that are started before fully_shard; "
                "call initialize_from_data_(batch) first, or give threshold="
            )
        self._started, self.thresholds_in_units = True, False
        smallest = self._smallest_kept(x)
        unit = self._unit_of(x, context)
        start = (context.reduced(smallest, "mean") / unit).log()
        fresh = (self.batches_seen == 0) & start.isfinite()
        self.unit.copy_(torch.where(fresh, unit, self.unit))
        self.log_threshold.copy_(torch.where(fresh, start.float(), self.log_threshold))

    def _smallest_kept(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """Return the smallest `[]` of the k n largest pre-activations of `x: [n, d_in]`, each over
        its `threshold: [d_sae]`; inf where none is positive."""
        assert self.k is not None
        W_enc, b_enc, bias = self.W_enc_rows, self.b_enc, self._input_bias()
        if threshold is not None:
            return factor_for_k(x, W_enc, b_enc, bias, threshold, self.k, self.parallel)
        return self.parallel.encode_batch_topk(x, W_enc, b_enc, self.k, b_dec=bias).threshold

    def loss_of(
        self,
        x: Tensor,
        target: Tensor,
        acts: SparseActs,
        dead: LatentRows | None,
        context: StepContext,
    ) -> SAEOutput:
        """See `SAE.loss_of`; `acts` is what `encode_for_training` returned."""
        z, threshold = self._inside(acts)
        f = self._activate(acts, z, threshold)
        self._adjust(f.detach(), context)
        active = _apply(Step, z, threshold, self._eps)
        penalty = self._weigh(self._mean_over_tokens(active, acts.n), context)
        return total_loss(self, x, target, f, self.reconstruct(x, f), penalty, dead)

    def _adjusts(self, context: StepContext) -> bool:
        return super()._adjusts(context) or self.log_threshold.requires_grad

    def _adjust_by(self, excess: Tensor, context: StepContext) -> None:
        """Move the coefficient, and all thresholds by one factor; those from the first step on."""
        if super()._adjusts(context):
            super()._adjust_by(excess, context)
        if self.log_threshold.requires_grad:
            self.log_threshold.add_(THRESHOLD_CONTROL * excess)

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        """Scale all thresholds by one factor such that `x: [..., d_in]` keeps k latents per token.

        See `BatchTopKSAE.calibrate_`: measure on tokens that are neither trained nor calibrated on.

        Raises:
            ValueError: k is None, or nothing in x is positive.
        """
        if self.k is None:
            self._fail("a target k, got None")
        rows = self._rows(x, "x")
        lowest, highest = (float(end) for end in self.threshold.aminmax())
        # One factor would make of these nothing, and of others all.
        if self.parallel.count(int(lowest <= 1e-6 * highest)):
            self._fail(f"thresholds above 0, got {lowest:.3g} to {highest:.3g}")
        factor = self._smallest_kept(rows, self.threshold)
        if not bool(factor.isfinite()):
            self._fail("x to have positive pre-activations, got none")
        self.log_threshold.add_(factor.log())

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        own = {"bandwidth": self.bandwidth, "threshold": self.initial_threshold}
        return {**super().config(), **own}
