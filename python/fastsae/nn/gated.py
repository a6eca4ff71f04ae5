"""Gated sparse autoencoder: one path decides which latents are active, another how strongly.

Source: Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders"
(arXiv 2404.16014), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastsae.nn.auxk import LatentRows
from fastsae.nn.context import STEP, StepContext
from fastsae.nn.loss import SAEOutput, fvu, squared_error, upcast
from fastsae.nn.objective import total_loss
from fastsae.nn.penalized import PenalizedSAE
from fastsae.nn.scaler import ActivationScaler
from fastsae.ops._per_entry import per_entry
from fastsae.types import SparseActs

ROWS = 64
"""Of a dense code, whose products are held at a time."""


class _Magnitudes(torch.autograd.Function):
    """1[gate > 0] relu(gate scale + shift) of a dense code: few passes over it, both ways."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        values = torch.addcmul(shift, gate, scale).relu_()
        # Here and below: `where(other > 0, x, 0)`, in vectors.
        torch.ops.aten.threshold_backward(values, gate, 0, grad_input=values)
        ctx.save_for_backward(gate, scale, values)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        gate, scale, values = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grads[0], values, 0)
        of_scale, of_shift = torch.zeros_like(scale), grad.sum(0)
        for rows, gates in zip(grad.split(ROWS), gate.split(ROWS), strict=True):
            of_scale += (rows * gates).sum(0)
        return grad.mul_(scale), of_scale, of_shift


class GatedSAE(PenalizedSAE):
    """Sparse autoencoder whose gate and magnitudes share a matrix.

        pi    = (x - b_dec) W_enc + b_enc                                the gate's pre-activations
        f     = 1[pi > 0] relu((pi - b_enc) exp(r_mag) + b_mag)
        x_hat = f W_dec + b_dec
        loss  = fvu(x_hat) + coefficient * sum_j relu(pi_j) / unit / d_in + fvu(x_gate)
        x_gate = relu(pi) sg(W_dec) + sg(b_dec)

    L1 is paid by the gate alone, so it does not shrink the values. The last term teaches the gate
    to reconstruct; sg keeps it from the decoder. W_enc is the paper's W_gate and b_enc its b_gate;
    a saved file has it under that name. See `PenalizedSAE` for k and the other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: target mean number of active latents per token; None keeps the coefficient fixed.
    """

    r_mag: Tensor
    b_mag: Tensor

    def __init__(self, d_in: int, d_sae: int, k: float | None = None, **kwargs: Any) -> None:
        super().__init__(d_in, d_sae, k, **kwargs)
        self.r_mag = nn.Parameter(torch.zeros_like(self.b_enc))
        self.b_mag = nn.Parameter(torch.zeros_like(self.b_enc))

    def _gate(self, x: Tensor, context: StepContext) -> SparseActs:
        """Return relu(pi)."""
        return self._positive(x, context)

    def _open(self, gate: SparseActs) -> SparseActs:
        """Return f where the gate is open: the same entries with the other path's values."""
        b_enc, scale, b_mag = self.b_enc, self.r_mag.exp(), self.b_mag
        if gate.is_full:
            values = _Magnitudes.apply(gate.values, scale, b_mag - b_enc * scale)  # type: ignore[no-untyped-call]
            return SparseActs(values, gate.indices, gate.offsets, gate.d_sae)
        b_enc, scale, b_mag = per_entry(gate, b_enc, scale, b_mag)
        magnitude = (gate.values - b_enc) * scale + b_mag
        values = torch.where(gate.values > 0, magnitude.relu(), 0).to(gate.values.dtype)
        return SparseActs(values, gate.indices, gate.offsets, gate.d_sae)

    def _encode(self, x: Tensor, context: StepContext = STEP) -> SparseActs:
        return self._open(self._gate(x, context))

    def encode_for_training(self, x: Tensor, context: StepContext) -> SparseActs:
        """Return relu(pi), from which `loss_of` takes both paths; measures the unit."""
        self._measure_unit(x, context)
        return self._gate(x, context)

    def loss_of(
        self,
        x: Tensor,
        target: Tensor,
        acts: SparseActs,
        dead: LatentRows | None,
        context: StepContext,
    ) -> SAEOutput:
        """See `SAE.loss_of`; `acts` is what `encode_for_training` returned."""
        f = self._open(acts)
        self._adjust(f.detach(), context)
        l1 = self._mean_over_tokens(acts.values, acts.n) / upcast(self.unit)
        penalty = self._weigh(l1, context)
        out = total_loss(self, x, target, f, self.reconstruct(x, f), penalty, dead)
        W_dec, b_dec = self.W_dec.detach(), self.b_dec.detach()
        by_gate = self.parallel.sparse_decode(acts, W_dec, b_dec)
        squared = self.parallel.sum_over_tokens(squared_error(target, by_gate))
        out.loss = out.loss + fvu(squared, target, self.parallel)
        return out

    def _scale_encoder_(self, factor: float | Tensor) -> None:
        super()._scale_encoder_(factor)
        self.b_mag.mul_(factor)

    def rescale_code_(self, scaler: ActivationScaler) -> None:
        """See `SAE.rescale_code_`: b_mag is in units of the code."""
        super().rescale_code_(scaler)
        self.b_mag.div_(scaler.code_scale)
