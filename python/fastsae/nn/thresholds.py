"""What SAEs have in common that keep what is above a threshold at inference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsae import ops


def threshold_room(n: int, d_sae: int, k: float) -> int:
    """Return the places that the code of n tokens gets before its size is known.

    Small inputs get room for every latent; large ones for 8 times the expected count, beyond which
    the largest values are kept.
    """
    return min(n * d_sae, max(n * max(8 * math.ceil(k), 256), 1 << 22))


def factor_for_k(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, theta: Tensor, k: float
) -> Tensor:
    """Return the factor `[]` on thresholds with which `x` keeps k latents per token; inf if none.

        z_j > c theta_j  is  z_j / theta_j > c,  so c is the smallest of the k n largest ratios

    Args:
        x: [n, d_in].
        W_enc: [d_sae, d_in].
        b_enc: [d_sae].
        b_dec: [d_in] or None.
        theta: [d_sae], thresholds >= 0.
        k: wanted mean active latents per token.
    """
    theta = theta.clamp_min(torch.finfo(theta.dtype).tiny ** 0.5).to(b_enc.dtype)
    rows = W_enc / theta.unsqueeze(1)
    return ops.encode_batch_topk(x, rows, b_enc / theta, k, b_dec=b_dec).threshold
