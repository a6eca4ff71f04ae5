"""What SAEs have in common whose loss pays for active latents, instead of a selection of k.

    loss = fvu + coefficient * penalty / d_in

With a wanted L0 the coefficient follows it (an integral controller, ours, not of any paper):

    coefficient <- coefficient * exp(control_lr * clamp(log(l0 / k), -1, 1))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.loss import upcast, variation
from fastsae.nn.sae import SAE
from fastsae.types import SparseActs


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
        k: wanted mean active latents per token; None keeps the coefficient as it is.
        coefficient: weight of the penalty, where the control starts.
        control_lr: how fast the coefficient follows; 0.005 means at most 0.5 % a batch, 20 times in
            600 batches. Slower is better where the run allows it: an L0 that falls before features
            have formed kills latents. ReLU found planted features with a cosine of 0.91, 0.78, 0.69
            and 0.64 at 0.003, 0.005, 0.01 and 0.02 (900 batches).

    Raises:
        ValueError: k is not in (0, d_sae], coefficient or control_lr is negative.
    """

    coefficient: Tensor
    unit: Tensor
    batches_seen: Tensor
    EXACT = ("coefficient", "unit")

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
        self.k, self.control_lr, self._start = k, control_lr, coefficient
        device = self.b_enc.device
        self.register_buffer("coefficient", torch.tensor(float(coefficient), device=device))
        self.register_buffer("unit", torch.ones((), device=device))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64, device=device))

    def room(self, n: int) -> int:
        """Return the places that the code of n tokens gets: every latent, or 4 million at least."""
        return min(n * self.d_sae, max(n * 1024, 1 << 22))

    def _above(self, x: Tensor, theta: Tensor) -> SparseActs:
        """Return the pre-activations of `x: [n, d_in]` above `theta`: [] or [d_sae]."""
        return ops.encode_threshold(
            x,
            self._rows_enc(),
            self.b_enc,
            theta.detach(),
            self.room(x.shape[0]),
            b_dec=self._input_bias(),
            compute_dtype=self._product(),
        )

    @torch.no_grad()
    def _see(self, x: Tensor) -> None:
        """Measure the unit on the first training batch `x: [n, d_in]`."""
        if not self.training or x.shape[0] == 0:
            return
        measured = (variation(x) / x.numel()).sqrt()
        usable = (self.batches_seen == 0) & (measured > 0) & measured.isfinite()
        self.unit.copy_(torch.where(usable, measured, self.unit))
        self.batches_seen += 1

    @torch.no_grad()
    def _follow(self, acts: SparseActs) -> None:
        """Move the coefficient towards the wanted L0, once the penalty has its full weight."""
        if not self.training or self.k is None or self.sparsity_scale < 1 or acts.n == 0:
            return
        distance = (acts.l0().clamp_min(1e-3) / self.k).log().clamp(-1, 1)
        self.coefficient.mul_((self.control_lr * distance).exp())

    def _weigh(self, penalty: Tensor) -> Tensor:
        """Return what a `penalty: []`, a mean over tokens in units of `unit`, adds to the loss."""
        return self.coefficient.to(penalty.dtype) * penalty / self.d_in

    @torch.no_grad()
    def fold_input_scale_(self, scale: float) -> None:
        """See `SAE.fold_input_scale_`; the unit is divided as well."""
        super().fold_input_scale_(scale)
        self.unit.div_(scale)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        own = {"k": self.k, "coefficient": self._start, "control_lr": self.control_lr}
        return {**super().config(), **own}

    def learned(self) -> dict[str, Any]:
        """Return what training learned beside the tensors: JSON values for cfg.json."""
        names = ("coefficient", "unit", "batches_seen")
        return {name: getattr(self, name).item() for name in names}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        """Take the coefficient and the unit from a saved configuration."""
        for name in ("coefficient", "unit", "batches_seen"):
            getattr(self, name).fill_(learned[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PenalizedSAE:
        # `.to(torch.bfloat16)` must not round what is measured.
        exact = {name: getattr(self, name) for name in self.EXACT}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in exact.items():
            if not tensor.is_meta:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self


def mean_over_tokens(values: Tensor, n: int) -> Tensor:
    """Return the sum of `values` of a code of n tokens, over n; in float32 or float64."""
    return upcast(values).sum() / max(n, 1)
