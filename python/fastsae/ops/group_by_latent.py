"""From token-major to feature-major: which tokens fired each latent."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _check, _vmap
from fastsae.types import LatentLists, SparseActs


def group_by_latent(acts: SparseActs) -> LatentLists:
    """Group the active entries by latent, tokens ascending inside each.

    Args:
        acts: sparse activations; padding and entries of value 0 are left out.

    Returns:
        `LatentLists(offsets [d_sae + 1], rows [capacity], slots [capacity])`, int32, with as many
        places as `acts.values`. Its `counts()` says how often each latent fired.

    Raises:
        TypeError: `acts` is not a `SparseActs`.
        RuntimeError: an index is not in [0, d_sae) (CPU; on CUDA such an entry is ignored).

    Gradients:
        None: the lists are integers. They index into the same `values`.

    Numerics:
        Exact and deterministic: a stable counting sort.

    Cost:
        O(capacity + d_sae), about 24 bytes per entry.
    """
    _check.acts("group_by_latent", acts)
    return LatentLists(
        *torch.ops.fastsae.group_by_latent(
            acts.values.detach(), acts.indices, acts.offsets, acts.d_sae
        )
    )


@fake("group_by_latent")
def _fake(
    values: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int
) -> tuple[Tensor, Tensor, Tensor]:
    capacity = values.numel()
    return (
        indices.new_empty(d_sae + 1),
        indices.new_empty(capacity),
        indices.new_empty(capacity),
    )


@fallback("group_by_latent")
def _plain(
    values: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int
) -> tuple[Tensor, ...]:
    return tuple(reference.group_by_latent(SparseActs(values, indices, offsets, d_sae)))


_vmap.register("group_by_latent")
