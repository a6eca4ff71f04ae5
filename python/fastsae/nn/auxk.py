"""AuxK: dead latents reconstruct the residual, on a compact copy of their rows.

Source: Gao et al. 2024 (arXiv 2406.04093), appendix A.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.loss import fvu_of_error
from fastsae.nn.parallel import ALONE, Parallel
from fastsae.types import SparseActs

DENSE_UP_TO = 1.5
"""Dead latents per selected one up to which dense matmuls are cheaper than gathering rows. On 2
cores of Zen 5 (d 768, k 512, 1,024 tokens) 500 dead latents took 22 ms a step against 35, and 1,000
already 74 against 66, because torch's float32 matmul reaches a third of the peak."""


class LatentRows(NamedTuple):
    """The parameters of some latents: copies, connected to them by the graph if there is one."""

    latents: Tensor | None
    """[e] int64, different ones; None: all latents."""
    W_enc: Tensor
    """[e, d_in]"""
    W_dec: Tensor
    """[e, d_in]"""
    b_enc: Tensor
    """[e]"""
    input_bias: Tensor | None
    """[d_in] or None, subtracted from x first."""
    mask: Tensor | None = None
    """bool [e]: which of them count; None: all. The others get gradient 0."""
    total: int | None = None
    """How many there are with those of other processes; None: these."""


def auxk_loss(
    x: Tensor, error: Tensor, rows: LatentRows, k: int, parallel: Parallel = ALONE
) -> Tensor:
    """Return how badly the k largest of `rows` reconstruct the residual -error, without a bias.

    Args:
        x: [n, d_in], what was encoded.
        error: [n, d_in], reconstruction - target, without a graph.
        rows: the dead latents.
        k: latents per token at most.
        parallel: who else has dead latents and tokens.

    Cost: 2 n e d_in flops for the encoder; then matmuls of [n, e] and [e, d_in], dense as long as
    that is cheaper than gathering k rows of d_in per token.
    """
    if rows.mask is not None:
        return _masked_loss(x, error, rows, rows.mask, k)
    count = rows.W_enc.shape[0] if rows.total is None else rows.total
    k = min(k, count)
    if count > DENSE_UP_TO * k or not parallel.is_alone:
        acts = parallel.encode_topk(x, rows.W_enc, rows.b_enc, k, b_dec=rows.input_bias)
        prediction = parallel.sparse_decode(acts, rows.W_dec)
    else:
        centered = x if rows.input_bias is None else x - rows.input_bias
        pre = torch.addmm(rows.b_enc, centered, rows.W_enc.t())
        if k < count:
            kept = torch.zeros_like(pre, dtype=torch.bool)
            kept.scatter_(1, ops.topk(pre.detach(), k).indices.long(), True)
            pre = pre.where(kept, 0)
        prediction = pre.relu() @ rows.W_dec
    return fvu_of_error(prediction, error, parallel)


def _masked_loss(x: Tensor, error: Tensor, rows: LatentRows, mask: Tensor, k: int) -> Tensor:
    """Return the same of the rows in a mask: no shape depends on how many these are."""
    top = ops.encode_topk(x, rows.W_enc, rows.b_enc, k, b_dec=rows.input_bias, mask=mask)
    prediction = ops.sparse_decode(SparseActs(*top, None, mask.shape[0]), rows.W_dec)
    return torch.where(mask.any(), fvu_of_error(prediction, error), 0.0)
