"""Shared base for SAEs that select batch-wise in training and by thresholds at inference."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.context import StepContext
from fastsae.nn.parallel import ALONE, Parallel
from fastsae.nn.parameters import plain
from fastsae.nn.sae import SAE
from fastsae.nn.scaler import ActivationScaler
from fastsae.types import SparseActs


class ThresholdSAE(SAE, register=False):
    """Base of `BatchTopKSAE` and `FeatureChoiceSAE`.

        training:   f = what a subclass selects from the whole batch
        inference:  f = z where z > max(threshold, 0), else 0

    A token's code must not depend on its neighbors at inference, so `eval()` switches to the buffer
    `threshold`. It is float32 whatever the dtype of the parameters, and +inf until a training batch
    has kept something.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: mean active latents per token; may be fractional.
        shape: of the threshold: () or (d_sae,).

    Raises:
        ValueError: k is not in (0, d_sae].
        RuntimeError: encoding in eval mode before any training batch.
    """

    FLOAT32: ClassVar[tuple[str, ...]] = ("threshold",)

    threshold: Tensor

    def __init__(
        self, d_in: int, d_sae: int, k: float, shape: tuple[int, ...] = (), **kwargs: Any
    ) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        if k is None or not 0 < k <= d_sae:
            self._fail(f"0 < k <= d_sae = {d_sae}, got k = {k}")
        self.k: float = plain(k)
        start = torch.full(shape, math.inf, dtype=torch.float32, device=self.b_enc.device)
        self.register_buffer("threshold", start)
        self._has_threshold = False

    @abstractmethod
    def _encode_batch(self, x: Tensor, context: StepContext) -> Any:
        """Select from the whole batch `x: [n, d_in]`."""

    def _encode_above_threshold(self, x: Tensor) -> SparseActs:
        self._check_threshold()
        return ops.encode_threshold(
            x,
            self.W_enc_rows,
            self.b_enc,
            self.threshold.clamp_min(0),
            threshold_capacity(x.shape[0], self.d_sae, self.k),
            b_dec=self._input_bias(),
        )

    def _check_threshold(self) -> None:
        # Reading the threshold waits for the device, so it is done once per switch to eval mode.
        if self._has_threshold:
            return
        threshold = self.threshold
        if threshold.is_meta or type(threshold).__name__ == "FakeTensor":
            return  # there are shapes only
        message = (
            f"{type(self).__name__}: expected a threshold in eval mode, got none yet; call "
            "training_loss() on a batch in training mode, or select batch-wise with sae.train()"
        )
        if torch.compiler.is_compiling():
            torch._assert_async(threshold.isfinite().any(), message)
            return
        if not bool(threshold.isfinite().any()):
            raise RuntimeError(message)
        self._has_threshold = True

    def train(self, mode: bool = True) -> ThresholdSAE:
        """Switch between batch-wise selection (True) and the threshold (False, as `eval()`)."""
        self._has_threshold = False
        return super().train(mode)

    @property
    def holds_units(self) -> bool:
        """See `SAE.holds_units`: a threshold."""
        return bool(self.threshold.isfinite().any())

    def rescale_code_(self, scaler: ActivationScaler) -> None:
        """See `SAE.rescale_code_`: thresholds are in units of the code."""
        super().rescale_code_(scaler)
        self.threshold.div_(scaler.code_scale)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        return {**super().config(), "k": self.k}


def running_average(average: Tensor, value: Tensor, rate: float) -> Tensor:
    """Return `average` moved towards `value` by `rate`, elementwise.

    An infinite average takes the value; an infinite or NaN value changes nothing.
    """
    moved = torch.where(average.isfinite(), average + rate * (value - average), value)
    return torch.where(value.isfinite(), moved, average)


def threshold_capacity(n: int, d_sae: int, k: float) -> int:
    """Return the places that the code of n tokens gets before its size is known.

    Small inputs get room for every latent; large ones for 8 times the expected count, beyond which
    the largest values are kept.
    """
    return entry_capacity(n, d_sae, max(8 * math.ceil(k), 256))


def entry_capacity(n: int, d_sae: int, per_token: int, least: int = 1 << 22) -> int:
    """Return room for `per_token` entries each, for `least` at least, for all at most.

    Raises:
        RuntimeError: in torch.jit.trace, which would fix it to that of the example.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError(
            "SAE: expected torch.export or torch.compile, got torch.jit.trace, which fixes the "
            "number of entries to that of the example"
        )
    capacity: int = torch.sym_min(n * d_sae, torch.sym_max(n * per_token, least))
    return capacity


def factor_for_k(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    threshold: Tensor,
    k: float,
    parallel: Parallel = ALONE,
) -> Tensor:
    """Return the factor `[]` on thresholds with which `x` keeps k latents per token; inf if none.

        z_j > c threshold_j  is  z_j / threshold_j > c,  so c is the smallest of the k n largest

    Args:
        x: [n, d_in].
        W_enc: [d_sae, d_in].
        b_enc: [d_sae].
        b_dec: [d_in] or None.
        threshold: [d_sae], >= 0.
        k: target mean number of active latents per token.
        parallel: who has other latents and tokens.
    """
    divisor = threshold.clamp_min(torch.finfo(torch.float32).tiny ** 0.5).to(b_enc.dtype)
    rows = W_enc / divisor.unsqueeze(1)
    return parallel.encode_batch_topk(x, rows, b_enc / divisor, k, b_dec=b_dec).threshold
