"""Transcoders: a sparse code of a layer's input that reconstructs the layer's output.

Sources: Dunefsky et al. 2024, "Transcoders find interpretable LLM feature circuits"
(arXiv 2406.11944); Paulo et al. 2025, "Transcoders beat sparse autoencoders for interpretability"
(arXiv 2501.18823), the skip connection.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsae.nn.batch_topk import BatchTopKSAE
from fastsae.nn.check import check_rows
from fastsae.nn.context import STEP, StepContext
from fastsae.nn.group_max import GroupMaxSAE
from fastsae.nn.jumprelu import JumpReLUSAE
from fastsae.nn.loss import SAEOutput
from fastsae.nn.parameters import plain
from fastsae.nn.relu import ReLUSAE
from fastsae.nn.sae import SAE
from fastsae.nn.scaler import ActivationScaler, Columns
from fastsae.nn.topk import TopKSAE
from fastsae.types import SparseActs


class TranscoderMixin(SAE, register=False):
    """Mixin that turns an SAE class into a transcoder; list it before the class that selects.

        z     = x W_enc + b_enc,   f = select(z)
        y_hat = f W_dec + b_dec (+ x W_skip^T)

    x is not centered by b_dec, which has the width of y: b_enc does that, and the trainer starts it
    at minus the mean input times W_enc.

        class BatchTopKTranscoder(TranscoderMixin, BatchTopKSAE): ...

    Training data are x and y side by side, `[n, d_in + d_out]`; the trainer scales each on its own,
    and both scales are folded into W_enc and the biases in the end. `loss(x, y)` takes y as its
    target. Everything else is as in the selecting class; its k and options follow `d_sae`.

    Args:
        d_in: width of the layer's input.
        d_out: width of the layer's output.
        d_sae: number of latents.
        k: as in the selecting class.
        skip: whether a linear map of x is added to the output, starting at 0.

    Raises:
        ValueError: d_out below 1, and as in the selecting class.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        k: float | None = None,
        *,
        skip: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("apply_b_dec_to_input", False)
        super().__init__(d_in, d_sae, k, **kwargs)  # type: ignore[call-arg,arg-type]
        if self.apply_b_dec_to_input:
            self._fail("apply_b_dec_to_input to be False, as b_dec is of the output, got True")
        if d_out < 1:
            self._fail(f"d_out >= 1, got {d_out}")
        self.d_out, self.skip = plain(d_out), bool(skip)
        d_out, d_sae = plain(d_out), self.d_sae
        rows = torch.randn(d_sae, d_out, dtype=self.b_enc.dtype, device=self.b_enc.device)
        self.W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        self.b_dec = nn.Parameter(self.b_enc.new_zeros(d_out))
        if skip:
            self.W_skip = nn.Parameter(self.b_enc.new_zeros(d_out, d_in))

    @property
    def columns(self) -> Columns:
        """The column blocks of a training batch: x and y."""
        return Columns((self.d_in,), (self.d_out,))

    def forward(self, x: Tensor) -> Tensor:
        """Return y_hat: `[..., d_out]` for `x: [..., d_in]`."""
        rows = self._rows(x, "x")
        return self.reconstruct(rows, self._encode(rows)).reshape(*x.shape[:-1], self.d_out)

    @property
    def adds_rows(self) -> bool:
        """See `SAE.adds_rows`: without a skip connection."""
        return not self.skip and type(self).decode is SAE.decode

    def reconstruct(self, x: Tensor, acts: SparseActs) -> Tensor:
        """Return y_hat `[n, d_out]` from the code `acts` of `x: [n, d_in]`."""
        y_hat = self.decode(acts)
        return y_hat + F.linear(x, self.W_skip) if self.skip else y_hat

    def loss(
        self, x: Tensor, target: Tensor | None = None, *, context: StepContext = STEP
    ) -> SAEOutput:
        """See `SAE.loss`; the target is y: `[..., d_out]`."""
        if target is None:
            self._fail("a target, the layer's output y, got None")
        return super().loss(x, target, context=context)

    def _target_rows(self, target: Tensor) -> Tensor:
        return check_rows(type(self).__name__, target, "target", like=self.W_dec, width="d_out")

    @torch.no_grad()
    def rescale_code_(self, scaler: ActivationScaler) -> None:
        """See `SAE.rescale_code_`: W_skip maps the units of x to those of y."""
        super().rescale_code_(scaler)
        if self.skip:
            self.W_skip.mul_(scaler.input_scales[0] / scaler.target_scales[0])

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        return {**super().config(), "d_out": self.d_out, "skip": self.skip}


class Transcoder(TranscoderMixin, TopKSAE):
    """TopK transcoder: `Transcoder(d_in, d_out, d_sae, k, skip=False)`; see `TranscoderMixin`."""


class BatchTopKTranscoder(TranscoderMixin, BatchTopKSAE):
    """BatchTopK transcoder; see `TranscoderMixin` and `BatchTopKSAE`."""


class GroupMaxTranscoder(TranscoderMixin, GroupMaxSAE):
    """GroupMax transcoder; see `TranscoderMixin` and `GroupMaxSAE`."""


class JumpReLUTranscoder(TranscoderMixin, JumpReLUSAE):
    """JumpReLU transcoder; see `TranscoderMixin` and `JumpReLUSAE`."""


class ReLUTranscoder(TranscoderMixin, ReLUSAE):
    """ReLU transcoder with a sparsity penalty; see `TranscoderMixin` and `ReLUSAE`."""
