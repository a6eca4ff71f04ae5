"""Circuits of a cross-layer transcoder: what its latents read of what earlier ones write.

    x_m = (sum_(l <= j < m) f_l W_dec_(l -> j) + r) / scale
    pre-activation of latent a of layer m = x_m . w + b_enc_m[a],   w = W_enc_m[:, a]
        = sum_(l < m) sum_i f_l[i] V[i, a] / scale + r . w / scale + b_enc_m[a]
    V[i, a] = sum_(j = l .. m - 1) W_dec_(l -> j)[i] . w

x_m is the residual stream, to which the outputs of the layers before m are added; r is what else is
there: the embedding, attention, errors, and the b_dec of these layers. V[i, a], the virtual weight
of two latents along the residual stream, is the same for every input; times f_l[i] it is the
attribution of one token. Paths through attention are not part of it. A norm is frozen, as in
`analysis.circuits`: its divisor is `scale`, and its gain belongs in W_enc.

Source: Ameisen et al. 2025, "Circuit tracing: revealing computational graphs in language models",
Transformer Circuits, sections on attribution graphs and on virtual weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.analysis.circuits import weighed
from fastsae.nn.cross_layer_base import CrossLayerMixin
from fastsae.nn.loss import upcast
from fastsae.types import SparseActs


@torch.no_grad()
def virtual_weights(transcoder: CrossLayerMixin, layer: int, latents: Tensor) -> Tensor:
    """Return how strongly every latent writes what latents of `layer` read from the residual.

    Args:
        transcoder: whose x is the residual stream, and whose y is added to it.
        layer: of the latents that read.
        latents: int64 `[a]`, counted within that layer.

    Returns:
        `[a, d_sae]`, over the latents of all layers; 0 for those of `layer` and later ones, which
        it does not read. float32 (float64 for float64).

    Raises:
        TypeError: not a cross-layer transcoder, or latents are not int64.
        ValueError: no such layer or latent, another shape, or another device.

    Cost: 2 a d_model flops for each number of the decoders' rows before `layer`.
    """
    return _virtual_weights("virtual_weights", transcoder, layer, latents)


@torch.no_grad()
def cross_layer_attribution(
    transcoder: CrossLayerMixin,
    acts: SparseActs,
    layer: int,
    latent: int,
    scale: Tensor | None = None,
) -> SparseActs:
    """Return what every active latent of earlier layers adds to a latent's pre-activation.

        attribution[t, i] = f[t, i] V[i] / scale[t]

    with V[i] of `virtual_weights`. A row's entries add up, exactly, to the pre-activation with
    `r . w / scale + b_enc[latent]`.

    Args:
        transcoder: as in `virtual_weights`.
        acts: f, its code of n tokens.
        layer: of the latent to explain.
        latent: the one to explain, counted within that layer.
        scale: `[n]`, what a norm before the encoder divided each token by; None for no norm.

    Returns:
        The entries of acts with other values, in the same places; float32 (float64 for float64).

    Raises:
        TypeError: not a cross-layer transcoder.
        ValueError: no such layer or latent, or a shape or device does not fit.
    """
    owner = "cross_layer_attribution"
    _check(owner, transcoder)
    device = transcoder.b_enc.device
    if acts.d_sae != transcoder.d_sae:
        raise ValueError(
            f"{owner}: expected acts to be [n, d_sae] with d_sae = {transcoder.d_sae}, got "
            f"{[*acts.shape]}"
        )
    if scale is not None and scale.shape != (acts.n,):
        raise ValueError(
            f"{owner}: expected scale to be [n] with n = {acts.n}, got {[*scale.shape]}"
        )
    for name, x in (("acts", acts.values), ("scale", scale)):
        if x is not None and x.device != device:
            raise ValueError(f"{owner}: expected {name} on {device}, got {x.device}")
    one = torch.tensor([latent], device=device)
    weight = _virtual_weights(owner, transcoder, layer, one)[0]
    return weighed(acts, weight, scale)


def _check(owner: str, transcoder: CrossLayerMixin) -> None:
    if not isinstance(transcoder, CrossLayerMixin):
        raise TypeError(
            f"{owner}: expected a cross-layer transcoder, got {type(transcoder).__name__}"
        )


def _virtual_weights(
    owner: str, transcoder: CrossLayerMixin, layer: int, latents: Tensor
) -> Tensor:
    _check(owner, transcoder)
    size, n_layers = transcoder.d_transcoder, transcoder.n_layers
    device = transcoder.b_enc.device
    if not 0 <= layer < n_layers:
        raise ValueError(f"{owner}: expected a layer in 0..{n_layers - 1}, got {layer}")
    if latents.ndim != 1:
        raise ValueError(f"{owner}: expected latents to be [a], got {[*latents.shape]}")
    if latents.dtype != torch.int64:
        raise TypeError(f"{owner}: expected latents to be int64, got {latents.dtype}")
    if latents.device != device:
        raise ValueError(f"{owner}: expected latents on {device}, got {latents.device}")
    outside = latents[(latents < 0) | (latents >= size)]
    if len(outside):
        raise ValueError(f"{owner}: expected a latent in 0..{size - 1}, got {int(outside[0])}")
    read = upcast(transcoder.dictionaries[layer].W_enc[latents])
    found = read.new_zeros(len(latents), n_layers, size)
    for source in range(layer):
        found[:, source] = _read_of(transcoder, source, layer, read)
    return found.flatten(1)


def _read_of(transcoder: CrossLayerMixin, source: int, layer: int, read: Tensor) -> Tensor:
    """Return the product `[a, d_transcoder]` of rows `read: [a, d_model]` with what the latents of
    `source` write to all layers before `layer`."""
    W: Tensor = upcast(transcoder.W_decs[source])
    before = layer - source
    if transcoder.decoders == "low_rank":
        M: Tensor = upcast(transcoder.W_maps[source])
        summed: Tensor = M.unflatten(1, (-1, transcoder.d_model))[:, :before].sum(1)
        return read @ (W @ summed).t()
    if transcoder.decoders == "full":
        return read.repeat(1, before) @ W[:, : before * transcoder.d_model].t()
    if transcoder.decoders == "tied":
        read = read * upcast(transcoder.output_scale[source:layer]).sum()
    return read @ W.t()
