"""AuxK: dead latents reconstruct the residual, on a compact copy of their rows.

Source: Gao et al. 2024 (arXiv 2406.04093), appendix A.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.loss import unexplained_residual
from fastsae.types import SparseActs

DENSE_UP_TO = 1.5
"""Dead latents per selected one up to which dense products are cheaper than gathering rows. On 2
cores of Zen 5 (d 768, k 512, 1,024 tokens) 500 dead latents took 22 ms a step against 35, and 1,000
already 74 against 66, because torch's float32 product reaches a third of the peak."""


class LatentRows(NamedTuple):
    """The parameters of some latents: copies, connected to them by the graph if there is one."""

    latents: Tensor
    """[e] int64, ascending"""
    W_enc: Tensor
    """[e, d_in]"""
    W_dec: Tensor
    """[e, d_in]"""
    b_enc: Tensor
    """[e]"""


def auxk_loss(
    x: Tensor, b_dec: Tensor | None, residual: Tensor, rows: LatentRows, k: int
) -> Tensor:
    """Return how badly the k largest of `rows` reconstruct `residual: [n, d_in]`, without a bias.

    Args:
        x: [n, d_in], what was encoded.
        b_dec: [d_in] or None, subtracted from x first.
        residual: [n, d_in], without a graph.
        rows: the dead latents.
        k: latents per token, at most as many as there are rows.

    Cost: 2 n e d_in flops for the encoder; then products of [n, e] and [e, d_in], dense as long as
    that is cheaper than gathering k rows of d_in per token.
    """
    count = rows.latents.shape[0]
    if count > DENSE_UP_TO * k:
        top = ops.encode_topk(x, rows.W_enc, rows.b_enc, k, b_dec=b_dec)
        guess = ops.sparse_decode(SparseActs(*top, None, count), rows.W_dec)
    else:
        pre = torch.addmm(rows.b_enc, x if b_dec is None else x - b_dec, rows.W_enc.t())
        if k < count:
            kept = torch.zeros_like(pre, dtype=torch.bool)
            kept.scatter_(1, ops.topk(pre.detach(), k).indices.long(), True)
            pre = pre.where(kept, 0)
        guess = pre.relu() @ rows.W_dec
    return unexplained_residual(guess, residual)
