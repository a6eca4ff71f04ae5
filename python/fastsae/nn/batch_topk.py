"""BatchTopK sparse autoencoder: a batch shares k * n latents among its n tokens.

Source: Bussmann et al. 2024, "BatchTopK sparse autoencoders" (arXiv 2412.06410), section 3. The
same allocation is called mutual choice in Ayonrinde 2024 (arXiv 2411.02124).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.sae import SAE
from fastsae.nn.thresholds import threshold_room
from fastsae.types import SparseActs


class BatchTopKSAE(SAE):
    """Sparse autoencoder with k latents per token on average.

        training:   f = the int(k n) largest positive entries of z: [n, d_sae]
        inference:  f = z where z > threshold, else 0
        z = (x - b_dec) W_enc + b_enc

    A token's code must not depend on its neighbours at inference, so `eval()` switches to the
    buffer `threshold`: the smallest value kept by a training batch, averaged over batches by
    `loss` (and by nothing else) as `threshold += threshold_lr * (smallest - threshold)`, starting
    from the first value seen; `settle_` replaces the average when training ends. It is float32
    whatever the dtype of the parameters, and +inf until a training batch has kept something. See
    `SAE` for the other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: mean active latents per token; may be fractional.
        threshold_lr: rate of the moving average.

    Raises:
        ValueError: k is not in (0, d_sae], or threshold_lr not in (0, 1].
        RuntimeError: encoding in eval mode before any training batch.
    """

    feature_major_update = True

    threshold: Tensor

    def __init__(
        self, d_in: int, d_sae: int, k: float, *, threshold_lr: float = 0.01, **kwargs: Any
    ) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        if k is None or not 0 < k <= d_sae:
            self._fail(f"0 < k <= d_sae = {d_sae}, got k = {k}")
        if not 0 < threshold_lr <= 1:
            self._fail(f"0 < threshold_lr <= 1, got {threshold_lr}")
        self.k, self.threshold_lr = k, threshold_lr
        self.register_buffer("threshold", torch.full((), math.inf, device=self.b_enc.device))
        self._calibrated = False

    @torch.no_grad()
    def settle_(self, batches: Iterable[Tensor]) -> None:
        """Set the threshold to the mean, over training batches, of the smallest value kept.

        The paper's definition, for the weights as they are: the moving average still remembers
        those of 1 / threshold_lr steps ago. `Trainer.fit` does this at the end.
        """
        smallest = [self._encode_batch(self._rows(x, "x")).threshold for x in batches]
        found = torch.stack(smallest) if smallest else self.threshold[None]
        found = found[found.isfinite()]
        if found.numel():
            self.threshold.copy_(found.mean())

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        """Set the threshold such that `x: [..., d_in]` keeps k latents per token on average.

        Training batches say what to expect of tokens like them. When the data were few and seen
        many times, new tokens have more large pre-activations: calibrate on held-out ones, and
        measure on others.

        Raises:
            ValueError: nothing in x is positive.
        """
        smallest = self._encode_batch(self._rows(x, "x")).threshold
        if not bool(smallest.isfinite()):
            self._fail("x to have positive pre-activations, got none")
        self.threshold.copy_(smallest)

    def _encode(self, x: Tensor) -> SparseActs:
        if self.training:
            return self._encode_batch(x).acts
        self._check_calibrated()
        capacity = threshold_room(x.shape[0], self.d_sae, self.k)
        return ops.encode_threshold(
            x, self._rows_enc(), self.b_enc, self.threshold, capacity, b_dec=self._input_bias()
        )

    def encode_for_loss(self, x: Tensor) -> SparseActs:
        if not self.training:
            return self._encode(x)
        acts, smallest = self._encode_batch(x)
        self._update_threshold(smallest.detach().float())
        return acts

    def _encode_batch(self, x: Tensor) -> ops.BatchTopK:
        return ops.encode_batch_topk(
            x,
            self._rows_enc(),
            self.b_enc,
            self.k,
            b_dec=self._input_bias(),
            compute_dtype=self._product(),
            threshold_guess=self.threshold,
        )

    @torch.no_grad()
    def _update_threshold(self, smallest: Tensor) -> None:
        """Average in the smallest kept value `[]`; +inf (nothing kept) and NaN change nothing."""
        average = self.threshold + self.threshold_lr * (smallest - self.threshold)
        updated = torch.where(self.threshold.isfinite(), average, smallest)
        self.threshold.copy_(torch.where(smallest.isfinite(), updated, self.threshold))

    def _check_calibrated(self) -> None:
        # Reading the threshold waits for the device, so it is done once per switch to eval mode.
        if self._calibrated:
            return
        if not bool(self.threshold.isfinite()):
            raise RuntimeError(
                f"{type(self).__name__}: expected a threshold in eval mode, got none yet; call "
                "loss() on a batch in training mode, or select batch-wise with sae.train()"
            )
        self._calibrated = True

    def train(self, mode: bool = True) -> BatchTopKSAE:
        """Switch between batch-wise selection (True) and the threshold (False, as `eval()`)."""
        self._calibrated = False
        return super().train(mode)

    @torch.no_grad()
    def fold_input_scale_(self, scale: float) -> None:
        """See `SAE.fold_input_scale_`; the threshold is divided as well."""
        super().fold_input_scale_(scale)
        self.threshold.div_(scale)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        return {**super().config(), "k": self.k, "threshold_lr": self.threshold_lr}

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return SAELens' `jumprelu` with the same threshold for every latent: the eval mode."""
        return {"architecture": "jumprelu"}, {"threshold": self.threshold.repeat(self.d_sae)}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        """Take the threshold from a saved file, where all latents have the same.

        Raises:
            ValueError: they have not.
        """
        lowest, highest = tensors["threshold"].aminmax()
        if lowest != highest:
            self._fail(f"one threshold for all latents, got {lowest:.6g} to {highest:.6g}")
        self.threshold.copy_(lowest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchTopKSAE:
        # `.to(torch.bfloat16)` must not round the threshold.
        exact = self.threshold
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not exact.is_meta:
            self.threshold = exact.to(self.threshold.device)
        return self


MutualChoiceSAE = BatchTopKSAE
