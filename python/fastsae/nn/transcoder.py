"""Transcoders: a sparse code of a layer's input that reconstructs the layer's output.

Sources: Dunefsky et al. 2024, "Transcoders find interpretable LLM feature circuits"
(arXiv 2406.11944); Paulo et al. 2025, "Transcoders beat sparse autoencoders for interpretability"
(arXiv 2501.18823), the skip connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsae import ops
from fastsae.nn.batch_topk import BatchTopKSAE
from fastsae.nn.blocks import BlockwiseSAE
from fastsae.nn.check import check_rows
from fastsae.nn.init import center
from fastsae.nn.jumprelu import JumpReLUSAE
from fastsae.nn.loss import SAEOutput
from fastsae.nn.relu import ReLUSAE
from fastsae.nn.topk import TopKSAE
from fastsae.types import SparseActs


class TranscoderRule(BlockwiseSAE, register=False):
    """What turns an SAE class into a transcoder: put it before the class that selects.

        z     = x W_enc + b_enc,   f = select(z)
        y_hat = f W_dec + b_dec (+ x W_skip^T)

    x is not centred by b_dec, which has the width of y: b_enc does that, and the trainer starts it
    at minus the mean input times W_enc.

        class BatchTopKTranscoder(TranscoderRule, BatchTopKSAE): ...

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
        super().__init__(d_in, d_sae, k, **kwargs)
        if d_out < 1:
            self._fail(f"d_out >= 1, got {d_out}")
        self.d_out, self.skip = d_out, skip
        rows = torch.randn(d_sae, d_out, dtype=self.b_enc.dtype, device=self.b_enc.device)
        self.W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        self.b_dec = nn.Parameter(self.b_enc.new_zeros(d_out))
        if skip:
            self.W_skip = nn.Parameter(self.b_enc.new_zeros(d_out, d_in))
        # Neither the fused update nor its gradients know of a target or of W_skip.
        self.feature_major_update = False

    @property
    def data_widths(self) -> tuple[int, ...]:
        """The column blocks of a training batch: x and y."""
        return self.d_in, self.d_out

    def split(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and y of a training batch `[n, d_in + d_out]`."""
        x, y = batch.split(self.data_widths, 1)
        return x.contiguous(), y.contiguous()

    def batch_loss(self, batch: Tensor, dead: Tensor | None) -> SAEOutput:
        """Return the loss of x and y side by side."""
        return self.loss(*self.split(batch), dead=dead)

    def forward(self, x: Tensor) -> Tensor:
        """Return y_hat: `[..., d_out]` for `x: [..., d_in]`."""
        rows = self._rows(x, "x")
        return self.reconstruct(rows, self._encode(rows)).reshape(*x.shape[:-1], self.d_out)

    def reconstruct(self, x: Tensor, acts: SparseActs) -> Tensor:
        """Return y_hat `[n, d_out]` from the code `acts` of `x: [n, d_in]`."""
        y_hat = self.decode(acts)
        return y_hat + F.linear(x, self.W_skip) if self.skip else y_hat

    def loss(
        self, x: Tensor, target: Tensor | None = None, *, dead: Tensor | None = None
    ) -> SAEOutput:
        """See `SAE.loss`; the target is y: `[..., d_out]`."""
        if target is None:
            self._fail("a target, the layer's output y, got None")
        return super().loss(x, target, dead=dead)

    def _assemble(self, x: Tensor, target: Tensor, acts: Any, y_hat: Tensor, *rest: Any) -> Any:
        y_hat = y_hat + F.linear(x, self.W_skip) if self.skip else y_hat
        return super()._assemble(x, target, acts, y_hat, *rest)

    def _input_bias(self) -> Tensor | None:
        return None

    def _goal(self, target: Tensor) -> Tensor:
        return check_rows(type(self).__name__, target, "target", like=self.W_dec.t(), width="d_out")

    @torch.no_grad()
    def init_b_dec(self, x: Tensor, method: str = "geometric_median") -> None:
        """Set b_dec to the centre of outputs `x: [..., d_out]`; see `SAE.init_b_dec`."""
        self.b_dec.copy_(center(self._goal(x), method))

    @torch.no_grad()
    def start_(self, batch: Tensor, method: str) -> None:
        """Set b_dec to the centre of y; before any training, b_enc and W_dec from x and y as well.

        b_enc becomes minus the centre of x times W_enc, and W_dec_j the direction of sum_n f_nj
        (y_n - b_dec), f being the 32 largest latents of each token: what y is like where the random
        latent j fires. Rows of independent noise would first have to be unlearned (ours).
        """
        x, y = self.split(batch)
        self.init_b_dec(y, method)
        if bool(self.trained):
            return
        self.b_enc.copy_(-(center(x, method).to(x.dtype) @ self.W_enc))
        values, indices = ops.encode_topk(x, self._rows_enc(), self.b_enc, min(32, self.d_sae))
        lists = ops.group_by_latent(SparseActs(values, indices, None, self.d_sae))
        rows = ops.sparse_weight_grad(values, lists, y - self.b_dec)[0]
        norm = rows.norm(dim=1, keepdim=True)
        self.W_dec.copy_(torch.where(norm > 0, rows / norm, self.W_dec))

    def _fold(self, scales: Sequence[float]) -> None:
        """Turn a transcoder of `scales[0] * x` to `scales[1] * y` into one of x to y.

        W_enc takes scales[0] / scales[1], everything in units of the code is divided by scales[1],
        and decoder rows keep their norm.
        """
        super().fold_input_scale_(scales[1])
        self.W_enc.mul_(scales[0] / scales[1])
        if self.skip:
            self.W_skip.mul_(scales[0] / scales[1])

    def error_scale(self, scales: Sequence[float]) -> float:
        """Return the scale of y."""
        return scales[1]

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        return {**super().config(), "d_out": self.d_out, "skip": self.skip}

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return SAELens' transcoder of the same selection; it knows those of ReLU and JumpReLU."""
        cfg, tensors = super().export()  # type: ignore[safe-super]
        rule = "" if cfg["architecture"] == "standard" else f"{cfg['architecture']}_"
        name = f"{rule}{'skip_' if self.skip else ''}transcoder"
        cfg |= {"architecture": name, "apply_b_dec_to_input": False, "d_out": self.d_out}
        return cfg, {**tensors, "W_skip": self.W_skip} if self.skip else tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        """Take the skip connection from a saved file."""
        super().restore(tensors, learned)
        if self.skip:
            self.W_skip.copy_(tensors["W_skip"])


class Transcoder(TranscoderRule, TopKSAE):
    """TopK transcoder: `Transcoder(d_in, d_out, d_sae, k, skip=False)`; see `TranscoderRule`."""


class BatchTopKTranscoder(TranscoderRule, BatchTopKSAE):
    """BatchTopK transcoder; see `TranscoderRule` and `BatchTopKSAE`."""


class JumpReLUTranscoder(TranscoderRule, JumpReLUSAE):
    """JumpReLU transcoder; see `TranscoderRule` and `JumpReLUSAE`."""


class ReLUTranscoder(TranscoderRule, ReLUSAE):
    """ReLU transcoder with a sparsity penalty; see `TranscoderRule` and `ReLUSAE`."""
