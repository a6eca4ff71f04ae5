"""Spread the parameters of an SAE over processes, and bring them together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastsae.distributed.layout import Layout
from fastsae.nn import (
    SAE,
    BatchTopKSAE,
    BatchTopKTranscoder,
    FeatureChoiceSAE,
    GatedSAE,
    JumpReLUSAE,
    JumpReLUTranscoder,
    MatryoshkaSAE,
    ReLUSAE,
    ReLUTranscoder,
    TopKSAE,
    Transcoder,
)
from fastsae.nn.parallel import ALONE

CLASSES: tuple[type[SAE], ...] = (
    TopKSAE,
    BatchTopKSAE,
    FeatureChoiceSAE,
    MatryoshkaSAE,
    ReLUSAE,
    GatedSAE,
    JumpReLUSAE,
    Transcoder,
    BatchTopKTranscoder,
    ReLUTranscoder,
    JumpReLUTranscoder,
)
"""What can be spread."""
BY_LATENT: tuple[str, ...] = ("W_enc_rows", "W_dec", "b_enc", "log_threshold", "r_mag", "b_mag")
BY_LATENT += ("threshold", "density", "budget")
"""Parameters and buffers with a row for each latent, unless they are single numbers; all others
every process has whole."""


def why_not_sharded(sae: SAE) -> str | None:
    """Return why `sae` cannot be spread, None where it can."""
    cls = type(sae)
    if cls not in CLASSES:
        names = ", ".join(known.__name__ for known in CLASSES)
        return f"{cls.__name__} selects in its own way (known: {names})"
    for name in ("multi_topk", "select_by_decoder_norm"):
        if getattr(sae, name, False):
            return f"{name} looks at the latents of other processes"
    if sae.aux != "auxk":
        return f"aux={sae.aux!r} ranks the latents of all processes"
    if sae.W_enc_rows.dtype not in (torch.float32, torch.float64):
        return f"its parameters are {sae.W_enc_rows.dtype}, not float32 or float64"
    if sae.W_enc_rows is sae.W_dec:
        return "both matrices are one parameter"
    return None


@torch.no_grad()
def shard_(sae: SAE, mesh: DeviceMesh) -> SAE:
    """Keep on every process its own latents, in place.

    `d_sae`, and the codes that `encode_sparse` returns, are of the latents held here from now on;
    reconstructions, losses and thresholds are those of all. Every process of the mesh calls every
    method, those of a data group with the same tokens. Process 0 says what the parameters are.

    Args:
        sae: the same class and sizes on every process.
        mesh: from `make_mesh`.

    Returns:
        The module.

    Raises:
        ValueError: a class or option that cannot be spread, an SAE that is spread already, another
            mesh, or fewer latents than processes.
    """
    if (why := why_not_sharded(sae)) is not None:
        raise ValueError(f"shard_: expected an SAE that can be spread, got one where {why}")
    if not sae.parallel.is_alone:
        raise ValueError("shard_: expected an SAE in one piece, got one that is spread already")
    layout = Layout(mesh, sae.d_sae)
    device = torch.device(mesh.device_type)
    if sae.W_enc_rows.device.type != device.type:
        raise ValueError(
            f"shard_: expected an SAE on {device.type} like the mesh, got {sae.W_enc_rows.device}"
        )
    for t in [*sae.parameters(), *sae.buffers()]:
        dist.broadcast(t.data, src=0)
    for t in _by_latent(sae):
        t.data = layout.of_own_latents(t.data).clone()
        t.grad = None
    sae.d_sae = layout.held
    sae.parallel = layout
    return sae


@torch.no_grad()
def unshard_(sae: SAE) -> SAE:
    """Bring the latents of all processes together on each of them, in place: undoes `shard_`.

    Matrices come one after the other, so that no process holds more than the whole dictionary and
    its own part of one matrix.
    """
    layout = sae.parallel
    if not isinstance(layout, Layout):
        return sae
    for t in _by_latent(sae):
        t.data = layout.of_all_latents(t.data)
        t.grad = None
    sae.d_sae = layout.d_sae
    sae.parallel = ALONE
    return sae


def _by_latent(sae: SAE) -> list[Tensor]:
    """Return the parameters and buffers that have a row for each latent."""
    named = [*sae.named_parameters(), *sae.named_buffers()]
    return [t for name, t in named if name in BY_LATENT and t.ndim]
