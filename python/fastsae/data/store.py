"""ActivationStore: read a harvest back, shuffled and resumable, in bounded memory."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fastsae._files import checksum
from fastsae._files.read import TensorFile, note_without_checksums
from fastsae._files.write import DTYPES
from fastsae.data.rounding import StoredRows
from fastsae.data.shards import COLUMNS, Manifest, Shard, open_shard
from fastsae.data.source import EpochBatches, Span, spread, within


class ActivationStore:
    """The rows of one split of a harvest, of one site or several side by side, as float32.

    Rows of int8 are multiplied by their scales: an entry is off by half of one at most.

    An epoch visits every row exactly once, in an order that depends on `(seed, epoch)` only.
    Shards are shuffled and read in groups of at most `buffer_bytes`; the rows of a group are mixed.
    A store that fits in one group is one full permutation, and stays in memory between epochs.

    Args:
        path: a folder written by `harvest`.
        site: which site; may be left out when the harvest has only one. Several sites give rows
            with their columns side by side, in the order given, for transcoders and crosscoders.
        split: "train" | "val".
        buffer_bytes: most bytes of activations held at once, as stored (one shard at least).
        partial: also open an interrupted harvest, and use the shards that are there.

    Headers and settings are verified here, the numbers of a shard when they are first read, against
    the checksums that `harvest` wrote.

    Raises:
        FileNotFoundError: no manifest, or a shard is missing.
        ValueError: no such site or split, an interrupted harvest, or a file is damaged; also while
            rows are read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        site: str | Sequence[str] | None = None,
        *,
        split: str = "train",
        buffer_bytes: int = 2 << 30,
        partial: bool = False,
    ) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path, partial=partial)
        sites = ", ".join(self.manifest.sites) or "none"
        if site is None and len(self.manifest.sites) == 1:
            site = next(iter(self.manifest.sites))
        names = (site,) if isinstance(site, str) or site is None else tuple(site)
        for name in names or (None,):
            if name not in self.manifest.sites:
                raise ValueError(
                    f"ActivationStore: expected site to be one of {sites} in {self.path}, "
                    f"got {name}"
                )
        if split not in ("train", "val"):
            raise ValueError(f"ActivationStore: expected split 'train' or 'val', got {split!r}")
        self.sites = tuple(str(name) for name in names)
        self.site, self.split, self.buffer_bytes = "+".join(self.sites), split, buffer_bytes
        self._widths = [self.manifest.sites[name] for name in self.sites]
        self.d_in = sum(self._widths)
        self.shards = [shard for shard in self.manifest.shards if shard.split == split]
        self._spans = {shard.file: [(0, shard.rows)] for shard in self.shards if shard.rows}
        """Which rows of each shard belong to this store."""
        self._held: StoredRows | None = None
        self._files = {shard.file: self._checked(shard) for shard in self.shards}
        self._verified: set[tuple[str, str]] = set()
        if any(shard.seal is None for shard in self.shards):
            note_without_checksums(self.path, "ActivationStore", "a new harvest")

    def __len__(self) -> int:
        """Number of rows."""
        return sum(b - a for spans in self._spans.values() for a, b in spans)

    def __repr__(self) -> str:
        return (
            f"ActivationStore({str(self.path)!r}, site={self.site!r}, split={self.split!r}): "
            f"{len(self)} rows of {self.d_in} in {len(self.shards)} shards"
        )

    @property
    def widths(self) -> dict[str, int]:
        """Site -> its number of columns, in their order."""
        return dict(zip(self.sites, self._widths, strict=True))

    @property
    def max_norm(self) -> float | None:
        """Rows of a larger norm, at the first site, were not stored; None: nothing was filtered."""
        return self.manifest.max_norm.get(self.sites[0])

    def batches(self, batch_size: int, *, seed: int | None = 0) -> Iterator[Tensor]:
        """Yield rows in batches, shuffled epoch after epoch, or once in the order of the text.

        Args:
            batch_size: rows per batch.
            seed: of the shuffle; None: one pass in order, with all rows.

        Yields:
            `[batch_size, d_in]`, float32; in order, at most as many rows.

        With a seed, the iterator has a state: a run continues exactly where it was, without reading
        what it has seen.
        """
        if batch_size < 1:
            raise ValueError(f"batches: expected batch_size >= 1, got {batch_size}")
        if seed is None:
            return self._in_order(batch_size)
        return EpochBatches(
            lambda epoch, start: self.epoch(batch_size, seed, epoch, start),
            len(self) // batch_size,
        )

    def _in_order(self, batch_size: int) -> Iterator[Tensor]:
        for shard, a, b in self._pieces():
            rows = self._acts(shard)
            for start in range(a, b, batch_size):
                yield rows[start : min(start + batch_size, b)].floats()

    def epoch(
        self, batch_size: int, seed: int = 0, epoch: int = 0, start: int = 0
    ) -> Iterator[Tensor]:
        """Yield the rows of one epoch, shuffled.

        Args:
            batch_size: rows per batch; the last batch may be smaller.
            seed: of the shuffle.
            epoch: number of the epoch; each has its own order.
            start: batches to skip, without reading what is skipped.
        """
        skip = start * batch_size
        rest = torch.empty(0, self.d_in)
        buffer: StoredRows | None = None
        for number, group in enumerate(self._groups(seed, epoch)):
            kept = self._kept(group)
            if skip >= len(kept):
                skip -= len(kept)
                continue
            order = torch.randperm(len(kept), generator=_generator(seed, epoch, number))[skip:]
            order, skip = kept[order], 0
            x = self._load(group, buffer)
            buffer = x if buffer is None or len(x) > len(buffer) else buffer
            at = 0
            while at < len(order):
                part = x[order[at : at + batch_size - len(rest)]].floats()
                at += len(part)
                rest = torch.cat([rest, part]) if len(rest) else part
                if len(rest) == batch_size:
                    yield rest
                    rest = rest[:0]
        if len(rest):
            yield rest

    def rows(self, rows: slice = slice(None)) -> Tensor:
        """Return rows in the order of the text: `[n, d_in]`, float32."""
        return self._slice("acts", rows)

    def token_ids(self, rows: slice = slice(None)) -> Tensor:
        """Return the token of each row: `[n]`, int32; -1 of images and sound."""
        return self._slice("token_ids", rows)

    def doc_ids(self, rows: slice = slice(None)) -> Tensor:
        """Return the document number of each row: `[n]`, int32."""
        return self._slice("doc_ids", rows)

    def positions(self, rows: slice = slice(None)) -> Tensor:
        """Return the place of each row in its context, the prefix token being 0: `[n]`, int32."""
        return self._slice("positions", rows)

    def kinds(self, rows: slice = slice(None)) -> Tensor:
        """Return what each row is about, as places in `manifest.kinds`: `[n]`, uint8.

        Raises:
            ValueError: the store is of texts, and does not say.
        """
        if not self.manifest.kinds:
            raise ValueError(f"ActivationStore: expected kinds in {self.path}, got rows of texts")
        return self._slice("kinds", rows)

    def fingerprint(self) -> str:
        """Return a checksum of the rows: of the files, or of a sample where they have none."""
        seals = [shard.seal for shard in self.shards]
        content = checksum.of_rows(self.sample(1024)) if None in seals else None
        whole = {shard.file: [(0, shard.rows)] for shard in self.shards if shard.rows}
        part = [] if self._spans == whole else [self._spans]  # of `hold_back`
        return checksum.of_json([seals, content, len(self), self.sites, self.split, *part])

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Return `min(n, len(self))` different rows drawn from the whole split, float32."""
        chosen = torch.randperm(len(self), generator=_generator(seed, -1, 0))[:n].sort().values
        parts, at = [torch.empty(0, self.d_in)], 0
        for shard, a, b in self._pieces():
            here = chosen[(chosen >= at) & (chosen < at + b - a)] - at
            if len(here):
                parts.append(self._acts(shard)[a + here].floats())
            at += b - a
        return torch.cat(parts)

    def hold_back(self, n: int) -> tuple[Self, Self]:
        """Return a store of all but `n` rows, and one of these, over the same files.

        They are pieces of 64 rows at equal distances in the order of the text.
        """
        parts = copy.copy(self), copy.copy(self)
        for part, spans in zip(parts, spread(len(self), n), strict=True):
            part._held, part._spans = None, {}
            at = 0
            for file, own in self._spans.items():
                part._spans[file] = within(own, [(a - at, b - at) for a, b in spans])
                at += sum(b - a for a, b in own)
        return parts

    def _pieces(self) -> Iterator[tuple[Shard, int, int]]:
        """Yield the rows of this store, in the order of the text: rows a to b of a shard."""
        for shard in self.shards:
            for a, b in self._spans.get(shard.file, ()):
                yield shard, a, b

    def _kept(self, group: list[Shard]) -> Tensor:
        """Return which rows of a group, as `_load` puts them together, belong to this store."""
        spans: list[Span] = []
        at = 0
        for shard in group:
            spans += [(at + a, at + b) for a, b in self._spans.get(shard.file, ())]
            at += shard.rows
        return torch.cat([torch.arange(*span) for span in spans or [(0, 0)]])

    def _groups(self, seed: int, epoch: int) -> Iterator[list[Shard]]:
        """Yield the shards in shuffled order, in groups of at most `buffer_bytes`."""
        width = self.d_in * getattr(torch, self.manifest.dtype).itemsize
        order = torch.randperm(len(self.shards), generator=_generator(seed, epoch, -1)).tolist()
        group: list[int] = []
        for i in order:
            rows = sum(self.shards[j].rows for j in group) + self.shards[i].rows
            if group and rows * width > self.buffer_bytes:
                yield [self.shards[j] for j in sorted(group)]
                group = []
            group.append(i)
        if group:
            yield [self.shards[j] for j in sorted(group)]

    def _load(self, group: list[Shard], buffer: StoredRows | None) -> StoredRows:
        """Return the rows of a group, in `buffer` if they fit: new memory takes as long to map as
        to fill."""
        if self._held is not None:
            return self._held
        rows, at = sum(shard.rows for shard in group), 0
        if buffer is not None and len(buffer) >= rows:
            x = buffer[:rows]
        else:
            x = StoredRows.empty(rows, self._widths, getattr(torch, self.manifest.dtype))
        for shard in group:
            self._read_acts(shard, x[at : at + shard.rows])
            at += shard.rows
        if len(group) == len(self.shards):
            self._held = x
        return x

    def _slice(self, name: str, rows: slice) -> Tensor:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"ActivationStore: expected a slice of step 1, got step {step}")
        parts, at = [], 0
        for shard, first, last in self._pieces():
            a, b = max(start - at, 0), min(stop - at, last - first)
            if a < b:
                here = slice(first + a, first + b)
                if name == "acts":
                    parts.append(self._acts(shard)[here].floats())
                else:
                    parts.append(self._tensor(shard, name)[here])
            at += last - first
        if parts:
            return torch.cat(parts)
        if name == "acts":
            return torch.empty(0, self.d_in)
        return torch.empty(0, dtype=torch.uint8 if name == "kinds" else torch.int32)

    def _acts(self, shard: Shard) -> StoredRows:
        """Return the activations of a shard, the sites side by side."""
        blocks = [self._tensor(shard, f"acts.{name}") for name in self.sites]
        acts = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
        return StoredRows(acts, self._scales(shard), self._widths)

    def _scales(self, shard: Shard) -> Tensor | None:
        if self.manifest.dtype != "int8":
            return None
        return torch.stack([self._tensor(shard, f"scale.{name}") for name in self.sites], 1)

    def _read_acts(self, shard: Shard, out: StoredRows) -> None:
        """Put the activations of a shard into `out`, of as many rows."""
        scales = self._scales(shard)
        if out.scales is not None and scales is not None:
            out.scales.copy_(scales)
        if len(self.sites) > 1:
            out.acts.copy_(self._acts(shard).acts)
            return
        key = shard.file, f"acts.{self.sites[0]}"
        self._files[shard.file].read_into(key[1], out.acts, verify=key not in self._verified)
        self._verified.add(key)

    def _tensor(self, shard: Shard, name: str) -> Tensor:
        """Map one tensor of a shard; pages are read as they are touched, the first time now."""
        key = shard.file, name
        tensor = self._files[shard.file].tensor(name, verify=key not in self._verified)
        self._verified.add(key)
        return tensor

    def _checked(self, shard: Shard) -> TensorFile:
        """Open the file of a shard, if it holds what the manifest says."""
        file = open_shard(self.path, shard)
        stored = DTYPES[getattr(torch, self.manifest.dtype)]
        wanted = {
            f"acts.{name}": (stored, [shard.rows, self.manifest.sites[name]]) for name in self.sites
        }
        if stored == "I8":
            wanted |= {f"scale.{name}": ("F32", [shard.rows]) for name in self.sites}
        wanted |= {name: ("I32", [shard.rows]) for name in COLUMNS}
        if self.manifest.kinds:
            wanted["kinds"] = ("U8", [shard.rows])
        for name, (dtype, shape) in wanted.items():
            if (got := file.shapes.get(name)) != shape:
                raise ValueError(
                    f"ActivationStore: expected {file.path} to hold {name} {shape}, got {got}"
                )
            if file.dtypes[name] != dtype:
                raise ValueError(
                    f"ActivationStore: expected {name} to be {dtype} in {file.path}, got "
                    f"{file.dtypes[name]}"
                )
        return file


def _generator(seed: int, epoch: int, number: int) -> torch.Generator:
    """Return a generator of its own for every (seed, epoch, number)."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
