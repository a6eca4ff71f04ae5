"""ReLU sparse autoencoder: everything positive is active, and the loss pays for it.

Sources: Bricken et al. 2023, "Towards monosemanticity" (L1); Jermyn et al. 2024, "Tanh penalty in
dictionary learning", Transformer Circuits, February update; Karvonen et al. 2024, "Measuring
progress in dictionary learning" (arXiv 2408.00113), section 4 (p-annealing).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae.nn.context import STEP, StepContext
from fastsae.nn.loss import upcast
from fastsae.nn.parameters import plain
from fastsae.nn.penalized import PenalizedSAE
from fastsae.types import SparseActs

PENALTIES = ("l1", "tanh", "p_anneal")


class ReLUSAE(PenalizedSAE):
    """Sparse autoencoder with a ReLU and a sparsity penalty.

        f    = relu(z),   z = (x - b_dec) W_enc + b_enc
        loss = fvu + coefficient * sum_j penalty(f_j / unit) / d_in

        l1         f                  shrinks the values: expect ||x_hat|| < ||x||
        tanh       tanh(f)            stops paying for values well above 1
        p_anneal   c f^p              p falls linearly from 1 to p_end; c makes the batch pay what
                                      it would have paid for L1, as the paper's coefficients do

    p follows from `StepContext.progress`. Decoder rows have norm 1 while training, so L1 needs no
    weighting by them. On large inputs, see `capacity`, the smallest active entries of a code that
    is hardly sparse yet are left out. See `PenalizedSAE` for k and the other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: target mean number of active latents per token; None keeps the coefficient fixed.
        penalty: `l1`, `tanh` or `p_anneal`.
        p_end: where p ends, in (0, 1].

    Raises:
        ValueError: another penalty, or p_end not in (0, 1].
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: float | None = None,
        *,
        penalty: str = "l1",
        p_end: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, k, **kwargs)
        if penalty not in PENALTIES:
            self._fail(f"penalty in {', '.join(PENALTIES)}, got {penalty!r}")
        if not 0 < p_end <= 1:
            self._fail(f"0 < p_end <= 1, got {p_end}")
        self.penalty, self.p_end = penalty, plain(p_end)

    def _encode(self, x: Tensor, context: StepContext = STEP) -> SparseActs:
        return self._positive(x, context)

    def encode_for_training(self, x: Tensor, context: StepContext) -> SparseActs:
        """See `SAE.encode_for_training`: measures the unit, adjusts the coefficient."""
        self._measure_unit(x, context)
        acts = self._encode(x, context)
        self._adjust(acts, context)
        return acts

    def sparsity_loss(self, acts: SparseActs, context: StepContext) -> Tensor:
        """Return the weighted penalty on the code."""
        if self.penalty == "l1":  # divided last: one pass over the values
            l1 = self._mean_over_tokens(acts.values, acts.n) / upcast(self.unit)
            return self._weigh(l1, context)
        values = acts.values / self.unit.to(acts.values.dtype)
        if self.penalty == "tanh":
            values = values.tanh()
        else:
            p = 1 + (self.p_end - 1) * _on_device(context.progress, values)
            # The derivative of 0^p is infinite; padding has value 0.
            power = torch.where(values > 0, values, 1.0).pow(p).where(values > 0, 0.0)
            paid, by_power = (self.parallel.sum_over_all(t.detach().sum()) for t in (values, power))
            values = power * (paid / by_power.clamp_min(1e-20))
        return self._weigh(self._mean_over_tokens(values, acts.n), context)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        return {**super().config(), "penalty": self.penalty, "p_end": self.p_end}


def _on_device(number: float | Tensor, like: Tensor) -> Tensor:
    """Return a number as [] float64 next to `like`: powers of numbers and of tensors are rounded
    differently."""
    if isinstance(number, Tensor):
        return number
    return torch.full((), number, dtype=torch.float64, device=like.device)
