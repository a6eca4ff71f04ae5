"""Sampled SAE: BatchTopK among the latents that matter to the whole batch.

Source: Oozeer et al. 2025, "Distribution-aware feature selection for SAEs" (arXiv 2508.21324). Only
the abstract was at hand: that scores are of relu(z), the formula of the entropy, that the highest
win, and everything about inference are our reading.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.batch_topk import BatchTopKSAE
from fastsae.nn.context import STEP, StepContext
from fastsae.nn.parameters import plain
from fastsae.ops._encode import attach, attachable
from fastsae.types import SparseActs


class SampledSAE(BatchTopKSAE):
    """BatchTopK from a pool of latents, chosen anew for every training batch.

        s_j        = score of column j of relu(z): [n, d_sae]
        pool       = the round(pool * k) latents of the highest score
        training:   f = the int(k n) largest positive entries of z[:, pool]
        inference:  f = z where z > threshold, else 0, of all latents

        score = l2:       s_j = sqrt(sum_i relu(z_ij)^2)
        score = entropy:  s_j = -sum_i p_ij log p_ij,   p_ij = relu(z_ij) / sum_i relu(z_ij)

    In BatchTopK, latents with rare but very large activations crowd out common, smaller ones. With
    pool = 1 all tokens share k latents; a pool of d_sae is BatchTopK.

    Inference has no batch to choose a pool from, so it takes all latents, and the threshold is the
    one with which these give k per token: the smallest value that BatchTopK without a pool keeps.
    That of the pool is lower, and would keep too much. `estimate_threshold_` and `calibrate_` do
    without a pool as well. See `BatchTopKSAE` for the other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: mean active latents per token; may be fractional.
        pool: latents in the pool per active one, at least 1; the pool is at most the dictionary.
        score: what makes a latent matter: `l2` or `entropy`.

    Raises:
        ValueError: pool is below 1 or not finite, or another score.

    Cost: in training, scores and the threshold need a matmul like the encoder's; then the pool is
    encoded.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: float,
        *,
        pool: float = 8.0,
        score: str = "l2",
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, k, **kwargs)
        if not 1 <= pool < math.inf:
            self._fail(f"1 <= pool < inf, got {pool}")
        if score not in ("l2", "entropy"):
            self._fail(f"score to be l2 or entropy, got {score!r}")
        self.pool, self.score = plain(pool), score

    @property
    def pool_size(self) -> int:
        """Number of latents in the pool."""
        size: int = round(min(max(1, self.pool * self.k), self.d_sae))
        return size

    def _encode(self, x: Tensor, context: StepContext = STEP) -> SparseActs:
        if self.training:
            return self._encode_pool(x, context).acts
        return super()._encode(x, context)

    def encode_for_training(self, x: Tensor, context: StepContext) -> SparseActs:
        """See `BatchTopKSAE.encode_for_training`; the threshold is one without a pool."""
        if not self.training:
            return self._encode(x, context)
        acts, smallest = self._encode_pool(x, context)
        self._update_threshold(smallest, context)
        return acts

    def _encode_pool(self, x: Tensor, context: StepContext) -> ops.BatchTopK:
        """Return the code of `x: [n, d_in]` from its pool, and the threshold without a pool."""
        if self.pool_size == self.d_sae:
            return self._encode_batch(x, context)
        scores, threshold = ops.latent_scores(
            x,
            self.W_enc_rows,
            self.b_enc,
            self.k,
            score=self.score,
            b_dec=self._input_bias(),
            compute_dtype=context.compute_dtype,
        )
        pool = ops.topk(scores, self.pool_size).indices  # ascending, so those of a token are too
        W_enc, b_enc, b_dec = self.W_enc_rows, self.b_enc, self._input_bias()
        if not attachable(x, W_enc, b_enc, b_dec):
            return ops.BatchTopK(self._encode_from(pool, x, context), threshold)
        with torch.no_grad():
            acts = self._encode_from(pool, x, context)
        return ops.BatchTopK(attach(acts, x, W_enc, b_enc, b_dec), threshold)

    def _encode_from(self, pool: Tensor, x: Tensor, context: StepContext) -> SparseActs:
        acts = ops.encode_batch_topk(
            x,
            self.W_enc_rows.index_select(0, pool),
            self.b_enc.index_select(0, pool),
            self.k,
            b_dec=self._input_bias(),
            compute_dtype=context.compute_dtype,
        ).acts
        assert acts.offsets is not None
        places = torch.arange(acts.indices.shape[0], device=x.device)
        indices = torch.where(places < acts.offsets[-1], pool.index_select(0, acts.indices), 0)
        return SparseActs(acts.values, indices, acts.offsets, self.d_sae)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        return {**super().config(), "pool": self.pool, "score": self.score}
