"""GroupMax sparse autoencoder: one latent out of each of k groups.

Source: the activation `groupmax` of EleutherAI's sparsify; winner-take-all within modules.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastsae import ops
from fastsae.nn.check import is_whole
from fastsae.nn.context import STEP, StepContext
from fastsae.nn.sae import SAE
from fastsae.types import SparseActs


class GroupMaxSAE(SAE):
    """Sparse autoencoder whose latents are in k groups of equal size, the largest of each active.

        f_j = relu(z_j) where z_j is the largest of its group, else 0
        z   = (x - b_dec) W_enc + b_enc,   group g holds latents g d_sae / k ... (g + 1) d_sae / k

    The same L0 as TopK for k maxima instead of a selection among d_sae, but a token cannot use two
    latents of a group. The lowest index wins ties; NaN wins over everything. See `SAE` for the
    other arguments.

    Args:
        d_in: width of the activations.
        d_sae: number of latents, a multiple of k.
        k: number of groups.

    Raises:
        ValueError: k is not an integer that divides d_sae.
    """

    def __init__(self, d_in: int, d_sae: int, k: int, **kwargs: Any) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        if not is_whole(k) or not 1 <= k <= d_sae or d_sae % k:
            self._fail(f"k to be an integer that divides d_sae = {d_sae}, got k = {k}")
        self.k = int(k)

    def _encode(self, x: Tensor, context: StepContext = STEP) -> SparseActs:
        values, indices = ops.encode_group_max(
            x,
            self.W_enc_rows,
            self.b_enc,
            self.k,
            b_dec=self._input_bias(),
            compute_dtype=context.compute_dtype,
        )
        return SparseActs(values, indices, None, self.d_sae)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments that `fastsae.load` rebuilds this module from."""
        return {**super().config(), "k": self.k}
