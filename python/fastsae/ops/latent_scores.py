"""How much each latent matters to a batch: a statistic of every column of the pre-activations."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _check, _encode, _flops, _vmap
from fastsae.types import LatentScores, accumulator_dtype

CHUNK_BYTES = 1 << 26
"""Pre-activations that are held at a time where there is no kernel."""


def latent_scores(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: float,
    *,
    score: str = "l2",
    b_dec: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> LatentScores:
    """Return a score of every column of `a = relu((x - b_dec) W_enc^T + b_enc)`, over all rows.

        l2:       s_j = sqrt(sum_i a_ij^2)
        entropy:  s_j = -sum_i p_ij log p_ij,   p_ij = a_ij / sum_i a_ij;   -inf if that sum is 0

    The threshold of BatchTopK comes along, from the same pass.

    Args:
        x: [..., d_in], float32 | float64 | bfloat16 | float16; leading dimensions are rows.
        W_enc: [d_sae, d_in], the dtype of `x`; one row per latent, contiguous.
        b_enc: [d_sae] or None.
        k: entries per row that BatchTopK would keep on average; may be fractional.
        score: `l2` or `entropy`.
        b_dec: [d_in] or None, subtracted from `x` first.
        compute_dtype: as in `encode_topk`.

    Returns:
        `LatentScores(scores [d_sae], threshold [])`, float32 (float64 for float64): threshold is
        what `encode_batch_topk` returns as such.

    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ.
        ValueError: a shape, a device, `k` or `score` is not as stated.
        RuntimeError: in `torch.jit.trace`, which would fix the number of entries.

    Gradients:
        None: scores are for choosing.

    Numerics:
        Pre-activations as in `encode_topk`, also for few rows. Sums over rows are in one order for
        any number of threads, and in float64 over blocks of 512 rows.

    Cost:
        2 n d_in d_sae flops; nothing of size [n, d_sae] is held on the CPU. Elsewhere torch's
        matmul, 64 MiB of its result at a time, and `encode_batch_topk`.

    Source:
        Oozeer et al., "Distribution-aware feature selection for SAEs" (arXiv 2508.21324).
    """
    op = "latent_scores"
    if score not in ("l2", "entropy"):
        raise ValueError(f"{op}: expected score to be l2 or entropy, got {score!r}")
    a = _encode.check(op, x, W_enc, b_enc, b_dec, None, None, compute_dtype)
    budget = _check.budget(op, k, a.x.shape[0], W_enc.shape[0])
    biases = (None if b is None else b.detach() for b in (a.b_enc, a.b_dec))
    return LatentScores(
        *torch.ops.fastsae.latent_scores(
            a.x.detach(), a.W_enc.detach(), *biases, score == "entropy", budget, a.bf16_product
        )
    )


@fake("latent_scores")
def _fake(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    entropy: bool,
    budget: int,
    bf16_product: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulator_dtype(x.dtype)
    return x.new_empty(W_enc.shape[0], dtype=dtype), x.new_empty((), dtype=dtype)


@fallback("latent_scores", slow=False)
def _plain(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    entropy: bool,
    budget: int,
    bf16_product: bool,
) -> tuple[Tensor, Tensor]:
    score = "entropy" if entropy else "l2"
    width = max(64, CHUNK_BYTES // max(1, x.shape[0] * accumulator_dtype(x.dtype).itemsize))
    biases = [None] * len(W_enc) if b_enc is None else b_enc.split(width)
    parts = [
        reference.latent_scores(x, W, b, 0, score=score, b_dec=b_dec).scores
        for W, b in zip(W_enc.split(width), biases, strict=False)
    ]
    threshold = torch.ops.fastsae.encode_batch_topk(
        x, W_enc, b_enc, b_dec, budget, None, bf16_product, None
    )[3]
    return torch.cat(parts), threshold


_vmap.register("latent_scores")
_flops.register("latent_scores", _flops.encode)
