"""The activation store on disk: safetensors shards and one manifest.

    OUT/manifest.json             what is here: sites, dtype, shards, their rows, what was dropped
    OUT/shard-00000.safetensors   acts.<site> [rows, d]; token_ids, doc_ids, positions int32 [rows];
                                  scale.<site> float32 [rows] where acts are int8;
                                  kinds uint8 [rows] of models with inputs of their own

and while a harvest is under way:

    OUT/manifest.partial.json     the same so far, and how to go on
    OUT/waiting-val-00003.safetensors   rows that do not fill a shard yet

Every file is written under a temporary name, synced and renamed, and a manifest names a file only
after the file is in place, with its checksum. So whatever stops a harvest (Ctrl-C, a full disk, a
power cut), the same call continues it, and `manifest.json` is always that of a whole harvest.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae._files.read import TensorFile, check_seal, read_bytes, read_json
from fastsae._files.read import field as value_of
from fastsae._files.write import (
    publish,
    sealed,
    staging,
    sync,
    write_atomic,
    write_json,
    write_tensors,
)

FORMAT = "fastsae-activations"
VERSION = 2
COLUMNS = ("token_ids", "doc_ids", "positions")
STORED = ("float16", "bfloat16", "float32", "int8")
"""What activations are stored as; int8 with one scale for each row."""
SPLITS = ("train", "val")
MANIFEST, PARTIAL, OLD = "manifest.json", "manifest.partial.json", "manifest.old.json"
SHARD = re.compile(r"shard-(\d{5,})\.safetensors")
WAITING = re.compile(r"waiting-(train|val)-(\d{5,})\.safetensors")
OWNER = "ActivationStore"


@dataclass
class Shard:
    """One file of the store: its rows are all of one split."""

    file: str
    rows: int
    split: str
    seal: str | None = None
    """Checksum of the whole file; None: of a version that wrote none."""


@dataclass
class Manifest:
    """What a store holds; `manifest.json` is this class with format, version and checksum."""

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
    """Reason ("prefix", "skipped", "norm", "elsewhere") -> number of rows not stored."""
    complete: bool = False
    """False until the harvest has come to its end."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The other arguments of `harvest` on which the rows depend, and a checksum of the model."""
    checks: dict[str, Any] = field(default_factory=dict)
    """Site -> the verdict of `fastsae.models.check_sites` on it, as JSON values."""
    kinds: list[str] = field(default_factory=list)
    """Names of the codes in the column `kinds`; empty: there is none, all rows are of text."""
    parts: list[dict[str, Any]] = field(default_factory=list)
    """A checksum of the documents and the number of rows of each call that stored some."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Whatever the caller of `harvest` wanted to remember."""

    def rows(self, split: str) -> int:
        """Return the number of stored rows of a split."""
        return sum(shard.rows for shard in self.shards if shard.split == split)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `manifest.json`."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def read(cls, folder: Path, *, partial: bool = False) -> Manifest:
        """Read the manifest of `folder`.

        Args:
            folder: of a harvest.
            partial: take that of an interrupted harvest too.

        Raises:
            FileNotFoundError: there is no manifest.
            ValueError: it is damaged, not a manifest of fastsae, of a newer version, or of an
                interrupted harvest.
        """
        path = folder / MANIFEST
        if not path.exists() and (folder / PARTIAL).exists():
            path = folder / PARTIAL
        if not path.exists():
            raise FileNotFoundError(f"{OWNER}: expected a harvest in {folder}, found no {MANIFEST}")
        manifest, _ = read_manifest(path)
        if not (manifest.complete or partial):
            rows = sum(shard.rows for shard in manifest.shards)
            raise ValueError(
                f"{OWNER}: expected a complete harvest in {folder}, got an interrupted one of "
                f"{rows} rows; run the same harvest again to continue it, or use what is there "
                "with partial=True (--partial)"
            )
        return manifest


def read_manifest(path: Path) -> tuple[Manifest, dict[str, Any]]:
    """Return the manifest in the file `path`, and what the file holds besides."""
    values = read_json(path, OWNER)
    if values.pop("format", None) != FORMAT:
        raise ValueError(f"{OWNER}: {path} is not a manifest of {FORMAT}")
    version = values.get("version")
    if version not in (1, VERSION):
        raise ValueError(
            f"{OWNER}: expected version {VERSION} of the format in {path}, got {version!r}; "
            "update fastsae"
        )
    if version != 1 or "checksum" in values:  # the number itself may be what was damaged
        check_seal({"format": FORMAT, **values}, path, OWNER)
    for name in ("version", "checksum"):
        values.pop(name, None)
    named: dict[str, Any] = {}
    for name, kind in (
        ("model", str),
        ("dtype", str),
        ("sites", dict),
        ("context", int),
        ("prefix_id", int),
        ("drop_prefix", int),
        ("max_norm", dict),
        ("shards", list),
        ("documents", dict),
        ("dropped", dict),
        ("complete", bool),
        ("meta", dict),
        *([("settings", dict)] if version != 1 else []),
    ):
        named[name] = value_of(values, name, kind, path, OWNER)
        del values[name]
    value_of(named, "dtype", str, path, OWNER, choices=STORED)
    for name, kind, least in (
        ("sites", int, 1),
        ("max_norm", float, 0),
        ("documents", int, 0),
        ("dropped", int, 0),
    ):
        for key in named[name]:
            value_of(named[name], key, kind, path, OWNER, least=least)
    for name, kind in (
        ("checks", dict),
        ("kinds", list),
        ("parts", list),
    ):  # earlier versions had none
        named[name] = value_of(values, name, kind, path, OWNER) if name in values else kind()
        values.pop(name, None)
    named["shards"] = [shard_from(shard, SHARD, path, version) for shard in named["shards"]]
    return Manifest(**named), values


def shard_from(values: Any, names: re.Pattern[str], path: Path, version: int = VERSION) -> Shard:
    """Return the entry of a manifest `path`; a file is a name in the folder, nothing else."""
    if not isinstance(values, dict):
        raise ValueError(f"{OWNER}: expected shards in {path} to be objects, got {values!r}")
    shard = Shard(
        value_of(values, "file", str, path, OWNER),
        value_of(values, "rows", int, path, OWNER, least=1),
        value_of(values, "split", str, path, OWNER, choices=SPLITS),
        value_of(values, "seal", str, path, OWNER) if version != 1 else None,
    )
    if not names.fullmatch(shard.file):
        raise ValueError(
            f"{OWNER}: expected a file like {_example(names)} in {path}, got {shard.file!r}"
        )
    return shard


def open_shard(folder: Path, shard: Shard) -> TensorFile:
    """Return the file of a shard, which is inside its folder, and the one that was written.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, another file, or a link that leads elsewhere.
    """
    path = folder / shard.file
    if path.is_symlink() and not _stays(path, folder):
        raise ValueError(f"{OWNER}: expected {path} inside its folder, got a link to elsewhere")
    return TensorFile(path, OWNER, shard.seal)


def _stays(path: Path, folder: Path) -> bool:
    """Return whether a link ends in its folder, or among the blobs of a Hugging Face cache."""
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    return any(path.resolve().is_relative_to(place) for place in allowed)


def _example(names: re.Pattern[str]) -> str:
    return "shard-00000.safetensors" if names is SHARD else "waiting-val-00000.safetensors"


class ShardWriter:
    """Collects rows per split and writes a shard whenever `shard_rows` of them are there.

    Args:
        folder: of the harvest, locked.
        manifest: what is known so far; shards are added.
        shard_rows: rows per file.
        first: number of the first shard.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, shard_rows: int, *, first: int = 0
    ) -> None:
        self.folder, self.manifest, self.shard_rows, self.first = (
            folder,
            manifest,
            shard_rows,
            first,
        )
        self.has_news = False
        """Whether a shard was written since the last `save`."""
        self.waiting: dict[str, list[dict[str, Tensor]]] = {split: [] for split in SPLITS}
        self.saved: list[Shard] = []
        """Files of waiting rows, as the partial manifest names them."""
        self._unsaved: dict[str, int] = dict.fromkeys(SPLITS, 0)  # parts at the end of `waiting`
        self._number = 0
        self._declared = False  # the partial manifest is there: files from `first` on are ours

    def add(self, split: str, columns: dict[str, Tensor]) -> None:
        """Add rows: every tensor of `columns` has the same first dimension."""
        if not len(columns["token_ids"]):
            return
        self.waiting[split].append(columns)
        self._unsaved[split] += 1
        while self._rows_waiting(split) >= self.shard_rows:
            self._write(split, self.shard_rows)
            self.has_news = True

    def save(self, progress: dict[str, Any]) -> None:
        """Write what waits, and the partial manifest with `progress`: all up to now is kept."""
        self.has_news = False
        for split in SPLITS:
            count = self._unsaved[split]
            if count:
                columns = _together(self.waiting[split][-count:])
                name = f"waiting-{split}-{self._number:05d}.safetensors"
                self._number += 1
                self.saved.append(self._put(name, columns, split))
                self._unsaved[split] = 0
        self._write_partial(progress)
        self._remove_unnamed()

    def restore(self, saved: list[Shard], number: int) -> None:
        """Take up the rows that `save` wrote."""
        self.saved, self._number, self._declared = saved, number, True
        for shard in saved:
            file = open_shard(self.folder, shard)
            self.waiting[shard.split].append(file.tensors())

    def close(self, before: Sequence[Shard] = ()) -> None:
        """Write what is left and put the manifest of a complete store in place of an old one.

        Args:
            before: shards of the old one that stay, in front of the new ones.
        """
        for split in SPLITS:
            if rows := self._rows_waiting(split):
                self._write(split, rows)
        self.manifest.shards = [*before, *self.manifest.shards]
        self.manifest.complete = True
        if (self.folder / MANIFEST).exists():
            write_atomic(self.folder / OLD, read_bytes(self.folder / MANIFEST, OWNER))
        write_json(self.folder / MANIFEST, sealed(self.manifest.to_dict()))
        clean_up(self.folder)

    def discard(self) -> None:
        """Remove all that was written, such that an old store is as it was."""
        for name in files_of_harvest(self.folder, self.first):
            (self.folder / name).unlink()
        (self.folder / PARTIAL).unlink(missing_ok=True)
        sync(self.folder)

    def _rows_waiting(self, split: str) -> int:
        return sum(len(part["token_ids"]) for part in self.waiting[split])

    def _write(self, split: str, rows: int) -> None:
        columns = _together(self.waiting[split])
        name = f"shard-{self.first + len(self.manifest.shards):05d}.safetensors"
        head = {name: column[:rows] for name, column in columns.items()}
        self.manifest.shards.append(self._put(name, head, split))
        rest = {name: column[rows:].clone() for name, column in columns.items()}
        self.saved = [shard for shard in self.saved if shard.split != split]
        self.waiting[split] = [rest] if len(rest["token_ids"]) else []
        self._unsaved[split] = len(self.waiting[split])

    def _put(self, name: str, columns: dict[str, Tensor], split: str) -> Shard:
        if not self._declared:
            self._write_partial({})
            self._remove_unnamed()
            self._declared = True
        try:
            with staging(self.folder) as stage:
                seal = write_tensors(stage / name, columns)
                publish(stage, self.folder, [name])
        except OSError as error:
            raise self._full(error, name) from None
        return Shard(name, len(columns["token_ids"]), split, seal)

    def _write_partial(self, progress: dict[str, Any]) -> None:
        state = {"waiting": [asdict(s) for s in self.saved], "number": self._number}
        values = {**self.manifest.to_dict(), "first": self.first, **state, "progress": progress}
        try:
            write_json(self.folder / PARTIAL, sealed(values))
        except OSError as error:
            raise self._full(error, PARTIAL) from None

    def _remove_unnamed(self) -> None:
        """Remove what this harvest, or one that it begins anew, wrote and no manifest names."""
        named = {shard.file for shard in [*self.saved, *self.manifest.shards]}
        for name in set(files_of_harvest(self.folder, self.first)) - named:
            (self.folder / name).unlink()

    def _full(self, error: OSError, name: str) -> OSError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        with suppress(OSError, ValueError):
            kept, _ = read_manifest(self.folder / PARTIAL)
            rows = sum(shard.rows for shard in kept.shards)
            return OSError(
                error.errno,
                f"harvest: disk full while writing {name}; {len(kept.shards)} complete shards "
                f"({rows} rows) are kept in {self.folder}; the same call continues",
            )
        return OSError(error.errno, f"harvest: disk full while writing {name} in {self.folder}")


def clean_up(folder: Path) -> None:
    """Finish what a harvest may have been killed in: remove what its manifests have replaced.

    Only files that a manifest of ours names, or that a harvest in progress made, are removed.
    """
    new = read_manifest(folder / MANIFEST)[0] if (folder / MANIFEST).exists() else None
    if new is not None and (folder / OLD).exists():
        old, _ = read_manifest(folder / OLD)
        for name in {s.file for s in old.shards} - {s.file for s in new.shards}:
            (folder / name).unlink(missing_ok=True)
        sync(folder)
        (folder / OLD).unlink()
    if new is not None and (folder / PARTIAL).exists():
        part, values = read_manifest(folder / PARTIAL)
        if _is_start_of(part, values["first"], new):
            for name in files_of_harvest(folder, None):
                (folder / name).unlink()
            (folder / PARTIAL).unlink()
    sync(folder)


def files_of_harvest(folder: Path, first: int | None) -> list[str]:
    """Return the waiting files in `folder`, and the shards from number `first` on."""
    found = []
    for name in os.listdir(folder):
        number = shard_number(name)
        if WAITING.fullmatch(name) or (
            first is not None and number is not None and number >= first
        ):
            found.append(name)
    return sorted(found)


def foreign_files(folder: Path, known: set[str]) -> list[str]:
    """Return the files in `folder` that a harvest would write over and that are not in `known`."""
    return sorted(set(files_of_harvest(folder, 0)) - known)


def shard_number(name: str) -> int | None:
    """Return the number in the name of a shard, None if it is not one."""
    found = SHARD.fullmatch(name)
    return int(found[1]) if found else None


def _is_start_of(part: Manifest, first: int, whole: Manifest) -> bool:
    """Return whether the harvest that wrote `part` is the one that ended in `whole`."""
    same = part.settings == whole.settings and part.meta == whole.meta
    own = [shard for shard in whole.shards if (shard_number(shard.file) or 0) >= first]
    begins = own and shard_number(own[0].file) == first
    return bool(same and begins and part.shards == own[: len(part.shards)])


def _together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
