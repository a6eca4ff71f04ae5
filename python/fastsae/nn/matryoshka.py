"""Matryoshka sparse autoencoders: every prefix of the dictionary, or of the code, reconstructs.

Sources: Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders"
(arXiv 2503.17547); Balagansky et al. 2025, "Train one sparse autoencoder across multiple sparsity
budgets" (arXiv 2505.24473), HierarchicalTopK.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fastsae.nn.auxk import LatentRows
from fastsae.nn.batch_topk import BatchTopKSAE
from fastsae.nn.context import STEP, StepContext
from fastsae.nn.loss import SAEOutput, error_of, fvu, squared_error, upcast
from fastsae.nn.objective import total_loss
from fastsae.nn.topk import TopKSAE
from fastsae.ops import _tape
from fastsae.types import SparseActs

ROWS = 256
"""Of a chunk that goes through all prefixes at once."""
MOST_SUMS = 1 << 28
"""Bytes up to which a training step keeps a vector for every entry of the code."""


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
        first = self.parallel.first_latent
        inside = (acts.indices >= start - first) & (acts.indices < end - first)
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
            part = self._part(acts, start, end)
            x_hat = x_hat + self.parallel.sparse_decode(part, self.W_dec)
        out = total_loss(self, x, target, acts, x_hat, None, dead)
        total = self.parallel.sum_over_tokens(total)
        prefixes = out.fvu + fvu(total, target, self.parallel)
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
        x_hat = self.reconstruct(x, acts)
        out = total_loss(self, x, target, acts, x_hat, None, dead)
        order = acts.values.detach().argsort(dim=1, descending=True, stable=True)
        values, indices = acts.values.gather(1, order), acts.indices.gather(1, order)
        start = error_of(target.reshape(x_hat.shape), self.reconstruct(x, _nothing(acts)))
        squared = _PrefixErrors.apply(values, indices, self.W_dec, start)  # type: ignore[no-untyped-call]
        prefixes = fvu(squared, target) / acts.values.shape[1]
        out.loss = prefixes + self.auxk_alpha * out.aux_loss  # nothing behind out.fvu
        return out


def _nothing(acts: SparseActs) -> SparseActs:
    """Return the code of as many tokens without a latent."""
    return SparseActs(acts.values[:, :0], acts.indices[:, :0], None, acts.d_sae)


class _PrefixErrors(torch.autograd.Function):
    """sum_n sum_j |e_nj|^2 of the errors that the j largest latents leave, in memory for [n, d].

    With e_0 the error without any, e_j = e_(j-1) + f_j w_j and s_i = sum_(j >= i) e_j:
        d/df_i = 2 <s_i, w_i>,   d/dw_i += 2 f_i s_i,   d/de_0 = 2 s_1
    The errors are found again backwards by undoing, so nothing is kept but s where a training step
    takes the entries in place of the gradient of W_dec.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor, start: Tensor) -> Tensor:
        error, f, W = start.clone(), upcast(values), upcast(W_dec)
        total = error.new_zeros(())
        for e, f_of, latents in _chunks(error, f, indices):
            for j in range(f.shape[1]):
                e.addcmul_(f_of[:, j, None], W.index_select(0, latents[j]))
                total += torch.linalg.vector_norm(e).square()
        ctx.save_for_backward(values, indices, W_dec, error)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would not notice: the gradient of the loss itself has no graph.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "HierarchicalTopKSAE: expected create_graph=False, the loss has no second "
                "derivative"
            )
        values, indices, W_dec, last = ctx.saved_tensors
        f, W, scale = upcast(values), upcast(W_dec), 2 * grads[0]
        error, df, dW = last.clone(), torch.zeros_like(f), None
        k, total = f.shape[1], torch.zeros_like(last)
        sums, tape = None, _tape.of(W_dec)
        if tape is not None and k * last.numel() * last.element_size() <= MOST_SUMS:
            sums = tape.buffer("prefix errors", (k, *last.shape), last)
        if sums is None:
            dW = torch.zeros_like(W)
        for i, (e, f_of, latents) in enumerate(_chunks(error, f, indices)):
            rows = slice(i * ROWS, i * ROWS + len(e))
            s = total[rows]
            for j in reversed(range(k)):
                if sums is None:
                    s += e
                else:
                    s = torch.add(s, e, out=sums[j, rows])
                w = W.index_select(0, latents[j])
                df[rows, j] = torch.linalg.vecdot(s, w)
                if dW is not None:
                    dW.index_add_(0, latents[j], s * f_of[:, j, None])
                e.addcmul_(f_of[:, j, None], w, value=-1)
            total[rows] = s
        df = (scale * df).masked_fill_(f == 0, 0).to(values.dtype)  # inactive: no gradient
        if sums is not None:
            entries = (scale * f).t().reshape(-1, 1), indices.t().reshape(-1, 1), None
            if not _tape.take_decoder(W_dec, *entries, sums.flatten(0, 1)):
                dW = torch.zeros_like(W)
                for j in range(k):
                    dW.index_add_(0, indices[:, j], sums[j] * f[:, j, None])
        return df, None, None if dW is None else (scale * dW).to(W_dec.dtype), scale * total


def _chunks(error: Tensor, f: Tensor, indices: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield rows of both, and of the latents by rank [k, rows]: as many as stay in a cache."""
    for e, f_of, latents in zip(*(t.split(ROWS) for t in (error, f, indices)), strict=True):
        yield e, f_of, latents.t().contiguous()
