"""What a step of an SAE does with the whole dictionary and the whole batch.

The dictionary may be spread over processes, and so may the batch: `fastsae.distributed` does then
what is said here. One process that has all of both calls the ops.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastsae import ops
from fastsae.types import BatchTopK, SparseActs, TopK, accumulator_dtype


class Parallel:
    """One process that holds all latents and is given all tokens."""

    first_latent = 0
    """Place in the dictionary of the first latent that is held here."""

    @property
    def is_alone(self) -> bool:
        """Whether everything is here."""
        return True

    def __deepcopy__(self, memo: Any) -> Parallel:
        return self

    def latents(self, held: int) -> int:
        """Return how many latents the dictionary has, of which `held` are here."""
        return held

    def tokens(self, n: int) -> int:
        """Return how many tokens the batch has, of which `n` are here."""
        return n

    def count(self, held: int) -> int:
        """Return the sum of a number of latents `held` here and of those elsewhere. A wait."""
        return held

    def encode_topk(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, **options: Any
    ) -> SparseActs:
        """Return `ops.encode_topk` of the whole dictionary: the entries of the latents here.

        Args:
            x: [n, d_in].
            W_enc: [d_sae, d_in], of the latents here.
            b_enc: [d_sae].
            k: entries per row in the whole dictionary.
            options: of the op.
        """
        top: TopK = ops.encode_topk(x, W_enc, b_enc, k, **options)
        return SparseActs(*top, None, W_enc.shape[0])

    def encode_batch_topk(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: float, **options: Any
    ) -> BatchTopK:
        """Return `ops.encode_batch_topk` of the whole dictionary and batch: the entries that are
        here, and the threshold of all. Arguments as in `encode_topk`."""
        return ops.encode_batch_topk(x, W_enc, b_enc, k, **options)

    def encode_feature_topk(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, budget: Tensor, total: int, **options: Any
    ) -> SparseActs:
        """Return `ops.encode_feature_topk` of the whole batch: the entries of the tokens here.

        Args:
            x: [n, d_in].
            W_enc: [d_sae, d_in], of the latents here.
            b_enc: [d_sae].
            budget: [d_sae], entries of each latent in the whole batch.
            total: the sum of the budgets of all latents.
            options: of the op.
        """
        return ops.encode_feature_topk(x, W_enc, b_enc, budget, total, **options)

    def sparse_decode(
        self, acts: SparseActs, W_dec: Tensor, b_dec: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Return `ops.sparse_decode` of the whole dictionary, for the tokens here: [n, d_out]."""
        out: Tensor = ops.sparse_decode(acts, W_dec, b_dec, **options)
        return out

    def sum_over_latents(self, part: Tensor) -> Tensor:
        """Return the sum of what every part of the dictionary has.

        Gradients: of every part, that of the sum.
        """
        return part

    def sum_over_tokens(self, part: Tensor) -> Tensor:
        """Return the sum of what every part of the batch has; gradients as above."""
        return part

    def sum_over_all(self, part: Tensor) -> Tensor:
        """Return the sum of what every part of both has; gradients as above."""
        return part

    def min_over_tokens(self, part: Tensor) -> Tensor:
        """Return the smallest of what every part of the batch has, elementwise."""
        return part

    def of_all_latents(self, held: Tensor) -> Tensor:
        """Return the numbers of all latents, of which those here have `held: [d_sae]`."""
        return held

    def of_own_latents(self, every: Tensor) -> Tensor:
        """Return those of the latents here."""
        return every

    def total_variance(self, x: Tensor) -> Tensor:
        """Return sum (x - mean x)^2 over the rows of the whole batch, `x: [..., d]` of which are
        here, in float32 or float64, without a graph."""
        x = x.detach().to(accumulator_dtype(x.dtype)).reshape(-1, x.shape[-1])
        return (x - x.mean(0)).square().sum()


ALONE = Parallel()
"""For modules that nobody has spread."""
