"""Harvest: run a language model over documents and store its activations on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsae._files.lock import locked
from fastsae._files.write import sweep
from fastsae._log import logger
from fastsae._signals import StopSignals
from fastsae.data.contexts import (
    ContextBatches,
    ContextReader,
    Rows,
    check_reading,
    check_sites_given,
    weights_checksum,
)
from fastsae.data.harvest_run import HarvestRun
from fastsae.data.inputs import InputBatches, InputReader, ModelInputs
from fastsae.data.rounding import to_int8
from fastsae.data.shards import COLUMNS, SPLITS, STORED, Manifest, clean_up
from fastsae.models.chunks import chunks, prefix_token
from fastsae.models.kinds import KINDS
from fastsae.models.probe import evaluating

MANY = 0.01
"""Share of rows above which those dropped for their norm are no rare outliers."""


def harvest(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Any] | ModelInputs,
    sites: str | Sequence[str],
    out: str | os.PathLike[str],
    *,
    context: int = 256,
    batch_size: int = 8,
    drop_prefix: int = 1,
    prefix_id: int | None = None,
    skip_token_ids: Sequence[int] = (),
    max_tokens: int | None = None,
    dtype: torch.dtype | str = torch.float16,
    max_norm_ratio: float | None = None,
    gradients: bool = False,
    val_fraction: float = 0.1,
    shard_rows: int = 65536,
    overwrite: bool = False,
    append: bool = False,
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
        tokenizer: its tokenizer; None with `ModelInputs`.
        texts: one document each: a string, token ids `[t]`, or a mapping with "text" or "input_ids"
            (rows of a dataset, also a streaming one), where "keep" says which tokens are stored.
            May be a generator, is read once. Or `ModelInputs`: batches for models of images and
            sound, whose samples are the documents; arguments about texts stay as they are then.
        sites: one site or several, see `fastsae.models.sites`.
        out: folder to write; created if missing.
        context: tokens per chunk, the prefix included.
        batch_size: chunks per forward pass.
        drop_prefix: positions at the start of a chunk that are not stored. The first position is an
            attention sink, whose norm is about 100 times the usual one; it would dominate the loss.
        prefix_id: token put in front of every chunk; None takes the tokenizer's BOS, else its EOS.
        skip_token_ids: tokens whose rows are not stored, such as those of a chat template.
        max_tokens: stop once this many rows are stored, train and validation together.
        dtype: float16 | bfloat16 | float32 | int8, of the stored activations, or its name. int8 is
            half of bfloat16: each row is rounded to 255 steps between -max |x| and max |x| of its
            own, max |x| / 127. Rows with outliers lose their small entries by it.
        max_norm_ratio: drop a token whose norm at some site is above this many times the median of
            the first 4,096 rows or more. Some models grow a second attention sink on an early
            token: a few rows in 100,000 that carry 20 % of the variance. 3 drops those and nothing
            else. More than a hundredth dropped is a warning.
        gradients: also store, as site `grad.NAME`, the gradient of the summed next-token loss of a
            chunk in each activation: what `GradientSAE` trains on. Needs bfloat16 or float32, since
            float16 and int8 flush small gradients to zero, and a whole forward and backward pass.
        val_fraction: share of the documents kept for validation, in [0, 1).
        shard_rows: rows per file.
        overwrite: begin anew, and replace the harvest that is in `out` once the new one is whole.
            Otherwise an interrupted harvest of the same settings and documents is continued, and
            ends in the same bytes as one that was never interrupted.
        append: add the rows of these documents to the complete harvest in `out`, of the same model
            and settings, whose documents they follow; `batch_size`, `max_tokens` and `shard_rows`
            may be others, and rows are dropped above the norm that was found then. Until they are
            all there the old harvest stays as it is, and the same call continues an interrupted
            addition; with `overwrite`, it begins that one anew.
        meta: anything that can be JSON, kept in the manifest.
        progress: called with the number of rows stored, once per batch.

    Returns:
        The manifest, as written to `out`.

    Raises:
        ValueError: a bad argument, an unknown site, no text, an activation that is not finite or
            does not fit `dtype`, `out` holds an interrupted harvest of other settings or documents,
            or there is nothing of the same kind to append to.
        FileExistsError: `out` holds a complete harvest and `overwrite` is False, or files that
            would be written over and are not those of a harvest.
        RuntimeError: another process harvests into `out`.
        OSError: the disk is full; what was written so far is kept, and the same call continues.
        KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP, after all rows so far are on the disk.
    """
    names = [sites] if isinstance(sites, str) else list(sites)
    dtype = _dtype(dtype, gradients)
    _check(val_fraction, shard_rows, max_tokens, meta)
    settings = {
        "sites": names,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "max_norm_ratio": max_norm_ratio,
        "gradients": gradients,
        "val_fraction": val_fraction,
        "shard_rows": shard_rows,
        "weights": weights_checksum(model),
    }
    reader: ContextReader | InputReader
    batches: Any
    if isinstance(texts, ModelInputs):
        _check_inputs(
            names, max_norm_ratio, tokenizer=(tokenizer, None), context=(context, 256),
            batch_size=(batch_size, 8), drop_prefix=(drop_prefix, 1), prefix_id=(prefix_id, None),
            skip_token_ids=(tuple(skip_token_ids), ()), gradients=(gradients, False),
        )  # fmt: skip
        batches = InputBatches(texts, getattr(model, "main_input_name", "input_ids"))
        with evaluating(model):
            reader = InputReader(model, names, texts, batches)
        context, prefix, drop_prefix = 0, 0, texts.drop_prefix
        settings |= {"batch_size": None, "kinds": texts.wanted and list(texts.wanted)}
    else:
        check_reading("harvest", model, names, context, drop_prefix, batch_size, max_norm_ratio)
        prefix = prefix_token(tokenizer) if prefix_id is None else prefix_id
        reader = ContextReader(
            model,
            names,
            prefix_id=prefix,
            drop_prefix=drop_prefix,
            skip_token_ids=skip_token_ids,
            gradients=gradients,
        )
        if reader.skip_token_ids:
            settings["skip_token_ids"] = reader.skip_token_ids
        batches = ContextBatches(chunks(tokenizer, texts, context, prefix), batch_size)
    config = getattr(model, "config", None)
    manifest = Manifest(
        model=getattr(config, "_name_or_path", "") or type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        context=context,
        prefix_id=prefix,
        drop_prefix=drop_prefix,
        dropped={"prefix": 0, "skipped": 0, "norm": 0},
        documents=dict.fromkeys(SPLITS, 0),
        settings=settings,
        checks=reader.checks,
        kinds=list(KINDS) if isinstance(texts, ModelInputs) else [],
        meta=json.loads(json.dumps(meta or {})),
    )
    folder = Path(out)
    with locked(folder, "harvest"):
        sweep(folder)
        clean_up(folder)
        run = HarvestRun(folder, manifest, max_tokens, overwrite=overwrite, append=append)
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
            what = "row" if manifest.kinds else "token of text"
            raise ValueError(f"harvest: expected at least one {what}, the documents gave none")
        run.close(batches)
        _warn_of_drops(manifest)
    if stop.received:
        raise KeyboardInterrupt(f"{stop.received}; the harvest in {folder} is complete")
    return manifest


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
    if rows.kinds is not None:
        columns["kinds"] = rows.kinds
    for name, x in rows.acts.items():
        manifest.sites.setdefault(name, x.shape[1])
        if dtype == torch.int8:
            columns[f"acts.{name}"], columns[f"scale.{name}"] = to_int8(x)
            continue
        if x.numel() and (largest := float(x.abs().max())) > torch.finfo(dtype).max:
            raise ValueError(
                f"harvest: site {name} holds {largest:.0f}, more than the {manifest.dtype} maximum "
                f"{torch.finfo(dtype).max:.0f}; use dtype bfloat16 or float32"
            )
        columns[f"acts.{name}"] = x.to(dtype)
    return columns


def _dtype(given: torch.dtype | str, gradients: bool) -> torch.dtype:
    """Return a dtype that rows can be stored in."""
    name = str(given).removeprefix("torch.")
    if name not in STORED:
        raise ValueError(f"harvest: expected dtype {', '.join(STORED)}, got {given}")
    if gradients and name in ("float16", "int8"):
        raise ValueError(f"harvest: expected dtype bfloat16 or float32 with gradients, got {name}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _check_inputs(sites: list[str], max_norm_ratio: float | None, **given: tuple[Any, Any]) -> None:
    """Raise ValueError for arguments about texts, given as pairs of value and default."""
    check_sites_given("harvest", sites, max_norm_ratio)
    for name, (value, default) in given.items():
        if value != default:
            where = "; give it to ModelInputs" if name == "drop_prefix" else ""
            got = type(value).__name__ if name == "tokenizer" else value
            raise ValueError(
                f"harvest: expected no {name} with ModelInputs, which are whole inputs of the "
                f"model, got {got}{where}"
            )


def _check(
    val_fraction: float,
    shard_rows: int,
    max_tokens: int | None,
    meta: dict[str, Any] | None,
) -> None:
    if not 0 <= val_fraction < 1:
        raise ValueError(f"harvest: expected val_fraction in [0, 1), got {val_fraction}")
    for name, value in {"shard_rows": shard_rows, "max_tokens": max_tokens}.items():
        if value is not None and value < 1:
            raise ValueError(f"harvest: expected {name} >= 1, got {value}")
    try:
        json.dumps(meta or {}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"harvest: expected meta to be JSON ({error})") from None
