"""Splice an SAE into its model: replace an activation by its reconstruction, and see what breaks.

Three kinds of positions pass through untouched, in every intervention alike: the first
`drop_prefix` of each context (attention sinks, on which no SAE is trained), rows of a norm above
`max_norm` (outliers), and those the caller keeps. Otherwise the damage done to one sink token would
hide the quality of everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastsae.models.sites import Site, resolve


@contextmanager
def replace(
    model: nn.Module,
    site: str | Site,
    fn: Callable[[Tensor], Tensor],
    *,
    keep: Tensor | None = None,
    drop_prefix: int = 1,
    max_norm: float | None = None,
) -> Iterator[None]:
    """Replace the rows of an activation by `fn(rows)` in every forward pass inside the block.

    Args:
        model: a causal language model of `transformers`.
        site: see `fastsae.models.sites`.
        fn: takes the rows to replace, `[n, d]`, and returns theirs, in any floating dtype.
        keep: bool `[batch, t]`, True where the activation passes through untouched.
        drop_prefix: positions at the start of each context that pass through.
        max_norm: rows of a larger norm pass through; None means that none does.
    """
    site = resolve(model, site) if isinstance(site, str) else site

    def hook(x: Tensor) -> Tensor:
        touched = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        touched[:, :drop_prefix] = False
        if keep is not None:
            touched &= ~keep.to(x.device)
        if max_norm is not None:
            touched &= x.float().norm(dim=-1) <= max_norm
        out = x.clone()
        out[touched] = fn(x[touched]).to(x.dtype)
        return out

    handle = site.hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def splice(
    model: nn.Module,
    site: str | Site,
    sae: nn.Module,
    *,
    keep: Tensor | None = None,
    drop_prefix: int = 1,
    max_norm: float | None = None,
) -> Iterator[None]:
    """Replace the activation at `site` by the SAE's reconstruction inside the block.

        with fastsae.models.splice(model, "resid_post.15", sae):
            logits = model(tokens).logits

    The SAE is in eval mode inside the block, so a batch-wise selection uses its thresholds and one
    token does not see another. See `replace` for the other arguments.
    """
    dtype = next(sae.parameters()).dtype
    training = sae.training
    sae.eval()
    try:
        with replace(
            model,
            site,
            lambda x: sae(x.to(dtype)),
            keep=keep,
            drop_prefix=drop_prefix,
            max_norm=max_norm,
        ):
            yield
    finally:
        sae.train(training)


@contextmanager
def ablate(
    model: nn.Module,
    site: str | Site,
    how: str,
    *,
    mean: Tensor | None = None,
    keep: Tensor | None = None,
    drop_prefix: int = 1,
    max_norm: float | None = None,
) -> Iterator[None]:
    """Replace the activation at `site` by its mean or by zero inside the block.

    Args:
        model: a causal language model of `transformers`.
        site: see `fastsae.models.sites`.
        how: "mean" | "zero".
        mean: `[d]`, what "mean" puts in every row.
        keep: as in `replace`, like the two below.
        drop_prefix: positions at the start of each context that pass through.
        max_norm: rows of a larger norm pass through.

    Raises:
        ValueError: `how` is another word, or "mean" comes without a mean.
    """
    if how not in ("mean", "zero"):
        raise ValueError(f"ablate: expected 'mean' or 'zero', got {how!r}")
    if how == "mean" and mean is None:
        raise ValueError("ablate: expected mean [d] for 'mean', got None")

    def value(x: Tensor) -> Tensor:
        if how == "zero" or mean is None:
            return torch.zeros_like(x)
        return mean.to(x).expand_as(x)

    with replace(model, site, value, keep=keep, drop_prefix=drop_prefix, max_norm=max_norm):
        yield
