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
from fastsae.ops._dense import plain
from fastsae.ops._encode import attach, attachable
from fastsae.ops._matmul import matmul
from fastsae.types import SparseActs

DENSE_UP_TO = 4
"""Dead latents per selected one up to which dense matmuls are cheaper than gathering rows. On two
threads of Zen 4 (d 576, k 256, 1,024 tokens, ms of the loss and its gradients): 20 against 29 of
512 dead latents, 39 against 44 of 1,024, 79 against 47 of 2,048."""


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

    Cost: 2 n e d_in flops for the encoder, and where e <= DENSE_UP_TO k each of the four products
    after it; otherwise k rows of d_in per token for these.
    """
    if rows.mask is not None:
        return _masked_loss(x, error, rows, rows.mask, k)
    count = rows.W_enc.shape[0] if rows.total is None else rows.total
    k = min(k, count)
    acts = _dense_code(x, rows, k) if count <= DENSE_UP_TO * k and parallel.is_alone else None
    if acts is None:
        acts = parallel.encode_topk(x, rows.W_enc, rows.b_enc, k, b_dec=rows.input_bias)
    prediction = parallel.sparse_decode(acts, rows.W_dec)
    return fvu_of_error(prediction, error, parallel)


def _dense_code(x: Tensor, rows: LatentRows, k: int) -> SparseActs | None:
    """Return the code of the k largest of `rows` with an entry for each of them, those that are not
    selected 0; None where such codes are not multiplied by dense matmuls, see `ops._dense`."""
    bias = rows.input_bias
    given = [t for t in (x, rows.W_enc, rows.b_enc, bias) if t is not None]
    if not plain(given) or not attachable(x, rows.W_enc, rows.b_enc, bias):
        return None
    with torch.no_grad():
        centered = x if bias is None else x - bias
        code = matmul(centered, rows.W_enc.t(), rows.b_enc, relu=True)
        if k < code.shape[1]:
            top = ops.topk(code, k)
            code = torch.zeros_like(code).scatter_(1, top.indices.long(), top.values)
    return attach(SparseActs.full(code), x, rows.W_enc, rows.b_enc, bias)


def _masked_loss(x: Tensor, error: Tensor, rows: LatentRows, mask: Tensor, k: int) -> Tensor:
    """Return the same of the rows in a mask: no shape depends on how many these are."""
    top = ops.encode_topk(x, rows.W_enc, rows.b_enc, k, b_dec=rows.input_bias, mask=mask)
    prediction = ops.sparse_decode(SparseActs(*top, None, mask.shape[0]), rows.W_dec)
    return torch.where(mask.any(), fvu_of_error(prediction, error), 0.0)
