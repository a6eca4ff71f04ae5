"""Gradient pursuit: search the sparse code of a token in the decoder, without the encoder.

    r     = x - b_dec - w W_dec                 what is still unexplained
    S     = {w > 0} and argmax_j <r, d_j>, if that is > 0;   d_j are the rows of W_dec
    g_j   = <r, d_j> for j in S, else 0
    w     = max(0, w + alpha g),   alpha = <c, r> / <c, c>,   c = g W_dec

It shows how much of an SAE's error is the encoder's: the dictionary and the number of latents stay,
but the code is optimized for the token.

Source: Blumensath and Davies 2008, "Gradient pursuits"; the non-negative form for SAEs is that of
Engels et al. 2024, "Decomposing the dark matter of sparse autoencoders" (arXiv 2410.14670).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.check import check_rows
from fastsae.nn.sae import SAE
from fastsae.types import SparseActs


@torch.no_grad()
def gradient_pursuit(sae: SAE, x: Tensor, k: int | Tensor) -> SparseActs:
    """Return non-negative codes of `x` in the dictionary of `sae`, found in k steps each.

    A step adds the latent with the largest inner product with the residual, which is not divided by
    the norm of the row, and moves all weights along the gradient as far as is best on that line.
    The latent may be one that the token has already; where no inner product is positive, none is
    added, and the step goes on with those that are there (in the paper's code the best latent is
    included in the step whatever its sign). Weights that would become negative are 0 and leave the
    support, so a code has at most k latents, often fewer.

    Args:
        sae: gives W_dec and b_dec, float32 | float64; rows of W_dec of norm 1, as training leaves
            them.
        x: [..., d_in] in the dtype and on the device of the parameters: what is reconstructed.
        k: steps, 0 <= k <= d_sae: an int for all tokens, or integers [n] for each of the n tokens,
            such as `sae.encode_sparse(x).row_counts()`.

    Returns:
        Codes in the fixed layout [n, max k], in the dtype of x and without a graph, so that
        `sae.decode` gives the reconstructions [n, d_in]. The latents of a token are in no order;
        unused places have index 0 and value 0.

    Raises:
        TypeError: x or k is not of the stated type or dtype, or the parameters are 16-bit.
        ValueError: a shape or a device does not fit, or k is out of range.

    Numerics: the residual is computed anew in every step. A row with NaN gets the empty code.
    Cost: one matmul like the encoder's per step, for the tokens that have steps left, without
    [n, d_sae]: 2 d_in d_sae flops per token and step. Three sparse matmuls gather at most k rows
    of W_dec per token each.
    Source: Blumensath and Davies 2008; Engels et al. 2024.
    """
    x = check_rows("gradient_pursuit", x, "x", like=sae.W_dec)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"gradient_pursuit: expected parameters in float32 or float64, got {x.dtype}"
        )
    # Tokens with the most steps come first: those that still run are the first rows.
    steps, order = _steps(k, x, sae.d_sae).sort(descending=True, stable=True)
    goal = (x - sae.b_dec)[order]
    most = int(steps[0]) if len(steps) else 0
    weights = x.new_zeros(len(steps), most)
    indices = torch.zeros_like(weights, dtype=torch.int32)
    running = steps.unsqueeze(1) > torch.arange(most, device=x.device)
    for m in running.sum(0).tolist():
        _step(goal[:m], weights[:m], indices[:m], sae.W_dec)
    indices.masked_fill_(weights == 0, 0)
    back = order.argsort()
    return SparseActs(weights[back], indices[back], None, sae.d_sae)


def _steps(k: int | Tensor, x: Tensor, d_sae: int) -> Tensor:
    """Return the number of steps of every row of `x`: int64 [n]."""
    n = x.shape[0]
    if isinstance(k, Tensor):
        if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
            raise TypeError(f"gradient_pursuit: expected k to hold integers, got {k.dtype}")
        if k.shape != (n,):
            raise ValueError(
                f"gradient_pursuit: expected k to be [n] with n = {n}, got {[*k.shape]}"
            )
        if k.device != x.device:
            raise ValueError(
                f"gradient_pursuit: expected k on the device of x, {x.device}, got {k.device}"
            )
    elif not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(
            f"gradient_pursuit: expected k to be an int or a Tensor, got {type(k).__name__}"
        )
    steps = torch.as_tensor(k, dtype=torch.int64, device=x.device)
    lowest, highest = torch.aminmax(steps) if steps.numel() else (0, 0)
    if lowest < 0 or highest > d_sae:
        got = int(lowest if lowest < 0 else highest)
        raise ValueError(f"gradient_pursuit: expected 0 <= k <= d_sae = {d_sae}, got k = {got}")
    return steps.expand(n)


def _step(goal: Tensor, weights: Tensor, indices: Tensor, W_dec: Tensor) -> None:
    """Do one step on the codes `weights, indices: [m, K]` of `goal: [m, d_in]`, in place.

    Entries of weight 0 are free places. There is one as long as fewer than K steps are done.
    """

    def decode(values: Tensor) -> Tensor:
        return ops.sparse_decode(SparseActs(values, indices, None, W_dec.shape[0]), W_dec)

    residual = goal - decode(weights)
    best = ops.encode_topk(residual, W_dec, None, 1)
    held = weights > 0
    new = (best.values > 0) & ~(held & (indices == best.indices)).any(1, keepdim=True)
    free = held.int().argmin(1, keepdim=True)
    indices.scatter_(1, free, torch.where(new, best.indices, indices.gather(1, free)))
    support = held.scatter(1, free, new)
    on_support = SparseActs(support.to(goal.dtype), indices, None, W_dec.shape[0])
    gradient = ops.sparse_decode_values_grad(residual, on_support, W_dec)
    # <c, r> = |g|^2, which is never negative.
    along, length = (t.square().sum(1, keepdim=True) for t in (gradient, decode(gradient)))
    alpha = torch.where(length > 0, along / length, 0)
    weights.add_(alpha * gradient).clamp_min_(0)
