"""Circuits of latents: which upstream latents a latent of a transcoder or an SAE is read from.

    x = (sum_j f_j W_dec_up[j] + r) / scale
    pre-activation of i = (x - bias) . w + b_enc[i],    w = W_enc[:, i]
                        = sum_j f_j (W_dec_up[j] . w) / scale + r . w / scale - bias . w + b_enc[i]

f are the activations of an upstream SAE or transcoder that writes where x is read, r is what else
is there: its b_dec, its error, other layers. `bias` is what the coder subtracts from its input:
b_dec, or nothing for a transcoder. W_dec_up[j] . w is the same for every input, the connection of
two latents; times f_j it is the attribution of one token.

A norm in between is frozen: its divisor is `scale`, one number per token, and its gain belongs in
the coder, W_enc <- diag(gain) W_enc, for a LayerNorm (I - 11^T / d) diag(gain) W_enc. The paper
puts all of it in one number for each latent and token, scale = (resid . w) / (norm(resid) . w).

Source: Dunefsky et al. 2024, "Transcoders find interpretable LLM feature circuits" (arXiv
2406.11944).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae.nn import SAE
from fastsae.nn.loss import upcast
from fastsae.types import SparseActs


@torch.no_grad()
def connections(upstream: SAE, coder: SAE, latents: Tensor) -> Tensor:
    """Return how strongly every upstream latent writes what latents of `coder` read.

        weight[a, j] = W_enc[:, latents[a]] . W_dec_up[j]

    Args:
        upstream: writes `[.., d_in]`: an SAE of the coder's input, or a transcoder to it.
        coder: reads `[.., d_in]`.
        latents: int64 `[m]`, latents of the coder.

    Returns:
        `[m, upstream.d_sae]`, float32 (float64 for float64).

    Raises:
        TypeError: latents are not int64.
        ValueError: a width, shape or device does not fit, or a latent is outside 0..d_sae - 1.
    """
    return _connections("connections", upstream, coder, latents)


@torch.no_grad()
def latent_attribution(
    upstream: SAE, acts: SparseActs, coder: SAE, latent: int, scale: Tensor | None = None
) -> SparseActs:
    """Return what every active upstream latent of a token adds to a latent's pre-activation.

        attribution[t, j] = f_j[t] (W_dec_up[j] . W_enc[:, latent]) / scale[t]

    A row's entries add up, exactly, to the pre-activation with

        r . w / scale + b_enc[latent]   (- b_dec . w, unless the coder is a transcoder)

    where w = W_enc[:, latent] and r is what the coder's input holds beside the upstream latents,
    before it is divided by scale: upstream's b_dec, its error, and other layers.

    Args:
        upstream: writes `[.., d_in]`: an SAE of the coder's input, or a transcoder to it.
        acts: f, its code of n tokens.
        coder: reads `[.., d_in]`; a norm's gain is folded into its W_enc.
        latent: the one to explain.
        scale: `[n]`, what a norm between the two divided each token by; None for no norm.

    Returns:
        The entries of acts with other values, in the same places; float32 (float64 for float64).

    Raises:
        ValueError: a width, shape or device does not fit, or a latent is outside 0..d_sae - 1.

    Cost: 2 d_in upstream.d_sae flops, whatever the number of tokens.
    """
    owner = "latent_attribution"
    device = coder.W_enc.device
    if acts.d_sae != upstream.d_sae:
        raise ValueError(
            f"{owner}: expected acts to be [n, d_sae] with d_sae = {upstream.d_sae} like upstream, "
            f"got {[*acts.shape]}"
        )
    if scale is not None and scale.shape != (acts.n,):
        raise ValueError(
            f"{owner}: expected scale to be [n] with n = {acts.n}, got {[*scale.shape]}"
        )
    for name, x in (("acts", acts.values), ("scale", scale)):
        if x is not None and x.device != device:
            raise ValueError(f"{owner}: expected {name} on {device} like the coder, got {x.device}")
    weight = _connections(owner, upstream, coder, torch.tensor([latent], device=device))[0]
    return weighed(acts, weight, scale)


def weighed(acts: SparseActs, weight: Tensor, scale: Tensor | None) -> SparseActs:
    """Return a code times `weight: [d_sae]`, over the `scale: [n]` of each token."""
    values = acts.values.to(weight.dtype) * weight[acts.indices.long()]
    if scale is not None:
        values /= F.pad(scale.to(values.dtype), (0, 1), value=1.0)[acts.rows()]  # 1 for padding
    return SparseActs(values, acts.indices, acts.offsets, acts.d_sae)


def _connections(owner: str, upstream: SAE, coder: SAE, latents: Tensor) -> Tensor:
    width = upstream.W_dec.shape[1]
    if width != coder.d_in:
        raise ValueError(
            f"{owner}: expected upstream to write d_in = {coder.d_in} numbers, got {width}"
        )
    if latents.ndim != 1:
        raise ValueError(f"{owner}: expected latents to be [m], got {[*latents.shape]}")
    if latents.dtype != torch.int64:
        raise TypeError(f"{owner}: expected latents to be int64, got {latents.dtype}")
    for name, x in (("upstream", upstream.W_dec), ("latents", latents)):
        if x.device != coder.W_enc.device:
            raise ValueError(
                f"{owner}: expected {name} on {coder.W_enc.device} like the coder, got {x.device}"
            )
    outside = latents[(latents < 0) | (latents >= coder.d_sae)]
    if len(outside):
        raise ValueError(
            f"{owner}: expected a latent in 0..{coder.d_sae - 1}, got {int(outside[0])}"
        )
    read, written = upcast(coder.W_enc.t()[latents]), upcast(upstream.W_dec)
    dtype = torch.promote_types(read.dtype, written.dtype)
    return read.to(dtype) @ written.to(dtype).t()
