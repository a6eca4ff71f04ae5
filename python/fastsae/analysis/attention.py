"""Attention SAEs: which heads, source tokens and upstream latents a latent comes from.

Such an SAE reads the heads of one layer side by side, before W_O (the site `attn_z.L`):

    x = concat_h z_h [.., n_heads d_head],   z_h[dst] = sum_src A_h[dst, src] v_h[src]
    pre-activation = (x - b_dec) W_enc + b_enc

Both sums are linear: with the pattern A as it came out, a pre-activation splits exactly over heads
and sources, and with the norm before the layer frozen also over what wrote the residual stream.
Attribution is for one text; dst may be any selection of its positions, such as the last one.
Nothing of size [src, h, d_head, m, dst] exists: a head is reduced to one number per latent and
source before the pattern spreads it over dst.

Source: Kissane et al. 2024, "Interpreting attention layer outputs with sparse autoencoders" (arXiv
2406.17759): weight-based head attribution, direct feature attribution by source position (DFA) and
its recursion through the residual stream (RDFA).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.nn import SAE
from fastsae.nn.loss import upcast


@torch.no_grad()
def head_attribution(sae: SAE, n_heads: int) -> Tensor:
    """Return the share of every head in the decoder row of every latent.

        share[f, h] = |W_dec[f, block h]| / sum_i |W_dec[f, block i]|       (norms, not squares)

    Args:
        sae: reads `[.., n_heads d_head]`.
        n_heads: heads side by side in its input.

    Returns:
        `[d_sae, n_heads]`, float32 (float64 for a float64 SAE). Rows sum to 1; those of a decoder
        row of zeros are 0.

    Raises:
        ValueError: n_heads does not divide d_in.
    """
    if n_heads < 1 or sae.d_in % n_heads:
        raise ValueError(
            f"head_attribution: expected n_heads to divide d_in = {sae.d_in}, got {n_heads}"
        )
    blocks = upcast(sae.W_dec).view(sae.d_sae, n_heads, -1)
    norm: Tensor = torch.linalg.vector_norm(blocks, dim=2)
    total = norm.sum(1, keepdim=True)
    return norm / torch.where(total > 0, total, 1.0)


@torch.no_grad()
def source_attribution(
    sae: SAE, latents: Tensor, pattern: Tensor, values: Tensor, *, by_head: bool = False
) -> Tensor:
    """Return how much every source token adds to the pre-activation of latents (DFA).

        dfa[f, dst, src] = sum_h A_h[dst, src] (v_h[src] . W_enc[block h, f])
        sum_src dfa[f, dst, src] + b_enc[f] - b_dec . W_enc[:, f] = pre-activation of f at dst

    With grouped queries head i reads the values of head i // (h / kv_heads).

    Args:
        sae: reads `[.., h d_head]`.
        latents: int64 `[m]`.
        pattern: A, `[h, dst, src]`, after the softmax.
        values: v, `[src, kv_heads, d_head]` with the bias of W_V; kv_heads divides h.
        by_head: keep the heads apart instead of adding them.

    Returns:
        `[m, dst, src]`, or `[m, h, dst, src]` by head; float32 (float64 for a float64 SAE).

    Raises:
        TypeError: latents are not int64.
        ValueError: a shape or device does not fit, or a latent is outside 0..d_sae - 1.

    Cost: 2 src d_in m + 2 h dst src m flops; beside the result [h, m, src] and W_enc[:, latents].
    """
    owner = "source_attribution"
    _check_latents(owner, "latents", latents, sae)
    _check(owner, "pattern", pattern, sae, h=None, dst=None, src=None)
    heads, _, src = pattern.shape
    _check(owner, "values", values, sae, src=src, kv_heads=None, d_head=None)
    blocks = _blocks(owner, sae, latents, heads, *values.shape[1:])
    pattern, values = pattern.to(blocks.dtype), values.to(blocks.dtype)
    c = torch.einsum("skd,kgdm->kgms", values, blocks).flatten(0, 1)
    if by_head:
        return c.transpose(0, 1).unsqueeze(2) * pattern
    return torch.einsum("hms,hts->mts", c, pattern)


@torch.no_grad()
def recursive_attribution(
    sae: SAE,
    latent: int,
    upstream: SAE,
    upstream_latents: Tensor,
    upstream_acts: Tensor,
    pattern: Tensor,
    W_V: Tensor,
    ln_scale: Tensor,
) -> Tensor:
    """Return how much upstream latents of every source token add to the pre-activation of a latent.

        rdfa[j, dst, src] = sum_h A_h[dst, src] act_j[src] (W_dec_up[j] / ln_scale[src]) W_V^h
                            . W_enc[block h, f]

    This is DFA with each value written as what latents put into the residual stream. The rest of
    `source_attribution` belongs to the upstream SAE's b_dec and error, to latents that are not
    asked for, and to the biases of the norm and of W_V.

    Args:
        sae: reads `[.., h d_head]`.
        latent: f, the one to explain.
        upstream: an SAE of the residual stream that the layer reads, `[.., d_model]`.
        upstream_latents: int64 `[m]`.
        upstream_acts: their activations, `[src, m]`: `upstream.encode(x)[:, upstream_latents]`.
        pattern: A, `[h, dst, src]`, after the softmax.
        W_V: `[kv_heads, d_model, d_head]`, after the norm is folded in: diag(gain) W_V, and for a
            LayerNorm (I - 11^T / d_model) diag(gain) W_V, which centres what it is applied to.
        ln_scale: `[src]`, what the norm divided the residual by: its root mean square, for a
            LayerNorm that of the centred residual.

    Returns:
        `[m, dst, src]`, float32 (float64 for a float64 SAE).

    Raises:
        TypeError: upstream_latents are not int64.
        ValueError: a shape or device does not fit, or a latent is outside 0..d_sae - 1.

    Cost: 2 d_model d_in + 2 m h (d_model + dst src) flops; beside the result [h, d_model].
    """
    owner = "recursive_attribution"
    one = torch.tensor([latent], device=sae.W_enc.device)
    _check_latents(owner, "latent", one, sae)
    _check_latents(owner, "upstream_latents", upstream_latents, upstream)
    _check(owner, "pattern", pattern, sae, h=None, dst=None, src=None)
    heads, _, src = pattern.shape
    _check(owner, "W_V", W_V, sae, kv_heads=None, d_model=upstream.d_in, d_head=None)
    _check(owner, "upstream_acts", upstream_acts, sae, src=src, m=len(upstream_latents))
    _check(owner, "ln_scale", ln_scale, sae, src=src)
    blocks = _blocks(owner, sae, one, heads, W_V.shape[0], W_V.shape[2])
    dtype = blocks.dtype
    read = torch.einsum("ked,kgdm->kge", W_V.to(dtype), blocks).flatten(0, 1)
    weight = upstream.W_dec[upstream_latents].to(read) @ read.t()
    scaled = upstream_acts.to(dtype) / ln_scale.to(dtype).unsqueeze(1)
    return torch.einsum("mh,hts->mts", weight, pattern.to(dtype)).mul_(scaled.t().unsqueeze(1))


def _blocks(
    owner: str, sae: SAE, latents: Tensor, heads: int, kv_heads: int, d_head: int
) -> Tensor:
    """Return W_enc[:, latents] by head, `[kv_heads, h / kv_heads, d_head, m]`, to compute with."""
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{owner}: expected kv_heads to divide h = {heads}, got {kv_heads}")
    if heads * d_head != sae.d_in:
        raise ValueError(
            f"{owner}: expected h d_head = d_in = {sae.d_in}, got h = {heads} and d_head = {d_head}"
        )
    rows = upcast(sae.W_enc.t()[latents])
    return rows.t().view(kv_heads, heads // kv_heads, d_head, len(latents))


def _check_latents(owner: str, name: str, latents: Tensor, sae: SAE) -> None:
    _check(owner, name, latents, sae, m=None)
    if latents.dtype != torch.int64:
        raise TypeError(f"{owner}: expected {name} to be int64, got {latents.dtype}")
    outside = latents[(latents < 0) | (latents >= sae.d_sae)]
    if len(outside):
        raise ValueError(f"{owner}: expected {name} in 0..{sae.d_sae - 1}, got {int(outside[0])}")


def _check(owner: str, name: str, x: Tensor, sae: SAE, **sizes: int | None) -> None:
    """Raise ValueError unless `x` has the named sizes, None for any, on the device of `sae`."""
    fits = x.ndim == len(sizes) and all(
        size in (None, got) for size, got in zip(sizes.values(), x.shape, strict=True)
    )
    if not fits:
        fixed = " and ".join(f"{k} = {size}" for k, size in sizes.items() if size is not None)
        raise ValueError(
            f"{owner}: expected {name} to be [{', '.join(sizes)}]{' with ' * bool(fixed)}{fixed}, "
            f"got {[*x.shape]}"
        )
    if x.device != sae.W_enc.device:
        raise ValueError(
            f"{owner}: expected {name} on {sae.W_enc.device} like the SAE, got {x.device}"
        )
