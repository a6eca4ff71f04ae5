"""JumpReLU sparse autoencoder: a threshold for every latent, trained through a bandwidth.

Source: Rajamanoharan et al. 2024, "Jumping ahead" (arXiv 2407.14435), sections 3 and 4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastsae import ops
from fastsae.nn.auxk import LatentRows
from fastsae.nn.loss import SAEOutput, variation
from fastsae.nn.penalized import PenalizedSAE, mean_over_tokens
from fastsae.nn.thresholds import factor_for_k
from fastsae.types import SparseActs


class JumpReLU(torch.autograd.Function):
    """z H(z - theta) elementwise, with the paper's gradients (eq. 11 and 12).

    d/dz     = H(z - theta)
    d/dtheta = -(theta / eps) K((z - theta) / eps),   K(u) = 1 where |u| < 1/2
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(z, theta, eps)
        return torch.where(z > theta, z, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, theta, eps = ctx.saved_tensors
        near = (z - theta).abs() < eps / 2
        return torch.where(z > theta, grads[0], 0), -grads[0] * near * theta / eps, None


class Step(torch.autograd.Function):
    """H(z - theta) elementwise: d/dz = 0, d/dtheta = -(1 / eps) K((z - theta) / eps)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(z, theta, eps)
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, theta, eps = ctx.saved_tensors
        near = (z - theta).abs() < eps / 2
        return None, -grads[0] * near / eps, None


class DecodeAll(torch.autograd.Function):
    """`ops.sparse_decode` whose entries of value 0 get a gradient as well."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, indices: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor
    ) -> Tensor:
        ctx.save_for_backward(values, indices, offsets, W_dec)
        out: Tensor = torch.ops.fastsae.sparse_decode(values, indices, offsets, W_dec, b_dec)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, offsets, W_dec = ctx.saved_tensors
        grad, native = grads[0].contiguous(), torch.ops.fastsae
        ones = torch.ones_like(values)
        dvalues = native.sparse_decode_values_grad(grad, ones, indices, offsets, W_dec)
        lists = native.group_by_latent(values, indices, offsets, W_dec.shape[0])
        dW = native.sparse_weight_grad(values, *lists, grad)[0]
        return dvalues, None, None, dW, grad.sum(0)


def _apply(function: type[torch.autograd.Function], *inputs: Tensor) -> Tensor:
    out: Tensor = function.apply(*inputs)
    return out


class JumpReLUSAE(PenalizedSAE):
    """Sparse autoencoder with a trained threshold for every latent.

        f    = z H(z - theta),   z = (x - b_dec) W_enc + b_enc,   theta = unit exp(log_threshold)
        loss = fvu + coefficient * sum_j H(z_j - theta_j) / d_in

    The step has no gradient, so theta gets a straight-through estimate from the pre-activations
    within half a bandwidth of it, on both sides; z gets none from the penalty. Only those entries
    and the active ones are ever kept. The paper does not subtract b_dec from x; here it is, as in
    all classes, and b_enc can undo it. See `PenalizedSAE` for k, `unit` and the other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: wanted mean active latents per token; None keeps the coefficient as it is.
        bandwidth: of the estimate, in units of `unit`; a wider one averages over more entries and
            is more biased.
        threshold: where thresholds start, in units of `unit`, > 0. None starts them at one value
            with which the first training batch keeps k entries per token (ours: Adam moves
            log_threshold by lr a step, too little to cross the way up in a short run), or at 0.1
            without k.

    Raises:
        ValueError: bandwidth or threshold is not above 0.
    """

    log_threshold: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: float | None = None,
        *,
        bandwidth: float = 0.2,
        threshold: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, k, **kwargs)
        start = 0.1 if threshold is None else threshold
        if not (0 < bandwidth < math.inf and 0 < start < math.inf):
            self._fail(f"bandwidth > 0 and threshold > 0, got {bandwidth} and {threshold}")
        self.bandwidth, self.initial_threshold = bandwidth, threshold
        self.log_threshold = nn.Parameter(torch.full_like(self.b_enc, math.log(start)))
        self._started = threshold is not None or k is None

    @property
    def threshold(self) -> Tensor:
        """theta: [d_sae], in the unit of the activations."""
        return self.unit.to(self.log_threshold.dtype) * self.log_threshold.exp()

    def _encode(self, x: Tensor) -> SparseActs:
        return self._above(x, self.threshold)

    def encode_for_loss(self, x: Tensor) -> SparseActs:
        """Return the entries that take part in the loss: z above theta - bandwidth / 2."""
        if self.training and not self._started and len(x):
            self._start_threshold(x)
        self._see(x)
        return self._above(x, self.threshold - self._eps() / 2)

    @torch.no_grad()
    def _start_threshold(self, x: Tensor) -> None:
        """Start all thresholds where the first batch `x: [n, d_in]` keeps k entries per token."""
        self._started = True
        if int(self.batches_seen) or self.k is None:
            return
        smallest = ops.encode_batch_topk(
            x, self._rows_enc(), self.b_enc, self.k, b_dec=self._input_bias()
        ).threshold
        unit = (variation(x) / x.numel()).sqrt()
        start = (smallest / unit).log()
        if bool(start.isfinite()):
            self.log_threshold.fill_(start)

    def _eps(self) -> Tensor:
        return self.bandwidth * self.unit.to(self.b_enc.dtype)

    def loss_of(
        self, x: Tensor, target: Tensor, acts: SparseActs, dead: LatentRows | None
    ) -> SAEOutput:
        """See `SAE.loss_of`; `acts` is what `encode_for_loss` returned."""
        z, eps = acts.values, self._eps()
        assert acts.offsets is not None
        theta = self.threshold[acts.indices.long()]
        # Padding lies beyond every threshold's reach.
        entry = torch.arange(z.shape[0], device=z.device)
        inside = entry < acts.offsets[-1]
        z = torch.where(inside, z, -math.inf)
        values = _apply(JumpReLU, z, theta, eps)
        f = SparseActs(values, acts.indices, acts.offsets, self.d_sae)
        self._follow(f.detach())
        penalty = self._weigh(mean_over_tokens(_apply(Step, z, theta, eps), acts.n))
        out = _apply(DecodeAll, values, acts.indices, acts.offsets, self.W_dec, self.b_dec)
        return self._assemble(x, target, f, out, self.sparsity_scale * penalty, dead)

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        """Scale all thresholds by one factor such that `x: [..., d_in]` keeps k latents per token.

        See `BatchTopKSAE.calibrate_`: measure on tokens that are neither trained nor calibrated on.

        Raises:
            ValueError: k is None, or nothing in x is positive.
        """
        if self.k is None:
            self._fail("a wanted k, got None")
        rows, theta = self._rows(x, "x"), self.threshold
        factor = factor_for_k(rows, self._rows_enc(), self.b_enc, self._input_bias(), theta, self.k)
        if not bool(factor.isfinite()):
            self._fail("x to have positive pre-activations, got none")
        self.log_threshold.add_(factor.log())

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        own = {"bandwidth": self.bandwidth, "threshold": self.initial_threshold}
        return {**super().config(), **own}

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return SAELens' `jumprelu`."""
        return {"architecture": "jumprelu"}, {"threshold": self.threshold.detach()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        """Take the thresholds from a saved file."""
        super().restore(tensors, learned)
        self.log_threshold.copy_((tensors["threshold"] / self.unit).log())
