"""A harvest into a folder: a new one, the rest of an interrupted one, or an addition."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastsae._files import checksum
from fastsae._files.read import field
from fastsae.data.shards import (
    MANIFEST,
    PARTIAL,
    SPLITS,
    WAITING,
    Manifest,
    Shard,
    ShardWriter,
    files_of_harvest,
    foreign_files,
    open_shard,
    read_manifest,
    shard_from,
    shard_number,
)
from fastsae.models.chunks import held_out

ABOUT = ("model", "dtype", "context", "prefix_id", "drop_prefix", "meta")
"""Fields of a manifest that a harvest and its continuation share, as they do all settings."""
FREE_TO_APPEND = ("batch_size", "max_tokens", "shard_rows", "append")
"""Settings that may be others for rows that are appended."""


class Batches(Protocol):
    """What a model is run on, with a count and a checksum of what was taken."""

    count: int

    def __iter__(self) -> Iterator[Any]: ...

    def checksum(self) -> str:
        """Return what stands for the documents so far."""


class HarvestRun:
    """What one call of `harvest` does to a folder, which it has locked."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        max_tokens: int | None,
        *,
        overwrite: bool,
        append: bool,
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self.left, self.rows = max_tokens, 0
        self._first_doc = 0
        self._before: list[Shard] = []
        """Shards that this call adds to."""
        self._resumed: dict[str, Any] | None = None
        done, part = folder / MANIFEST, folder / PARTIAL
        old = read_manifest(done)[0] if done.exists() else None
        if append:
            self._append_to(old)
        self._last_doc = dict.fromkeys(SPLITS, self._first_doc - 1)
        known: set[str] = set()
        first = None
        if part.exists():
            begun, state = read_manifest(part)
            first = field(state, "first", int, part, "harvest", least=0)
            known |= set(files_of_harvest(folder, first))
            if not overwrite and (begun.shards or state.get("waiting")):
                self._resume(begun, state, part)
        if old is not None:
            if not append:
                self._expect_replaceable(old, overwrite or self._resumed is not None)
            known |= {shard.file for shard in old.shards}
            if first is None:
                first = 1 + max((shard_number(shard.file) or 0 for shard in old.shards), default=-1)
        if foreign := foreign_files(folder, known):
            raise FileExistsError(
                f"harvest: expected {folder} to hold no files of others, got {foreign[0]}, which "
                "no manifest there names; choose another folder, or remove it"
            )
        size = manifest.settings["shard_rows"]
        self._writer = ShardWriter(folder, manifest, size, first=first or 0)
        if self._resumed is not None:
            waiting = field(self._resumed, "waiting", list, part, "harvest")
            number = field(self._resumed, "number", int, part, "harvest", least=0)
            self._writer.restore([shard_from(s, WAITING, part) for s in waiting], number)

    def skip(self, batches: Batches) -> None:
        """Pass over the batches that an interrupted harvest has stored."""
        if self._resumed is None:
            return
        part = self.folder / PARTIAL
        state = field(self._resumed, "progress", dict, part, "harvest")
        count = field(state, "batches", int, part, "harvest", least=0)
        for _ in islice(batches, count):
            pass
        if (batches.count, batches.checksum()) != (count, state.get("documents")):
            raise ValueError(
                f"harvest: expected the documents of the interrupted harvest in {self.folder}, got "
                f"others; {self._anew()}"
            )

    def add(self, columns: dict[str, Tensor], batches: Batches) -> int:
        """Store the rows of the batch just taken; return how many."""
        columns = {name: column[: self.left] for name, column in columns.items()}
        columns["doc_ids"] = columns["doc_ids"] + self._first_doc
        docs = columns["doc_ids"].tolist()
        fraction = self.manifest.settings["val_fraction"]
        is_val = torch.tensor([held_out(doc, fraction) for doc in docs], dtype=torch.bool)
        for split, mask in (("train", ~is_val), ("val", is_val)):
            here = columns["doc_ids"][mask].unique()
            self.manifest.documents[split] += int((here > self._last_doc[split]).sum())
            self._last_doc[split] = max([self._last_doc[split], *here.tolist()])
            self._writer.add(split, {name: column[mask] for name, column in columns.items()})
        self.rows += len(docs)
        if self.left is not None:
            self.left -= len(docs)
        if self._writer.has_news:
            self.save(batches)
        return len(docs)

    def save(self, batches: Batches) -> None:
        """Put everything up to the batch just taken on the disk."""
        self._writer.save(
            {
                "batches": batches.count,
                "documents": batches.checksum(),
                "last_doc": self._last_doc,
                "rows": self.rows,
            }
        )

    def close(self, batches: Batches) -> None:
        """Complete the store.

        Raises:
            ValueError: it holds the rows of just these documents already; nothing is added.
        """
        part = {"documents": batches.checksum(), "rows": self.rows}
        if part in self.manifest.parts:
            self._writer.discard()
            raise ValueError(
                f"harvest: expected documents that {self.folder} does not hold yet, got those of "
                "an earlier call; nothing was appended"
            )
        self.manifest.parts = [*self.manifest.parts, part]
        self._writer.close(self._before)

    def _append_to(self, old: Manifest | None) -> None:
        """Begin where a complete store ends, if what is added is of the same kind.

        Raises:
            ValueError: there is none, or it is of another model, site, or setting.
        """
        if old is None or not old.complete:
            raise ValueError(
                f"harvest: expected a complete harvest in {self.folder} to append to, got none"
            )
        new = self.manifest
        new.meta = new.meta or old.meta
        ours, theirs = self._about(new), self._about(old)
        for name, value in ours.items():
            if name not in FREE_TO_APPEND and theirs.get(name) != value:
                raise ValueError(
                    f"harvest: expected {name} = {theirs.get(name)!r} as in the harvest in "
                    f"{self.folder} to append to it, got {value!r}"
                )
        new.settings["append"] = checksum.of_json(old.to_dict())
        new.sites, new.max_norm, new.parts = old.sites, old.max_norm, old.parts
        new.documents, new.dropped = dict(old.documents), dict(old.dropped)
        self._before = old.shards
        for shard in {shard.split: shard for shard in old.shards}.values():  # the last of each
            numbers = open_shard(self.folder, shard).tensor("doc_ids")
            self._first_doc = max(self._first_doc, int(numbers.max()) + 1)

    def _anew(self) -> str:
        append = "append=True, " if self._before else ""
        also = "--append " if self._before else ""
        what = "the addition " if self._before else ""
        return f"{append}overwrite=True ({also}--overwrite) begins {what}anew"

    def _expect_replaceable(self, old: Manifest, allowed: bool) -> None:
        if old.complete and not allowed:
            raise FileExistsError(
                f"harvest: {self.folder} already holds a complete harvest; choose another folder "
                "or overwrite it"
            )
        if not (old.complete or allowed):
            raise FileExistsError(
                f"harvest: {self.folder} holds an interrupted harvest of an earlier version, which "
                "cannot be continued; choose another folder or overwrite it"
            )

    def _resume(self, begun: Manifest, state: dict[str, Any], part: Path) -> None:
        """Take over what the partial manifest says, if it is of this harvest."""
        ours, theirs = self._about(self.manifest), self._about(begun)
        if (ours.get("append") is None) != (theirs.get("append") is None):
            raise ValueError(
                f"harvest: expected append={theirs.get('append') is not None} as in the "
                f"interrupted harvest in {self.folder}, got append={bool(self._before)}"
            )
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"harvest: expected {name} = {theirs.get(name)!r} as in the interrupted "
                    f"harvest in {self.folder}, got {value!r}; {self._anew()}"
                )
        manifest = self.manifest
        manifest.shards, manifest.sites = begun.shards, begun.sites
        manifest.documents, manifest.dropped = begun.documents, begun.dropped
        manifest.max_norm = begun.max_norm
        progress = field(state, "progress", dict, part, "harvest")
        self.rows = field(progress, "rows", int, part, "harvest", least=0)
        if self.left is not None:
            self.left -= self.rows
        last = field(progress, "last_doc", dict, part, "harvest")
        self._last_doc = {
            split: field(last, split, int, part, "harvest", least=-1) for split in SPLITS
        }
        for shard in manifest.shards:
            open_shard(self.folder, shard)
        self._resumed = state

    @staticmethod
    def _about(manifest: Manifest) -> dict[str, Any]:
        """Return what must be the same for a harvest and its continuation, as JSON values."""
        values = {name: getattr(manifest, name) for name in ABOUT} | manifest.settings
        about: dict[str, Any] = json.loads(json.dumps(values))
        return about
