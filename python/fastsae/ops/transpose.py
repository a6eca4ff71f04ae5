"""From token-major to feature-major: which tokens fired each latent."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.reference import FeatureLists, SparseActs


def transpose(acts: SparseActs) -> FeatureLists:
    """Group the active entries by latent, tokens ascending inside each.

    Args:
        acts: sparse activations; padding and entries of value 0 are left out.

    Returns:
        `FeatureLists(offsets [d_sae + 1], rows [cap], slots [cap])`, int32; `cap` is the number of
        places of `acts.values`. `counts()` of it says how often each latent fired.

    Raises:
        TypeError: `acts` is not a `SparseActs`.
        RuntimeError: an index is not in [0, d_sae) (CPU; on CUDA such an entry takes no part).

    Gradients:
        None: the lists are integers. They index into the same `values`.

    Numerics:
        Exact and deterministic: a stable counting sort.

    Cost:
        O(cap + d_sae), about 24 bytes per entry.
    """
    if not isinstance(acts, SparseActs):
        raise TypeError(f"transpose: expected acts to be SparseActs, got {type(acts).__name__}")
    return FeatureLists(
        *torch.ops.fastsae.transpose(acts.values.detach(), acts.indices, acts.offsets, acts.d_sae)
    )


@fake("transpose")
def _fake(
    values: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int
) -> tuple[Tensor, Tensor, Tensor]:
    cap = values.numel()
    return (
        indices.new_empty(d_sae + 1),
        indices.new_empty(cap),
        indices.new_empty(cap),
    )


@fallback("transpose")
def _plain(
    values: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int
) -> tuple[Tensor, ...]:
    return tuple(reference.transpose(SparseActs(values, indices, offsets, d_sae)))
