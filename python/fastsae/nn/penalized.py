"""Shared base for SAEs whose loss penalizes active latents instead of selecting k of them.

    loss = fvu + coefficient * penalty / d_in

With a target L0 the coefficient is adjusted towards it (an integral controller; our addition):

    coefficient <- coefficient * exp(control_lr * clamp(log(l0 / k), -1, 1))
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.context import StepContext, updates_statistics
from fastsae.nn.loss import upcast
from fastsae.nn.parameters import plain
from fastsae.nn.sae import SAE
from fastsae.nn.scaler import ActivationScaler
from fastsae.nn.threshold_sae import entry_capacity
from fastsae.ops._dense import looks_full
from fastsae.ops._encode import attach, attachable
from fastsae.ops._matmul import matmul
from fastsae.types import SparseActs, can_look


class PenalizedSAE(SAE, register=False):
    """The base of `ReLUSAE`, `GatedSAE` and `JumpReLUSAE`.

    Penalties are stated as in the papers, for activations whose mean squared distance from their
    mean is d_in: `coefficient` is lambda of sum_d e^2 + lambda * penalty, averaged over tokens. The
    first training batch measures that scale as `unit`, the root mean square deviation of one entry,
    and everything with the unit of the activations is taken relative to it, so the coefficient and
    the bandwidth of a threshold fit activations of any model.

    Dead latents are not revived unless auxk_alpha is set; see `SAE` for the other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: target mean number of active latents per token; None keeps the coefficient fixed.
        coefficient: initial weight of the penalty.
        control_lr: how fast the coefficient is adjusted; 0.005 means at most 0.5 % a batch, 20
            times in 600 batches. Slower is better where the run allows it: an L0 that falls before
            features have formed kills latents. ReLU found planted features with a cosine of 0.91,
            0.78, 0.69 and 0.64 at 0.003, 0.005, 0.01 and 0.02 (900 batches).

    Raises:
        ValueError: k is not in (0, d_sae], coefficient or control_lr is negative.
    """

    FLOAT32: ClassVar[tuple[str, ...]] = ("coefficient", "unit")

    coefficient: Tensor
    unit: Tensor
    batches_seen: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: float | None = None,
        *,
        coefficient: float = 1.0,
        control_lr: float = 0.005,
        auxk_alpha: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, auxk_alpha=auxk_alpha, **kwargs)
        if k is not None and not 0 < k <= d_sae:
            self._fail(f"0 < k <= d_sae = {d_sae} or None, got k = {k}")
        if not (0 <= coefficient < math.inf and control_lr >= 0):
            self._fail(f"coefficient >= 0 and control_lr >= 0, got {coefficient} and {control_lr}")
        self.k, self.control_lr = plain(k), plain(control_lr)
        self.initial_coefficient = plain(coefficient)
        device, exact = self.b_enc.device, torch.float32
        start = torch.full((), float(coefficient), dtype=exact, device=device)
        self.register_buffer("coefficient", start)
        self.register_buffer("unit", torch.ones((), dtype=exact, device=device))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64, device=device))

    def capacity(self, n: int) -> int:
        """Return the places that the code of n tokens gets: every latent, or 4 million at least."""
        return entry_capacity(n, self.d_sae, 1024)

    def _above(self, x: Tensor, threshold: Tensor, context: StepContext) -> SparseActs:
        """Return the pre-activations of `x: [n, d_in]` above `threshold`: [] or [d_sae]."""
        W_enc, b_enc, bias = self.W_enc_rows, self.b_enc, self._input_bias()

        def encode() -> SparseActs:
            return ops.encode_threshold(
                x,
                W_enc,
                b_enc,
                threshold.detach(),
                self.capacity(x.shape[0]),
                b_dec=bias,
                compute_dtype=context.compute_dtype,
            )

        if not can_look(x) or not attachable(x, W_enc, b_enc, bias):
            return encode()
        with torch.no_grad():  # what follows would go over the places that are not needed
            acts = encode().trimmed()
        return attach(acts, x, W_enc, b_enc, bias)

    def _positive(self, x: Tensor, context: StepContext) -> SparseActs:
        """Return relu of the pre-activations of `x: [n, d_in]`; with an entry for every latent
        where that is faster, and then without the limit of `capacity`."""
        W_enc, b_enc, bias = self.W_enc_rows, self.b_enc, self._input_bias()
        if looks_full(x, W_enc, b_enc, bias):
            centered = x if bias is None else x - bias
            acts = SparseActs.full(matmul(centered, W_enc.t(), b_enc, relu=True))
            return attach(acts, x, W_enc, b_enc, bias)
        return self._above(x, b_enc.new_zeros(()), context)

    @property
    def folds_norms(self) -> bool:
        """See `SAE.folds_norms`: every latent has a threshold of its own, or 0."""
        return True

    @torch.no_grad()
    def _measure_unit(self, x: Tensor, context: StepContext) -> None:
        """Set the unit from the first training batch `x: [n, d_in]`."""
        if x.shape[0] == 0 or not updates_statistics(self, loss_depends=self.k is not None):
            return
        measured = self._unit_of(x, context)
        usable = (self.batches_seen == 0) & (measured > 0) & measured.isfinite()
        self.unit.copy_(torch.where(usable, measured, self.unit))
        self.batches_seen += 1

    def _unit_of(self, x: Tensor, context: StepContext) -> Tensor:
        """Return the root mean square deviation `[]` of an entry of `x: [n, d_in]`."""
        numbers = self.parallel.tokens(x.shape[0]) * x.shape[1]
        unit = (self.parallel.total_variance(x) / numbers).sqrt().float()
        return context.reduced(unit, "mean")

    def _l0(self, acts: SparseActs) -> Tensor:
        """Return the mean number of active latents of a token `[]`."""
        share = max(acts.n, 1) / max(self.parallel.tokens(acts.n), 1)
        return self.parallel.sum_over_all(acts.l0()) * share

    def _mean_over_tokens(self, values: Tensor, n: int) -> Tensor:
        """Return the sum of `values` of a code of n tokens, over n; in float32 or float64."""
        total = self.parallel.sum_over_all(upcast(values).sum())
        return total / max(self.parallel.tokens(n), 1)

    @torch.no_grad()
    def _adjust(self, acts: SparseActs, context: StepContext) -> None:
        """Move what controls L0 towards the target, by a training batch with the code `acts`."""
        if self.k is None or acts.n == 0 or not self._adjusts(context):
            return
        if not updates_statistics(self, loss_depends=True):
            return
        l0 = context.reduced(self._l0(acts), "mean")
        self._adjust_by((l0.clamp_min(1e-3) / self.k).log().clamp(-1, 1), context)

    def _adjusts(self, context: StepContext) -> bool:
        """Return whether this step moves anything: once the penalty has its full weight. Where that
        weight is on the device, `_adjust_by` tells."""
        scale = context.sparsity_scale
        return isinstance(scale, Tensor) or scale >= 1

    def _adjust_by(self, excess: Tensor, context: StepContext) -> None:
        """Move the coefficient by `excess: []`, log(l0 / k) within -1 and 1."""
        factor, scale = (self.control_lr * excess).exp(), context.sparsity_scale
        if isinstance(scale, Tensor):
            factor = torch.where(scale >= 1, factor, 1.0)
        self.coefficient.mul_(factor)

    def _weigh(self, penalty: Tensor, context: StepContext) -> Tensor:
        """Return what a `penalty: []`, a mean over tokens in units of `unit`, adds to the loss."""
        scale = context.sparsity_scale
        if isinstance(scale, Tensor):  # rounded as a number is
            scale = scale.to(penalty.dtype)
        return scale * (self.coefficient.to(penalty.dtype) * penalty / self.d_in)

    def rescale_code_(self, scaler: ActivationScaler) -> None:
        """See `SAE.rescale_code_`: the unit is that of the code."""
        super().rescale_code_(scaler)
        self.unit.div_(scaler.code_scale)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        own = {
            "k": self.k,
            "coefficient": self.initial_coefficient,
            "control_lr": self.control_lr,
        }
        return {**super().config(), **own}
