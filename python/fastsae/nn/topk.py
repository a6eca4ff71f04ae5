"""TopK sparse autoencoder: every token keeps its k largest latents.

Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), eq. 2-3.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastsae import ops
from fastsae.nn.auxk import LatentRows
from fastsae.nn.loss import SAEOutput, accumulate, unexplained
from fastsae.nn.sae import SAE
from fastsae.ops import SparseActs


class TopKSAE(SAE):
    """Sparse autoencoder with exactly k latents per token (fewer where fewer are positive).

        f = relu(topk(z, k)),   z = (x - b_dec) W_enc + b_enc

    Selection is the same in training and inference. With `multi_topk` the loss also asks for a good
    reconstruction from 4 k latents, which keeps the code useful at other k:

        loss = fvu(k) + fvu(4 k) / 8 + aux_alpha * aux_loss

    See `SAE` for the other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: active latents per token.
        multi_topk: whether 4 k latents (at most d_sae) have to reconstruct as well (Gao et al.
            2024, section 5.2); costs a second encode and decode, and the fused update.

    Raises:
        ValueError: k is not an integer in 1..d_sae.
    """

    def __init__(
        self, d_in: int, d_sae: int, k: int, *, multi_topk: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        if int(k) != k or not 1 <= k <= d_sae:
            self._fail(f"k to be an integer in 1..d_sae = {d_sae}, got k = {k}")
        self.k, self.multi_topk = int(k), multi_topk
        # The gradients of the wider code do not follow from those of the code.
        self.feature_major_update = not multi_topk

    def _encode(self, x: Tensor) -> SparseActs:
        return self._largest(x, self.k)

    def loss_of(
        self, x: Tensor, target: Tensor, acts: SparseActs, dead: LatentRows | None
    ) -> SAEOutput:
        """See `SAE.loss_of`."""
        out = super().loss_of(x, target, acts, dead)
        if self.multi_topk:
            wide = self.decode(self._largest(x, min(4 * self.k, self.d_sae)))
            squared = (accumulate(target) - accumulate(wide)).square().sum()
            out.loss = out.loss + unexplained(squared, target) / 8
        return out

    def _largest(self, x: Tensor, k: int) -> SparseActs:
        top = ops.encode_topk(
            x,
            self._rows_enc(),
            self.b_enc,
            k,
            b_dec=self._input_bias(),
            compute_dtype=self._product(),
        )
        return SparseActs(*top, None, self.d_sae)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        return {**super().config(), "k": self.k, "multi_topk": self.multi_topk}

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return SAELens' `topk`, whose latents are not rescaled by decoder norms."""
        return {
            "architecture": "topk",
            "k": self.k,
            "rescale_acts_by_decoder_norm": False,
        }, {}
