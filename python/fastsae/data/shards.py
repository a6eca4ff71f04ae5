"""The activation store on disk: safetensors shards and one manifest.

    OUT/manifest.json             what is here: sites, dtype, shards, their rows, what was dropped
    OUT/shard-00000.safetensors   acts.<site> [rows, d]; token_ids, doc_ids, positions int32 [rows]

Every file is written under a temporary name, synced and renamed, and the manifest names a shard
only after the shard is in place. So whatever stops a harvest (Ctrl-C, a full disk, a power cut),
the shards that the manifest names are whole.
"""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fastsae._files import write_atomic, write_json

FORMAT = "fastsae-activations"
VERSION = 1
COLUMNS = ("token_ids", "doc_ids", "positions")


@dataclass
class Shard:
    """One file of the store: its rows are all of one split."""

    file: str
    rows: int
    split: str


@dataclass
class Manifest:
    """What a store holds; `manifest.json` is this class with a format name and a version."""

    model: str
    """Name or path of the model."""
    dtype: str
    """dtype of the stored activations, e.g. "float16"."""
    sites: dict[str, int] = field(default_factory=dict)
    """Site -> d_in."""
    context: int = 0
    """Tokens per context, the prefix token included."""
    prefix_id: int = 0
    """The token put in front of every context."""
    drop_prefix: int = 0
    """How many positions at the start of every context were not stored."""
    max_norm: dict[str, float] = field(default_factory=dict)
    """Site -> largest norm that was stored; empty when nothing was filtered."""
    shards: list[Shard] = field(default_factory=list)
    documents: dict[str, int] = field(default_factory=dict)
    """Split -> number of documents."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason ("prefix", "norm") -> number of rows not stored."""
    complete: bool = False
    """False until the harvest has come to its end."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Whatever the caller of `harvest` wanted to remember."""

    def rows(self, split: str) -> int:
        """Return the number of stored rows of a split."""
        return sum(shard.rows for shard in self.shards if shard.split == split)

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`, atomically."""
        about = {"format": FORMAT, "version": VERSION}
        write_json(folder / "manifest.json", {**about, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `manifest.json` of `folder`.

        Raises:
            FileNotFoundError: there is no manifest.
            ValueError: it is not a manifest of fastsae, or of a newer version.
        """
        path = folder / "manifest.json"
        try:
            fields = json.loads(path.read_text())
        except FileNotFoundError:
            raise FileNotFoundError(
                f"ActivationStore: expected a harvest in {folder}, found no manifest.json"
            ) from None
        except ValueError as error:
            raise ValueError(f"ActivationStore: {path} is not JSON ({error})") from None
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
            raise ValueError(f"ActivationStore: {path} is not a manifest of {FORMAT}")
        version = fields.pop("version", None)
        if version != VERSION:
            raise ValueError(
                f"ActivationStore: expected version {VERSION} of the format in {path}, "
                f"got {version}; update fastsae"
            )
        try:
            manifest = cls(**fields)
            manifest.shards = [Shard(**shard) for shard in fields["shards"]]
        except (TypeError, KeyError) as error:
            raise ValueError(f"ActivationStore: {path} is damaged ({error})") from None
        return manifest


class ShardWriter:
    """Collects rows per split and writes a shard whenever `shard_rows` of them are there."""

    def __init__(self, folder: Path, manifest: Manifest, shard_rows: int) -> None:
        self.folder, self.manifest, self.shard_rows = folder, manifest, shard_rows
        self.waiting: dict[str, list[dict[str, Tensor]]] = {}
        manifest.write(folder)

    def add(self, split: str, columns: dict[str, Tensor]) -> None:
        """Add rows: every tensor of `columns` has the same first dimension."""
        rows = len(columns["token_ids"])
        if not rows:
            return
        self.waiting.setdefault(split, []).append(columns)
        while self._rows_waiting(split) >= self.shard_rows:
            self._write(split, self.shard_rows)

    def close(self) -> None:
        """Write what is left and mark the store complete."""
        for split in self.waiting:
            if rows := self._rows_waiting(split):
                self._write(split, rows)
        self.manifest.complete = True
        self.manifest.write(self.folder)

    def _rows_waiting(self, split: str) -> int:
        return sum(len(part["token_ids"]) for part in self.waiting[split])

    def _write(self, split: str, rows: int) -> None:
        parts = self.waiting[split]
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        shards = self.manifest.shards
        shard = Shard(f"shard-{len(shards):05d}.safetensors", rows, split)
        try:
            data = save({name: column[:rows].contiguous() for name, column in columns.items()})
            write_atomic(self.folder / shard.file, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            kept = sum(s.rows for s in shards)
            raise OSError(
                error.errno,
                f"harvest: disk full while writing {shard.file}; {len(shards)} complete shards "
                f"({kept} rows) are kept in {self.folder}",
            ) from None
        self.waiting[split] = [{name: c[rows:].clone() for name, c in columns.items()}]
        shards.append(shard)
        self.manifest.write(self.folder)
