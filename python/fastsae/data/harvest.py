"""Harvest: run a language model over documents and store its activations on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsae._files.lock import locked
from fastsae._files.read import field
from fastsae._files.write import sweep
from fastsae._log import logger
from fastsae._signals import StopSignals
from fastsae.data.contexts import (
    ContextBatches,
    ContextReader,
    Rows,
    check_reading,
    weights_checksum,
)
from fastsae.data.shards import (
    COLUMNS,
    MANIFEST,
    PARTIAL,
    SPLITS,
    WAITING,
    Manifest,
    ShardWriter,
    clean_up,
    files_of_harvest,
    foreign_files,
    open_shard,
    read_manifest,
    shard_from,
    shard_number,
)
from fastsae.models.chunks import chunks, held_out, prefix_token
from fastsae.models.probe import evaluating

MANY = 0.01
"""Share of rows above which those dropped for their norm are no rare outliers."""


def harvest(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Any],
    sites: str | Sequence[str],
    out: str | os.PathLike[str],
    *,
    context: int = 256,
    batch_size: int = 8,
    drop_prefix: int = 1,
    prefix_id: int | None = None,
    skip_token_ids: Sequence[int] = (),
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float16,
    max_norm_ratio: float | None = None,
    gradients: bool = False,
    val_fraction: float = 0.1,
    shard_rows: int = 65536,
    overwrite: bool = False,
    meta: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Store the activations of `model` at `sites` over `texts`; read them with `ActivationStore`.

    Each document is cut into chunks of one prefix token and up to `context - 1` tokens. The forward
    pass of a chunk ends at the last site. Documents are split into train and validation as wholes:
    with `val_fraction = 0.1` every tenth document is for validation.

    Args:
        model: a language model of `transformers`; put into eval mode meanwhile. Where a row depends
            on tokens to its right, as in encoders, padding is masked.
        tokenizer: its tokenizer.
        texts: one document each: a string, token ids `[t]`, or a mapping with "text" or "input_ids"
            (rows of a dataset, also a streaming one), where "keep" says which tokens are stored.
            May be a generator, is read once.
        sites: one site or several, see `fastsae.models.sites`.
        out: folder to write; created if missing.
        context: tokens per chunk, the prefix included.
        batch_size: chunks per forward pass.
        drop_prefix: positions at the start of a chunk that are not stored. The first position is an
            attention sink, whose norm is about 100 times the usual one; it would dominate the loss.
        prefix_id: token put in front of every chunk; None takes the tokenizer's BOS, else its EOS.
        skip_token_ids: tokens whose rows are not stored, such as those of a chat template.
        max_tokens: stop once this many rows are stored, train and validation together.
        dtype: float16 | bfloat16 | float32, of the stored activations.
        max_norm_ratio: drop a token whose norm at some site is above this many times the median of
            the first 4,096 rows or more. Some models grow a second attention sink on an early
            token: a few rows in 100,000 that carry 20 % of the variance. 3 drops those and nothing
            else. More than a hundredth dropped is a warning.
        gradients: also store, as site `grad.NAME`, the gradient of the summed next-token loss of a
            chunk in each activation: what `GradientSAE` trains on. Needs bfloat16 or float32, since
            float16 flushes small gradients to zero, and a whole forward and backward pass.
        val_fraction: share of the documents kept for validation, in [0, 1).
        shard_rows: rows per file.
        overwrite: begin anew, and replace the harvest that is in `out` once the new one is whole.
            Otherwise an interrupted harvest of the same settings and documents is continued, and
            ends in the same bytes as one that was never interrupted.
        meta: anything that can be JSON, kept in the manifest.
        progress: called with the number of rows stored, once per batch.

    Returns:
        The manifest, as written to `out`.

    Raises:
        ValueError: a bad argument, an unknown site, no text, an activation that is not finite or
            does not fit `dtype`, or `out` holds an interrupted harvest of other settings or
            documents.
        FileExistsError: `out` holds a complete harvest and `overwrite` is False, or files that
            would be written over and are not those of a harvest.
        RuntimeError: another process harvests into `out`.
        OSError: the disk is full; what was written so far is kept, and the same call continues.
        KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP, after all rows so far are on the disk.
    """
    names = [sites] if isinstance(sites, str) else list(sites)
    check_reading("harvest", model, names, context, drop_prefix, batch_size, max_norm_ratio)
    _check(val_fraction, shard_rows, max_tokens, dtype, meta)
    if gradients and dtype == torch.float16:
        raise ValueError("harvest: expected dtype bfloat16 or float32 with gradients, got float16")
    prefix = prefix_token(tokenizer) if prefix_id is None else prefix_id
    reader = ContextReader(
        model,
        names,
        prefix_id=prefix,
        drop_prefix=drop_prefix,
        skip_token_ids=skip_token_ids,
        gradients=gradients,
    )
    config = getattr(model, "config", None)
    manifest = Manifest(
        model=getattr(config, "_name_or_path", "") or type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        context=context,
        prefix_id=prefix,
        drop_prefix=drop_prefix,
        dropped={"prefix": 0, "skipped": 0, "norm": 0},
        documents=dict.fromkeys(SPLITS, 0),
        settings={
            "sites": names,
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "max_norm_ratio": max_norm_ratio,
            **({"skip_token_ids": reader.skip_token_ids} if reader.skip_token_ids else {}),
            "gradients": gradients,
            "val_fraction": val_fraction,
            "shard_rows": shard_rows,
            "weights": weights_checksum(model),
        },
        checks=reader.checks,
        meta=json.loads(json.dumps(meta or {})),
    )
    folder = Path(out)
    batches = ContextBatches(chunks(tokenizer, texts, context, prefix), batch_size)
    with locked(folder, "harvest"):
        sweep(folder)
        clean_up(folder)
        run = _Harvest(folder, manifest, max_tokens, overwrite)
        run.skip(batches)
        with evaluating(model):
            if progress and run.rows:
                progress(run.rows)
            if max_norm_ratio is not None and not manifest.max_norm:
                reader.limit_norms(batches, max_norm_ratio)
                manifest.max_norm = reader.max_norm
            reader.max_norm = manifest.max_norm
            with StopSignals() as stop:
                for batch in batches:
                    if run.left == 0:
                        break
                    columns = _columns(reader.read(batch), manifest, dtype)
                    rows = run.add(columns, batches)
                    if progress:
                        progress(rows)
                    if stop.received:
                        run.save(batches)
                        raise KeyboardInterrupt(
                            f"{stop.received} after {run.rows} rows; they are in {folder}, and the "
                            "same call continues"
                        )
        if not run.rows:
            raise ValueError(
                "harvest: expected at least one token of text, the documents gave none"
            )
        run.close()
        _warn_of_drops(manifest)
    if stop.received:
        raise KeyboardInterrupt(f"{stop.received}; the harvest in {folder} is complete")
    return manifest


class _Harvest:
    """A harvest into a folder: one that is new, or the continuation of an interrupted one."""

    def __init__(
        self, folder: Path, manifest: Manifest, max_tokens: int | None, overwrite: bool
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self.left, self.rows = max_tokens, 0
        self._last_doc = dict.fromkeys(SPLITS, -1)
        self._resumed: dict[str, Any] | None = None
        done, part = folder / MANIFEST, folder / PARTIAL
        known: set[str] = set()
        first = None
        if part.exists():
            begun, state = read_manifest(part)
            first = field(state, "first", int, part, "harvest", least=0)
            known |= set(files_of_harvest(folder, first))
            if not overwrite and (begun.shards or state.get("waiting")):
                self._resume(begun, state, part)
        if done.exists():
            old, _ = read_manifest(done)
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

    def skip(self, batches: ContextBatches) -> None:
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
                "others; overwrite=True (--overwrite) begins anew"
            )

    def add(self, columns: dict[str, Tensor], batches: ContextBatches) -> int:
        """Store the rows of the batch just taken; return how many."""
        columns = {name: column[: self.left] for name, column in columns.items()}
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

    def save(self, batches: ContextBatches) -> None:
        """Put everything up to the batch just taken on the disk."""
        self._writer.save(
            {
                "batches": batches.count,
                "documents": batches.checksum(),
                "last_doc": self._last_doc,
                "rows": self.rows,
            }
        )

    def close(self) -> None:
        """Complete the store."""
        self._writer.close()

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
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"harvest: expected {name} = {theirs.get(name)!r} as in the interrupted "
                    f"harvest in {self.folder}, got {value!r}; overwrite=True (--overwrite) begins "
                    "anew"
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
        names = ("model", "dtype", "context", "prefix_id", "drop_prefix", "meta")
        values = {name: getattr(manifest, name) for name in names} | manifest.settings
        about: dict[str, Any] = json.loads(json.dumps(values))
        return about


def _warn_of_drops(manifest: Manifest) -> None:
    """Log a warning if many rows had a large norm: then they are no rare outliers."""
    stored = sum(manifest.rows(split) for split in SPLITS)
    dropped = manifest.dropped["norm"]
    if dropped > MANY * (stored + dropped):
        logger.warning(
            "harvest: %d of %d rows were dropped for their norm (max_norm_ratio = %s), more than "
            "rare outliers are; what was stored does not stand for the model's activations",
            dropped,
            stored + dropped,
            manifest.settings["max_norm_ratio"],
        )


def _columns(rows: Rows, manifest: Manifest, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the columns of a batch as they are stored, and count what was dropped."""
    for reason, count in rows.dropped.items():
        manifest.dropped[reason] = manifest.dropped.get(reason, 0) + count
    numbers = (rows.tokens, rows.documents, rows.positions)
    columns = {name: x.int() for name, x in zip(COLUMNS, numbers, strict=True)}
    for name, x in rows.acts.items():
        manifest.sites.setdefault(name, x.shape[1])
        if x.numel() and (largest := float(x.abs().max())) > torch.finfo(dtype).max:
            raise ValueError(
                f"harvest: site {name} holds {largest:.0f}, more than the {manifest.dtype} maximum "
                f"{torch.finfo(dtype).max:.0f}; use dtype bfloat16 or float32"
            )
        columns[f"acts.{name}"] = x.to(dtype)
    return columns


def _check(
    val_fraction: float,
    shard_rows: int,
    max_tokens: int | None,
    dtype: torch.dtype,
    meta: dict[str, Any] | None,
) -> None:
    if not 0 <= val_fraction < 1:
        raise ValueError(f"harvest: expected val_fraction in [0, 1), got {val_fraction}")
    for name, value in {"shard_rows": shard_rows, "max_tokens": max_tokens}.items():
        if value is not None and value < 1:
            raise ValueError(f"harvest: expected {name} >= 1, got {value}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"harvest: expected dtype float16, bfloat16 or float32, got {dtype}")
    try:
        json.dumps(meta or {}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"harvest: expected meta to be JSON ({error})") from None
