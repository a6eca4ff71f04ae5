"""Matryoshka sparse autoencoders: every prefix of the dictionary, or of the code, reconstructs.

Sources: Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders"
(arXiv 2503.17547); Balagansky et al. 2025, "Train one sparse autoencoder across multiple sparsity
budgets" (arXiv 2505.24473), HierarchicalTopK.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.auxk import LatentRows
from fastsae.nn.batch_topk import BatchTopKSAE
from fastsae.nn.context import STEP, StepContext
from fastsae.nn.loss import SAEOutput, fvu, squared_error, upcast
from fastsae.nn.objective import total_loss
from fastsae.nn.topk import TopKSAE
from fastsae.types import SparseActs


class MatryoshkaSAE(BatchTopKSAE):
    """BatchTopK sparse autoencoder whose first latents have to reconstruct without the others.

        x_hat_0 = b_dec,   x_hat_j = x_hat_(j-1) + f[:, group j] W_dec[group j]
        loss    = 1 / (g + 1) sum_(j = 0..g) fvu(x_hat_j) + auxk_alpha * aux_loss

    One selection of k n entries over all latents makes f. `fvu` in the result is that of the full
    reconstruction. Setting `active_groups` to j at inference leaves out the latents of later groups
    after the selection. See `BatchTopKSAE` for the other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: mean active latents per token; may be fractional.
        groups: sizes of the groups, summing to d_sae; None takes 1/32, 1/16, 1/8, 1/4 and the rest.

    Raises:
        ValueError: a group without latents, or another sum.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: float,
        *,
        groups: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, k, **kwargs)
        if groups is None:
            first = [size for size in (d_sae // 32, d_sae // 16, d_sae // 8, d_sae // 4) if size]
            groups = [*first, d_sae - sum(first)]
        if min(groups, default=0) < 1 or sum(groups) != d_sae:
            self._fail(f"groups of at least 1 that sum to d_sae = {d_sae}, got {[*groups]}")
        self.groups = [int(size) for size in groups]
        self.active_groups = len(self.groups)
        """How many groups inference uses; not saved."""

    def _encode(self, x: Tensor, context: StepContext = STEP) -> SparseActs:
        acts = super()._encode(x, context)
        if self.training or self.active_groups == len(self.groups):
            return acts
        return self._part(acts, 0, sum(self.groups[: self.active_groups]))

    def _part(self, acts: SparseActs, start: int, end: int) -> SparseActs:
        """Return the code of latents `start` to `end` alone: the same entries, others 0."""
        inside = (acts.indices >= start) & (acts.indices < end)
        values = torch.where(inside, acts.values, 0)
        return SparseActs(values, acts.indices, acts.offsets, acts.d_sae)

    def loss_of(
        self,
        x: Tensor,
        target: Tensor,
        acts: SparseActs,
        dead: LatentRows | None,
        context: StepContext,
    ) -> SAEOutput:
        """See `SAE.loss_of`."""
        x_hat = self.b_dec.expand(x.shape[0], -1)
        ends = [0, *accumulate(self.groups)]
        total = upcast(x_hat).new_zeros(())
        for start, end in pairwise(ends):
            total = total + squared_error(target, x_hat)
            x_hat = x_hat + ops.sparse_decode(self._part(acts, start, end), self.W_dec)
        out = total_loss(self, x, target, acts, x_hat, None, dead)
        prefixes = out.fvu + fvu(total, target)
        out.loss = out.loss - out.fvu + prefixes / (len(self.groups) + 1)
        return out

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        return {**super().config(), "groups": self.groups}


class HierarchicalTopKSAE(TopKSAE):
    """TopK sparse autoencoder that reconstructs at every number of latents up to k.

        loss = 1 / k sum_(j = 1..k) fvu(x_hat_j) + auxk_alpha * aux_loss
        x_hat_j = b_dec + the j largest latents of the token

    So one SAE serves at every L0 up to k: set `k` to a smaller number at inference. `fvu` in the
    result is that of all k. See `SAE` for the other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: active latents per token.
    """

    def loss_of(
        self,
        x: Tensor,
        target: Tensor,
        acts: SparseActs,
        dead: LatentRows | None,
        context: StepContext,
    ) -> SAEOutput:
        """See `SAE.loss_of`."""
        out = super().loss_of(x, target, acts, dead, context)
        order = acts.values.detach().argsort(dim=1, descending=True, stable=True)
        values, indices = acts.values.gather(1, order), acts.indices.gather(1, order)
        squared = _PrefixErrors.apply(
            values, indices, self.W_dec, self.b_dec, target.reshape(x.shape[0], -1)
        )  # type: ignore[no-untyped-call]
        out.loss = out.loss - out.fvu + fvu(squared, target) / acts.values.shape[1]
        return out


class _PrefixErrors(torch.autograd.Function):
    """sum_n sum_j |x_n - x_hat_nj|^2 in memory for [n, d], not [n, k, d].

    With e_j the error of the j largest and s_i = sum_(j >= i) e_j:
        d/df_i = -2 <s_i, w_i>,   d/dw_i += -2 f_i s_i,   d/db = -2 s_1
    Forwards e_j = e_(j-1) - f_j w_j; backwards the same undone, so nothing is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor
    ) -> Tensor:
        W, f, latents = upcast(W_dec), upcast(values), indices.long()
        e = upcast(target) - b_dec
        total = e.new_zeros(())
        for j in range(f.shape[1]):
            e = torch.addcmul(e, f[:, j, None], W[latents[:, j]], value=-1)
            total += e.square().sum()
        df, dW, s = torch.zeros_like(f), torch.zeros_like(W), torch.zeros_like(e)
        for j in reversed(range(f.shape[1])):
            s += e
            w = W[latents[:, j]]
            df[:, j] = -2 * (s * w).sum(1)
            dW.index_add_(0, latents[:, j], s * f[:, j, None], alpha=-2)
            e = torch.addcmul(e, f[:, j, None], w)
        db = -2 * s.sum(0)
        df.masked_fill_(f == 0, 0)  # an inactive entry gets no gradient, as everywhere
        ctx.save_for_backward(df.to(values.dtype), dW.to(W_dec.dtype), db.to(b_dec.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would not notice: the gradient of the loss itself has no graph.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "HierarchicalTopKSAE: expected create_graph=False, the loss has no second "
                "derivative"
            )
        df, dW, db = (t * grads[0].to(t.dtype) for t in ctx.saved_tensors)
        return df, None, dW, db, None
