"""BatchTopK sparse autoencoder: a batch shares k * n latents among its n tokens.

Source: Bussmann et al. 2024, "BatchTopK sparse autoencoders" (arXiv 2412.06410), section 3. The
same allocation is called mutual choice in Ayonrinde 2024 (arXiv 2411.02124).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastsae.nn.context import STEP, StepContext, updates_statistics
from fastsae.nn.parameters import plain
from fastsae.nn.threshold_sae import ThresholdSAE, running_average
from fastsae.types import BatchTopK, SparseActs


class BatchTopKSAE(ThresholdSAE):
    """Sparse autoencoder with k latents per token on average.

        training:   f = the int(k n) largest positive entries of z: [n, d_sae]
        inference:  f = z where z > threshold, else 0
        z = (x - b_dec) W_enc + b_enc

    A token's code must not depend on its neighbors at inference, so `eval()` switches to the
    buffer `threshold`: the smallest value kept by a training batch, averaged over batches by
    `training_loss` (and by nothing else) as `threshold += threshold_lr * (smallest - threshold)`,
    starting from the first value seen; `estimate_threshold_` replaces the average when training
    ends. It is float32 whatever the dtype of the parameters, and +inf until a training batch has
    kept something. See `SAE` for the other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: mean active latents per token; may be fractional.
        threshold_lr: rate of the moving average.

    Raises:
        ValueError: k is not in (0, d_sae], or threshold_lr not in (0, 1].
        RuntimeError: encoding in eval mode before any training batch.
    """

    def __init__(
        self, d_in: int, d_sae: int, k: float, *, threshold_lr: float = 0.01, **kwargs: Any
    ) -> None:
        super().__init__(d_in, d_sae, k, **kwargs)
        if not 0 < threshold_lr <= 1:
            self._fail(f"0 < threshold_lr <= 1, got {threshold_lr}")
        self.threshold_lr = plain(threshold_lr)

    def _encode(self, x: Tensor, context: StepContext = STEP) -> SparseActs:
        if self.training:
            return self._encode_batch(x, context).acts
        return self._encode_above_threshold(x)

    def _encode_batch(self, x: Tensor, context: StepContext = STEP) -> BatchTopK:
        return self.parallel.encode_batch_topk(
            x,
            self.W_enc_rows,
            self.b_enc,
            self.k,
            b_dec=self._input_bias(),
            compute_dtype=context.compute_dtype,
            threshold_guess=self.threshold,
        )

    def encode_for_training(self, x: Tensor, context: StepContext) -> SparseActs:
        """See `SAE.encode_for_training`: averages the smallest kept value into the threshold."""
        if not self.training:
            return self._encode(x, context)
        acts, smallest = self._encode_batch(x, context)
        self._update_threshold(smallest, context)
        return acts

    @torch.no_grad()
    def _update_threshold(self, smallest: Tensor, context: StepContext) -> None:
        """Average in the smallest kept value `[]`; +inf (nothing kept) and NaN change nothing."""
        if updates_statistics(self):
            smallest = context.reduced(smallest.detach().float(), "mean")
            self.threshold.copy_(running_average(self.threshold, smallest, self.threshold_lr))

    @torch.no_grad()
    def estimate_threshold_(self, batches: Iterable[Tensor]) -> None:
        """Set the threshold to the mean, over training batches, of the smallest value kept.

        The paper's definition, for the weights as they are: the moving average still remembers
        those of 1 / threshold_lr steps ago. `Trainer.finish` does this.
        """
        smallest = [self._encode_batch(self._rows(x, "x")).threshold for x in batches]
        if not smallest:
            return
        found = torch.stack(smallest)
        known = found.isfinite()
        mean = torch.where(known, found, 0).sum(0) / known.sum(0)
        self.threshold.copy_(torch.where(known.any(0), mean, self.threshold))

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        """Set the threshold such that `x: [..., d_in]` keeps k latents per token on average.

        Training batches say what to expect of tokens like them. When the data were few and seen
        many times, new tokens have more large pre-activations: calibrate on held-out ones, and
        measure on others. `Trainer.fit` does so with rows that it keeps from training.

        Raises:
            ValueError: nothing in x is positive.
        """
        smallest = self._encode_batch(self._rows(x, "x")).threshold
        if not bool(smallest.isfinite().all()):
            self._fail("x to have positive pre-activations, got none")
        self.threshold.copy_(smallest)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        return {**super().config(), "threshold_lr": self.threshold_lr}


MutualChoiceSAE = BatchTopKSAE
