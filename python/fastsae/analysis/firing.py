"""How often latents fire on some text, and how strongly at most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsae.analysis.steer import Sites, fitting
from fastsae.models import Site, read, resolve
from fastsae.models.chunks import pad
from fastsae.models.probe import device_of, evaluating
from fastsae.nn import SAE, NormalizedSAE


@dataclass(frozen=True)
class Firing:
    """What `firing` counted."""

    rate: Tensor
    """Share of the tokens on which each latent is active: float64 `[d_sae]`, on the CPU."""
    largest: Tensor
    """Largest value of each latent, 0 where it never fires: float64 `[d_sae]`, on the CPU."""
    tokens: int
    """Tokens that were encoded."""


@torch.no_grad()
def firing(
    model: nn.Module,
    sae: SAE | NormalizedSAE,
    contexts: Sequence[Sequence[int]],
    *,
    site: Sites,
    batch_size: int = 8,
    drop_prefix: int = 1,
    max_norm: float | None = None,
) -> Firing:
    """Count the code of every token that `steer` would act on, in one pass over the contexts,
    which ends at the site.

    Args:
        model: a causal language model of `transformers`.
        sae: as in `steer`, like `site`; in eval mode meanwhile.
        contexts: token lists, each with its prefix token first, e.g. `Chunk.ids`.
        site: where the SAE belongs.
        batch_size: contexts per forward pass.
        drop_prefix: positions at the start of each context that are left out.
        max_norm: rows of a larger norm are left out.

    Raises:
        ValueError: no token is left, or the SAE and the site do not fit each other.
    """
    source, target = fitting("firing", site, sae)
    where = target if source is None else source
    place = resolve(model, where) if isinstance(where, str) else where
    counts = torch.zeros(sae.d_sae, dtype=torch.float64)
    largest = torch.zeros(sae.d_sae, dtype=torch.float64)
    tokens = 0
    with evaluating(sae):
        for (x,) in rows(model, [place], contexts, batch_size, drop_prefix, max_norm):
            acts = sae.encode_sparse(x.to(sae.W_enc_rows.dtype))
            counts += acts.counts().cpu()
            latents, values = acts.indices.flatten().long(), acts.values.flatten().double()
            largest.scatter_reduce_(0, latents.cpu(), values.cpu(), "amax")
            tokens += len(x)
    if not tokens:
        raise ValueError("firing: expected contexts with a token to encode, got none")
    return Firing(counts / tokens, largest, tokens)


def rows(
    model: nn.Module,
    sites: Sequence[Site],
    contexts: Sequence[Sequence[int]],
    batch_size: int,
    drop_prefix: int,
    max_norm: float | None,
) -> Iterator[list[Tensor]]:
    """Yield the rows `[n, d]` of all sites that `steer` would act on, a batch at a time.

    Args:
        model: a causal language model of `transformers`; in eval mode meanwhile.
        sites: of the first it is that max_norm is about.
        contexts: as in `firing`, like the rest.
        batch_size: contexts per forward pass, which ends where the last site is reached.
        drop_prefix: positions at the start of each context that are left out.
        max_norm: rows of a larger norm are left out.
    """
    for at in range(0, len(contexts), batch_size):
        ids, real = pad(contexts[at : at + batch_size], 0)
        with evaluating(model):
            found = read(model, sites, ids.to(device_of(model)))
        first = found[sites[0].name]
        touched = real.to(first.device) & ~first.isnan().any(-1)
        touched[:, :drop_prefix] = False
        if max_norm is not None:
            touched &= first.float().norm(dim=-1) <= max_norm
        yield [found[site.name][touched] for site in sites]
