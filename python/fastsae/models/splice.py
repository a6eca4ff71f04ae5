"""Splice an SAE into its model: replace an activation by its reconstruction, and see what breaks.

Three kinds of positions pass through untouched, in every intervention alike: the first
`drop_prefix` of each context (attention sinks, on which no SAE is trained), rows of a norm above
`max_norm` (outliers), and those the caller keeps. Otherwise the damage done to one sink token would
hide the quality of everything else.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing

from fastsae.models.eager import uncompiled
from fastsae.models.probe import Handle, evaluating
from fastsae.models.resolve import resolve
from fastsae.models.sites import Site
from fastsae.models.threads import not_elsewhere


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
    (`generate`, dynamic or static, prefilled at once or in chunks) a call continues where the one
    before ended, and with padding on the left (an attention mask) a context starts at its first
    real token.

    Args:
        model: a causal language model of `transformers`; calls go through it.
        site: see `fastsae.models.sites`.
        fn: takes the rows to replace, `[n, d]`, and returns theirs, in any floating dtype.
        keep: bool `[batch, t]`, True where the activation passes through untouched; positions past
            t are replaced. Of several beams or samples of a prompt each has its row.
        drop_prefix: positions at the start of each context that pass through.
        max_norm: rows of a larger norm pass through; None means that none does.

    Raises:
        ValueError: the model has no such site, or does not use what is there.
        RuntimeError: the site is not reached by a forward pass of the model, or is reached by one
            that does not go through `model`.
    """
    with intervene(model, site, lambda read, own: fn(own), None, keep, drop_prefix, max_norm):
        yield


@contextmanager
def intervene(
    model: nn.Module,
    site: str | Site,
    fn: Callable[[Tensor, Tensor], Tensor | None],
    source: str | Site | None,
    keep: Tensor | None,
    drop_prefix: int,
    max_norm: float | None,
) -> Iterator[None]:
    """Replace rows as `replace` does, by what `fn` makes of them and of rows of another site.

    Args:
        model: as in `replace`, like all that is not said here.
        site: where rows are replaced.
        fn: takes the rows of the source and those to replace; returns theirs, or None where no row
            is to change, which leaves the activation to the bit as it is.
        source: a site that is reached before; None: `site`. Its norms are what max_norm is about.
        keep: as in `replace`.
        drop_prefix: as in `replace`.
        max_norm: as in `replace`.
    """
    site = resolve(model, site) if isinstance(site, str) else site
    source = resolve(model, source) if isinstance(source, str) else source
    if site.read_only:
        raise ValueError(f"site {site.name}: expected one that can be replaced; {site.read_only}")
    call = _Call()

    def hook(x: Tensor) -> Tensor | None:
        call.fired = True
        call.expect_no_checkpoint(site.name)
        if x.ndim != 3:
            raise ValueError(
                f"replace: expected an activation [n, t, d] at {site.name}, got {[*x.shape]}"
            )
        touched = call.positions(x) >= drop_prefix
        if keep is not None:
            now = _of_samples(keep, len(x))[:, call.start : call.start + x.shape[1]].to(x.device)
            touched[:, : now.shape[1]] &= ~now
        given = x if source is None else call.source
        if given is None or given.shape[:2] != x.shape[:2]:
            raise RuntimeError(
                f"replace: expected {source.name if source else ''} to be reached before "
                f"{site.name}, with as many rows"
            )
        if site.mixture is not None:
            touched &= ~x.isnan().any(-1)  # rows of tokens that the expert does not see
        if max_norm is not None:
            touched &= given.float().norm(dim=-1) <= max_norm
        rows = fn(given[touched], x[touched])
        if rows is None:
            return None
        out = x.clone()
        if rows.shape != x[touched].shape:
            raise ValueError(
                f"replace: expected {[*x[touched].shape]} for the rows of {site.name}, got "
                f"{[*rows.shape]}"
            )
        out[touched] = rows.to(x)
        return out

    handles: list[Handle] = [
        model.register_forward_pre_hook(not_elsewhere(call.begin), with_kwargs=True),
        *([] if source is None else [source.hook(call.take)]),
        site.hook(hook),
        model.register_forward_hook(not_elsewhere(call.end), always_call=True),
    ]
    try:
        with uncompiled(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
    if call.count and not call.fired:
        raise RuntimeError(
            f"site {site.name}: its module is not reached by the model's forward pass, so nothing "
            "was replaced"
        )


def _of_samples(keep: Tensor, rows: int) -> Tensor:
    """Return `keep: [batch, t]` for a pass with several rows for each, such as beams."""
    if rows % len(keep):
        raise ValueError(f"replace: expected keep [{rows}, t], got {[*keep.shape]}")
    return keep.repeat_interleave(rows // len(keep), 0)


CHECKPOINT = checkpointing.__file__

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Arguments that hold earlier keys and values; transformers 5.24 calls them `cache`, and warns of
the name that it had before."""


class _Call:
    """Where in its contexts the running forward pass of a model is."""

    def __init__(self) -> None:
        self.count = 0
        self.fired = False
        self.grad = False
        """Whether the running pass is to have gradients."""
        self.start = 0
        """Positions before those of this call."""
        self.source: Tensor | None = None
        """What the site that is read gave."""
        self._running = False
        self._mask: Tensor | None = None
        self._places: Tensor | None = None

    def take(self, x: Tensor) -> None:
        """Remember what the site that is read gave."""
        self.source = x.clone()

    def begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note the cache and the attention mask of a call."""
        self.count += 1
        self._running = True
        self.grad = torch.is_grad_enabled()
        signature = inspect.signature(model.forward)
        takes = signature.parameters.values()
        if len(args) > 1 and any(p.kind is p.VAR_POSITIONAL for p in takes):
            raise TypeError(
                f"replace: expected {type(model).__name__} to be called with arguments by name, "
                f"got {len(args)} by position, of which it does not say what they are"
            )
        with suppress(TypeError):  # the call itself says what is wrong with it
            kwargs = signature.bind(*args, **kwargs).arguments | kwargs
        caches = [kwargs.get(name) for name in CACHE_NAMES]
        self.start = _cached(next((cache for cache in caches if cache is not None), None))
        mask = kwargs.get("attention_mask")
        mask = next(iter(mask.values()), None) if isinstance(mask, dict) else mask
        self._mask = self._places = None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._mask = mask
        elif isinstance(mask, Tensor):
            self._places = _places(mask, kwargs.get("position_ids"))

    def end(self, *_: Any) -> None:
        """Note that the call is over."""
        self._running, self.source = False, None

    def expect_no_checkpoint(self, name: str) -> None:
        """Raise RuntimeError in a part of the model that the backward pass runs once more."""
        if self._running and not self.grad:
            return
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename == CHECKPOINT:
                raise RuntimeError(
                    f"replace: expected {name} to lie outside of gradient checkpointing, whose "
                    "backward pass runs it again without the replacement, got it inside; call "
                    "model.eval(), turn checkpointing off, or use torch.no_grad()"
                )
            frame = frame.f_back

    def positions(self, x: Tensor) -> Tensor:
        """Return the place of every row of `x: [batch, t, d]` in its context; -1 for padding."""
        if not self._running:
            raise RuntimeError("replace: expected calls of the model that was given, got another")
        t = x.shape[1]
        if self._places is not None:
            return self._places.to(x.device).expand(x.shape[0], t)
        if self._mask is not None and self._mask.shape[1] >= t:
            real = self._mask.to(x.device).bool()
            places = (real.long().cumsum(1) - 1).masked_fill(~real, -1)
            return places[:, -t:].expand(x.shape[0], t)
        places = torch.arange(self.start, self.start + t, device=x.device)
        return places.expand(x.shape[0], t)


def _places(mask: Tensor, positions: Any) -> Tensor:
    """Return the place of every token in its context, -1 for padding, out of a mask of pairs.

    Args:
        mask: `[batch, heads, t, T]`, bool, or floating point with large negative numbers where a
            token does not see another; such as a static cache needs.
        positions: `[batch, t]`.
    """
    if mask.ndim != 4 or not isinstance(positions, Tensor) or positions.ndim != 2:
        got = [*positions.shape] if isinstance(positions, Tensor) else positions
        raise TypeError(
            "replace: expected an attention mask [batch, t] or none, or one of [batch, heads, t, "
            f"T] with position_ids [batch, t], got {[*mask.shape]} with {got}, which does not say "
            "where contexts start"
        )
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return positions.masked_fill(~seen.any(-1).any(1), -1)


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
    site: str | Site | tuple[str | Site, str | Site],
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

        with fastsae.models.splice(model, ("mlp_in.15", "mlp_out.15"), transcoder):
            ...

    Args:
        model: as in `replace`.
        site: where the SAE belongs; of a transcoder the site that it reads, and the one that it
            replaces.
        sae: maps rows `[n, d_in]` to rows `[n, d]`; what reads several sites, as crosscoders do,
            is not for this.
        keep: as in `replace`, like the two below. Rows are those that the SAE reads.
        drop_prefix: positions at the start of each context that pass through.
        max_norm: rows of a larger norm pass through.

    Raises:
        ValueError: one site for a transcoder, two for an SAE, or an SAE that reads several.
    """
    source, target = read_and_replaced("splice", site, sae)
    parameter = next(sae.parameters(), None)

    def reconstruct(read: Tensor, own: Tensor) -> Tensor:
        rows: Tensor = sae(read if parameter is None else read.to(parameter.dtype))
        return rows

    keeping = intervene(model, target, reconstruct, source, keep, drop_prefix, max_norm)
    with evaluating(sae), keeping:
        yield


def read_and_replaced(
    owner: str, site: str | Site | tuple[str | Site, str | Site], sae: nn.Module
) -> tuple[str | Site | None, str | Site]:
    """Return the site that an SAE reads, None for the one that it replaces, and the latter.

    Raises:
        ValueError: one site for a transcoder, two for an SAE, or an SAE that reads several.
    """
    source, target = (None, site) if isinstance(site, str | Site) else site
    columns: Any = getattr(sae, "columns", None)
    if columns is not None:
        if len(columns.inputs) != 1 or len(columns.targets) > 1:
            raise ValueError(
                f"{owner}: expected an SAE that reads one site, got {type(sae).__name__}, which "
                f"reads {len(columns.inputs)}"
            )
        if (source is None) == bool(columns.targets):
            wanted = "(SITE_READ, SITE_REPLACED)" if columns.targets else "one site"
            raise ValueError(f"{owner}: expected {wanted} for {type(sae).__name__}, got {site}")
    return source, target


@contextmanager
def ablate(
    model: nn.Module,
    site: str | Site | tuple[str | Site, str | Site],
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
        site: see `fastsae.models.sites`; of two the second, while max_norm is about the first, as
            where a transcoder is spliced in.
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

    def value(read: Tensor, own: Tensor) -> Tensor:
        if how == "zero" or mean is None:
            return torch.zeros_like(own)
        return mean.to(own).expand_as(own)

    source, target = (None, site) if isinstance(site, str | Site) else site
    with intervene(model, target, value, source, keep, drop_prefix, max_norm):
        yield
