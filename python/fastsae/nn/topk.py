"""TopK sparse autoencoder: every token keeps its k largest latents.

Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), eq. 2-3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.auxk import LatentRows
from fastsae.nn.check import is_whole
from fastsae.nn.context import STEP, StepContext
from fastsae.nn.loss import SAEOutput, fvu, squared_error
from fastsae.nn.objective import total_loss
from fastsae.nn.sae import SAE
from fastsae.ops._encode import attach, attachable
from fastsae.types import SparseActs


class TopKSAE(SAE):
    """Sparse autoencoder with exactly k latents per token (fewer where fewer are positive).

        f = relu(topk(z, k)),   z = (x - b_dec) W_enc + b_enc

    Selection is the same in training and inference. With `multi_topk` the loss also asks for a good
    reconstruction from 4 k latents, which keeps the code useful at other k:

        loss = fvu(k) + fvu(4 k) / 8 + auxk_alpha * aux_loss

    See `SAE` for the other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: active latents per token.
        absolute: whether selection looks at |z| and values keep their sign: AbsTopK (Zhu et al.
            2025, arXiv 2510.00404), in which a latent stands for a direction and its opposite.
        multi_topk: whether 4 k latents (at most d_sae) have to reconstruct as well (Gao et al.
            2024, section 5.2), which takes a decode of the others.
        select_by_decoder_norm: whether selection looks at z times the norm of the latent's decoder
            row, which is how much it would write, while values stay z. Of rows of norm 1, as
            training keeps them, it changes nothing; SAEs of llamascopium have others.

    Raises:
        ValueError: k is not an integer in 1..d_sae.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        absolute: bool = False,
        multi_topk: bool = False,
        select_by_decoder_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        if not is_whole(k) or not 1 <= k <= d_sae:
            self._fail(f"k to be an integer in 1..d_sae = {d_sae}, got k = {k}")
        self.k, self.absolute, self.multi_topk = int(k), bool(absolute), bool(multi_topk)
        self.select_by_decoder_norm = bool(select_by_decoder_norm)
        if self.absolute and self.select_by_decoder_norm:
            self._fail("absolute or select_by_decoder_norm, got both")

    def _encode(self, x: Tensor, context: StepContext = STEP) -> SparseActs:
        return self._largest(x, self.k, context)

    def _largest(self, x: Tensor, k: int, context: StepContext = STEP) -> SparseActs:
        W_enc, b_enc, b_dec = self.W_enc_rows, self.b_enc, self._input_bias()
        if self.select_by_decoder_norm and attachable(x, W_enc, b_enc, b_dec):
            with torch.no_grad():
                acts = self._largest_by_norm(x, k, context)
            return attach(acts, x, W_enc, b_enc, b_dec)
        if self.select_by_decoder_norm:
            return self._largest_by_norm(x, k, context)
        return self.parallel.encode_topk(
            x,
            W_enc,
            b_enc,
            k,
            b_dec=b_dec,
            absolute=self.absolute,
            compute_dtype=context.compute_dtype,
        )

    def _largest_by_norm(self, x: Tensor, k: int, context: StepContext) -> SparseActs:
        # z norm is what the encoder times the norm gives
        norm = torch.linalg.vector_norm(self.W_dec.detach(), dim=1)
        values, indices = ops.encode_topk(
            x,
            self.W_enc_rows * norm.unsqueeze(1),
            self.b_enc * norm,
            k,
            b_dec=self._input_bias(),
            compute_dtype=context.compute_dtype,
        )
        values = torch.where(values > 0, values / norm[indices.long()], 0)
        return SparseActs(values, indices, None, self.d_sae)

    @property
    def folds_norms(self) -> bool:
        """See `SAE.folds_norms`: where selection looks at what folding gives."""
        return self.select_by_decoder_norm

    def encode_for_training(self, x: Tensor, context: StepContext) -> SparseActs:
        """See `SAE.encode_for_training`: with `multi_topk` the wider code, of which `loss_of` takes
        the k largest."""
        if not self.multi_topk:
            return self._encode(x, context)
        return self._largest(x, min(4 * self.k, self.d_sae), context)

    def _parted(self, wide: SparseActs) -> tuple[SparseActs, SparseActs]:
        """Return the k largest latents of each token of a code, and the others."""
        size = wide.values.detach()
        if self.absolute:
            size = size.abs()
        elif self.select_by_decoder_norm:
            norm = torch.linalg.vector_norm(self.W_dec.detach(), dim=1)
            size = size * norm[wide.indices.long()]
        places = ops.topk(size, self.k).indices.long()
        narrow = SparseActs(
            wide.values.gather(1, places), wide.indices.gather(1, places), None, self.d_sae
        )
        rest = wide.values.scatter(1, places, 0.0)
        return narrow, SparseActs(rest, wide.indices, None, self.d_sae)

    def _written(self, acts: SparseActs) -> Tensor:
        """Return what latents write, without b_dec: [n, d_out]."""
        return ops.sparse_decode(acts, self.W_dec)

    def loss_of(
        self,
        x: Tensor,
        target: Tensor,
        acts: SparseActs,
        dead: LatentRows | None,
        context: StepContext,
    ) -> SAEOutput:
        """See `SAE.loss_of`."""
        if not self.multi_topk:
            return super().loss_of(x, target, acts, dead, context)
        acts, rest = self._parted(acts)
        x_hat = self.reconstruct(x, acts)
        out = total_loss(self, x, target, acts, x_hat, None, dead)
        squared = squared_error(target, x_hat + self._written(rest))
        out.loss = out.loss + fvu(squared, target) / 8
        return out

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        own = ("k", "absolute", "multi_topk", "select_by_decoder_norm")
        return {**super().config(), **{key: getattr(self, key) for key in own}}
