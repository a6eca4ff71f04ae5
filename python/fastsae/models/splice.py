"""Splice an SAE into its model: replace an activation by its reconstruction, and see what breaks.

Three kinds of positions pass through untouched, in every intervention alike: the first
`drop_prefix` of each context (attention sinks, on which no SAE is trained), rows of a norm above
`max_norm` (outliers), and those the caller keeps. Otherwise the damage done to one sink token would
hide the quality of everything else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

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

    Positions are those in the context, not in one call: with a cache of keys and values
    (`generate`) a call continues where the one before ended, and with padding on the left (an
    attention mask) a context starts at its first real token.

    Args:
        model: a causal language model of `transformers`; calls go through it.
        site: see `fastsae.models.sites`.
        fn: takes the rows to replace, `[n, d]`, and returns theirs, in any floating dtype.
        keep: bool `[batch, t]`, True where the activation passes through untouched; positions past
            t are replaced.
        drop_prefix: positions at the start of each context that pass through.
        max_norm: rows of a larger norm pass through; None means that none does.

    Raises:
        RuntimeError: the site is not reached by a forward pass of the model, or is reached by one
            that does not go through `model`.
    """
    site = resolve(model, site) if isinstance(site, str) else site
    call = _Call()

    def hook(x: Tensor) -> Tensor:
        call.fired = True
        touched = call.positions(x) >= drop_prefix
        if keep is not None:
            now = keep[:, call.start : call.start + x.shape[1]].to(x.device)
            touched[:, : now.shape[1]] &= ~now
        if max_norm is not None:
            touched &= x.float().norm(dim=-1) <= max_norm
        out = x.clone()
        out[touched] = fn(x[touched]).to(x.dtype)
        return out

    handles = [
        model.register_forward_pre_hook(call.begin, with_kwargs=True),
        site.hook(hook),
        model.register_forward_hook(call.end, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if call.count and not call.fired:
        raise RuntimeError(
            f"site {site.name}: its module is not reached by the model's forward pass, so nothing "
            "was replaced"
        )


CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Arguments that hold earlier keys and values; transformers 5.24 calls them `cache`, and warns of
the name that it had before."""


class _Call:
    """Where in its contexts the running forward pass of a model is."""

    def __init__(self) -> None:
        self.count = 0
        self.fired = False
        self.start = 0
        """Positions before those of this call."""
        self._running = False
        self._mask: Tensor | None = None

    def begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note the cache and the attention mask of a call."""
        self.count += 1
        self._running = True
        with suppress(TypeError):  # the call itself says what is wrong with it
            kwargs = inspect.signature(model.forward).bind(*args, **kwargs).arguments | kwargs
        caches = [kwargs.get(name) for name in CACHE_NAMES]
        self.start = _cached(next((cache for cache in caches if cache is not None), None))
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise TypeError(
                f"replace: expected an attention mask [batch, t] or none, got {[*mask.shape]}, "
                "which does not say where contexts start; a static cache makes such masks"
            )
        self._mask = mask if isinstance(mask, Tensor) else None

    def end(self, *_: Any) -> None:
        """Note that the call is over."""
        self._running = False

    def positions(self, x: Tensor) -> Tensor:
        """Return the place of every row of `x: [batch, t, d]` in its context; -1 for padding."""
        if not self._running:
            raise RuntimeError("replace: expected calls of the model that was given, got another")
        t = x.shape[1]
        if self._mask is not None and self._mask.shape[1] >= t:
            real = self._mask.to(x.device).bool()
            places = (real.long().cumsum(1) - 1).masked_fill(~real, -1)
            return places[:, -t:].expand(x.shape[0], t)
        places = torch.arange(self.start, self.start + t, device=x.device)
        return places.expand(x.shape[0], t)


def _cached(cache: Any) -> int:
    """Return how many positions a cache of keys and values holds."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    if isinstance(cache, tuple):
        return int(cache[0][0].shape[-2])
    raise TypeError(
        f"replace: expected a cache that says its length (get_seq_length), got "
        f"{type(cache).__name__}; call the model without a cache"
    )


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
