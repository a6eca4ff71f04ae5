"""Gated sparse autoencoder: one path decides which latents are active, another how strongly.

Source: Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders"
(arXiv 2404.16014), section 3.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastsae import ops
from fastsae.nn.auxk import LatentRows
from fastsae.nn.loss import SAEOutput, unexplained, upcast
from fastsae.nn.penalized import PenalizedSAE, mean_over_tokens
from fastsae.types import SparseActs


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
        k: wanted mean active latents per token; None keeps the coefficient as it is.
    """

    FILE_NAMES: ClassVar[dict[str, str]] = {"b_enc": "b_gate"}

    r_mag: Tensor
    b_mag: Tensor

    def __init__(self, d_in: int, d_sae: int, k: float | None = None, **kwargs: Any) -> None:
        super().__init__(d_in, d_sae, k, **kwargs)
        self.r_mag = nn.Parameter(torch.zeros_like(self.b_enc))
        self.b_mag = nn.Parameter(torch.zeros_like(self.b_enc))

    def _gate(self, x: Tensor) -> SparseActs:
        """Return relu(pi)."""
        return self._above(x, self.b_enc.new_zeros(()))

    def _open(self, gate: SparseActs) -> SparseActs:
        """Return f where the gate is open: the same entries with the other path's values."""
        j = gate.indices.long()
        magnitude = (gate.values - self.b_enc[j]) * self.r_mag.exp()[j] + self.b_mag[j]
        values = torch.where(gate.values > 0, magnitude.relu(), 0)
        return SparseActs(values, gate.indices, gate.offsets, gate.d_sae)

    def _encode(self, x: Tensor) -> SparseActs:
        return self._open(self._gate(x))

    def encode_for_loss(self, x: Tensor) -> SparseActs:
        """Return relu(pi), from which `loss_of` takes both paths."""
        self._see(x)
        return self._gate(x)

    def loss_of(
        self, x: Tensor, target: Tensor, acts: SparseActs, dead: LatentRows | None
    ) -> SAEOutput:
        """See `SAE.loss_of`; `acts` is what `encode_for_loss` returned."""
        f = self._open(acts)
        self._follow(f.detach())
        penalty = self._weigh(mean_over_tokens(acts.values, acts.n) / upcast(self.unit))
        out = self._assemble(x, target, f, self.decode(f), self.sparsity_scale * penalty, dead)
        by_gate = ops.sparse_decode(acts, self.W_dec.detach(), self.b_dec.detach())
        squared = (upcast(target) - upcast(by_gate)).square().sum()
        out.loss = out.loss + unexplained(squared, target)
        return out

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return SAELens' `gated`."""
        return {"architecture": "gated"}, {"r_mag": self.r_mag, "b_mag": self.b_mag}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        """Take the second path from a saved file."""
        super().restore(tensors, learned)
        self.r_mag.copy_(tensors["r_mag"])
        self.b_mag.copy_(tensors["b_mag"])

    @torch.no_grad()
    def fold_input_scale_(self, scale: float) -> None:
        """See `SAE.fold_input_scale_`; b_mag is divided as well."""
        super().fold_input_scale_(scale)
        self.b_mag.div_(scale)
