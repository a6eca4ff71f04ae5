"""Contexts of a language model in batches, and the rows that it gives for them."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor, nn

from fastsae._files.checksum import as_bytes
from fastsae._log import logger
from fastsae.models.check import check_sites
from fastsae.models.chunks import Chunk, pad
from fastsae.models.probe import device_of
from fastsae.models.read import read, read_gradients
from fastsae.models.resolve import resolve

NORM_ROWS = 4096
"""Rows that say which norm is usual; the first batch may be one document."""


def check_reading(
    owner: str,
    model: nn.Module,
    sites: Sequence[str],
    context: int,
    drop_prefix: int,
    batch_size: int,
    max_norm_ratio: float | None,
) -> None:
    """Raise ValueError, in the name of `owner`, for what contexts cannot be read with."""
    check_sites_given(owner, sites, max_norm_ratio)
    if context < 2:
        raise ValueError(f"{owner}: expected context >= 2, got {context}")
    if not 0 <= drop_prefix < context:
        raise ValueError(
            f"{owner}: expected 0 <= drop_prefix < context = {context}, got {drop_prefix}"
        )
    if batch_size < 1:
        raise ValueError(f"{owner}: expected batch_size >= 1, got {batch_size}")
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < context:
        raise ValueError(
            f"{owner}: expected context <= {longest}, the positions of the model, got {context}"
        )


def check_sites_given(owner: str, sites: Sequence[str], max_norm_ratio: float | None) -> None:
    """Raise ValueError for sites that are not one or several, or a ratio that is none."""
    if not sites or len(set(sites)) != len(sites):
        raise ValueError(f"{owner}: expected one or more different sites, got {sites}")
    if max_norm_ratio is not None and not 0 < max_norm_ratio < float("inf"):
        raise ValueError(f"{owner}: expected max_norm_ratio > 0 or None, got {max_norm_ratio}")


class ContextBatches:
    """Contexts in batches, with a count and a checksum of those that were taken."""

    def __init__(self, chunks: Iterator[Chunk], size: int) -> None:
        self._chunks, self._size = chunks, size
        self._ahead: deque[list[Chunk]] = deque()
        self.count = 0
        self._sum = xxhash.xxh3_128()

    def __iter__(self) -> Iterator[list[Chunk]]:
        while batch := self._ahead.popleft() if self._ahead else self._next():
            self.count += 1
            self._sum.update(json.dumps([_parts(chunk) for chunk in batch]).encode())
            yield batch

    def peek(self) -> Iterator[list[Chunk]]:
        """Yield batches that will be taken later."""
        while batch := self._next():
            self._ahead.append(batch)
            yield batch

    def _next(self) -> list[Chunk]:
        return list(islice(self._chunks, self._size))

    def checksum(self) -> str:
        """Return what stands for the documents so far."""
        return self._sum.hexdigest()


def _parts(chunk: Chunk) -> list[Any]:
    kept = [] if chunk.keep is None else [chunk.keep]
    return [chunk.doc, chunk.ids, *kept]


class Rows(NamedTuple):
    """What a model gives for one batch of contexts: a row for each token that is wanted."""

    tokens: Tensor
    """[m], int64, like the two below."""
    documents: Tensor
    positions: Tensor
    """Of the tokens in their contexts."""
    acts: dict[str, Tensor]
    """Site -> [m, d], in the model's dtype, on the CPU; `grad.SITE` too if gradients are asked."""
    dropped: dict[str, int]
    """Reason -> how many real tokens have no row: "prefix", "skipped", "norm", or "elsewhere": not
    routed to an expert whose rows are read."""
    kinds: Tensor | None = None
    """[m], uint8, places in `fastsae.models.kinds.KINDS`; None of texts."""


class ContextReader:
    """Reads the activations of a model at checked sites.

    Args:
        model: a language model of `transformers`.
        sites: see `fastsae.models.sites`.
        prefix_id: what fills padding.
        drop_prefix: positions at the start of each context that are not wanted.
        skip_token_ids: tokens that are not wanted.
        gradients: whether the loss's gradients are read too.
        owner: who says so in messages.

    Raises:
        ValueError: the model has no such site, it is not what its name says, or its rows depend on
            padding, with an attention mask too.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[str],
        *,
        prefix_id: int,
        drop_prefix: int = 1,
        skip_token_ids: Sequence[int] = (),
        gradients: bool = False,
        owner: str = "harvest",
    ) -> None:
        self.model, self.owner = model, owner
        takes = getattr(model, "main_input_name", "input_ids")
        if takes != "input_ids":
            raise ValueError(
                f"{owner}: expected a model that takes tokens, got {type(model).__name__}, which "
                f"takes {takes}; harvest(model, None, ModelInputs(batches), ...) takes its inputs "
                "by name, as fastsae.models.read does"
            )
        self.sites = [resolve(model, name) for name in sites]
        self.prefix_id, self.drop_prefix, self.gradients = prefix_id, drop_prefix, gradients
        self.skip_token_ids = sorted(set(map(int, skip_token_ids)))
        self.max_norm: dict[str, float] = {}
        """Site -> norm above which a row is not wanted."""
        reports = check_sites(model, sites)
        for name, report in reports.items():
            if not report.ok:
                raise ValueError(f"{owner}: {report.why}")
            if not report.masked:
                raise ValueError(
                    f"{owner}: expected rows of {name} that do not depend on padding, got those of "
                    f"{type(model).__name__}, which do, with an attention mask too"
                )
            if report.why:
                logger.info("%s: %s: %s", owner, name, report.why)
        self.widths = {name: report.shape[-1] for name, report in reports.items()}
        """Site -> d."""
        self.checks = {name: report.to_dict() for name, report in reports.items()}
        """Site -> what is known of it, as JSON values."""
        self._routed = [site.name for site in self.sites if site.mixture is not None]
        self._masks = not all(report.causal for report in reports.values())

    def limit_norms(self, batches: ContextBatches, ratio: float) -> None:
        """Set `max_norm` to a multiple of the median norm of the rows that come first."""
        norms: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}
        for batch in batches.peek():
            for name, x in self._read(*self._wanted(batch), gradients=False).items():
                norm = x.float().norm(dim=1)
                norms[name].append(norm[~norm.isnan()] if name in self._routed else norm)
            if sum(map(len, norms[self.sites[0].name])) >= NORM_ROWS:
                break
        self.max_norm = usual_norms(norms, ratio)

    def read(self, batch: list[Chunk]) -> Rows:
        """Return the rows of a batch, context by context.

        Raises:
            ValueError: an activation is not finite.
        """
        tokens, real, keep = self._wanted(batch)
        acts = self._read(tokens, real, keep, gradients=self.gradients)
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        documents = torch.tensor([chunk.doc for chunk in batch]).unsqueeze(1).expand(tokens.shape)
        kept = torch.ones(int(keep.sum()), dtype=torch.bool)
        for name in self._routed:
            kept &= ~acts[name].isnan().any(1)
        elsewhere = int((~kept).sum())
        for name, x in acts.items():
            norm = x.float().norm(dim=1)
            if name in self._routed:
                norm = norm.nan_to_num(nan=0.0)  # an expert that gives NaN is refused
            if not norm.isfinite().all():
                raise ValueError(f"{self.owner}: site {name} gave an activation that is not finite")
            if name in self.max_norm:
                kept &= norm <= self.max_norm[name]
        dropped = {
            "prefix": int(real[:, : self.drop_prefix].sum()),
            "skipped": int(real[:, self.drop_prefix :].sum() - keep.sum()),
            "norm": int((~kept).sum()) - elsewhere,
            **({"elsewhere": elsewhere} if self._routed else {}),
        }
        return Rows(
            tokens[keep][kept],
            documents[keep][kept],
            positions[keep][kept],
            {name: x[kept] for name, x in acts.items()},
            dropped,
        )

    def _wanted(self, batch: list[Chunk]) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens `[n, t]`, which of them are real, and which of these are wanted."""
        tokens, real = pad([chunk.ids for chunk in batch], self.prefix_id)
        keep = real.clone()
        keep[:, : self.drop_prefix] = False
        for row, chunk in enumerate(batch):
            if chunk.keep is not None:
                keep[row, : len(chunk.keep)] &= torch.tensor(chunk.keep)
        if self.skip_token_ids:
            keep &= ~torch.isin(tokens, torch.tensor(self.skip_token_ids))
        return tokens, real, keep

    def _read(
        self, tokens: Tensor, real: Tensor, keep: Tensor, *, gradients: bool
    ) -> dict[str, Tensor]:
        """Return rows `[m, d]` of the tokens to keep, by site; padding is masked if it matters."""
        device = device_of(self.model)
        there, real_there = tokens.to(device), real.to(device)
        mask = real_there.long() if self._masks else None
        if gradients:
            got, grads = read_gradients(
                self.model, self.sites, there, real_there, attention_mask=mask
            )
            got |= {f"grad.{name}": g for name, g in grads.items()}
        else:
            got = read(self.model, self.sites, there, attention_mask=mask)
        return {name: x[keep.to(x.device)].cpu() for name, x in got.items()}


def usual_norms(norms: dict[str, list[Tensor]], ratio: float) -> dict[str, float]:
    """Return a multiple of the median of some norms, by site."""
    found = {name: torch.cat(parts) for name, parts in norms.items() if parts}
    return {name: ratio * float(norm.median()) for name, norm in found.items() if len(norm)}


def weights_checksum(model: nn.Module) -> str:
    """Return a checksum of some numbers of every parameter: another model has another one."""
    total = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:  # kept elsewhere, by accelerate
            total.update(f"{name} {parameter.dtype} {[*parameter.shape]}".encode())
            continue
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 256)][:512].cpu().contiguous()
        total.update(f"{name} {parameter.dtype} {[*parameter.shape]}".encode())
        total.update(as_bytes(some))
    return total.hexdigest()
