"""TopK sparse autoencoder: every token keeps its k largest latents.

Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), eq. 2-3.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastsae import ops
from fastsae.nn.sae import SAE
from fastsae.ops import SparseActs


class TopKSAE(SAE):
    """Sparse autoencoder with exactly k latents per token (fewer where fewer are positive).

        f = relu(topk(z, k)),   z = (x - b_dec) W_enc + b_enc

    Selection is the same in training and inference. See `SAE` for the other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: active latents per token.

    Raises:
        ValueError: k is not an integer in 1..d_sae.
    """

    feature_major_update = True

    def __init__(self, d_in: int, d_sae: int, k: int, **kwargs: Any) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        if int(k) != k or not 1 <= k <= d_sae:
            self._fail(f"k to be an integer in 1..d_sae = {d_sae}, got k = {k}")
        self.k = int(k)

    def _encode(self, x: Tensor) -> SparseActs:
        top = ops.encode_topk(
            x,
            self._rows_enc(),
            self.b_enc,
            self.k,
            b_dec=self.b_dec,
            compute_dtype=self._product(),
        )
        return SparseActs(*top, None, self.d_sae)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        return {**super().config(), "k": self.k}

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return SAELens' `topk`, whose latents are not rescaled by decoder norms."""
        return {
            "architecture": "topk",
            "k": self.k,
            "rescale_acts_by_decoder_norm": False,
        }, {}
