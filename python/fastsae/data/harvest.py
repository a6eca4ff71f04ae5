"""Harvest: run a language model over documents and store its activations on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.data.shards import COLUMNS, Manifest, ShardWriter
from fastsae.models.chunks import Chunk, chunks, held_out, pad, prefix_token
from fastsae.models.sites import Site, read, read_gradients, resolve


def harvest(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    sites: str | Sequence[str],
    out: str | os.PathLike[str],
    *,
    context: int = 256,
    batch_size: int = 8,
    drop_prefix: int = 1,
    prefix_id: int | None = None,
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
        model: a causal language model of `transformers`; put into eval mode meanwhile.
        tokenizer: its tokenizer.
        texts: one string per document; may be a generator, is read once.
        sites: one site or several, see `fastsae.models.sites`.
        out: folder to write; created if missing.
        context: tokens per chunk, the prefix included.
        batch_size: chunks per forward pass.
        drop_prefix: positions at the start of a chunk that are not stored. The first position is an
            attention sink, whose norm is about 100 times the usual one; it would dominate the loss.
        prefix_id: token put in front of every chunk; None takes the tokenizer's BOS, else its EOS.
        max_tokens: stop once this many rows are stored, train and validation together.
        dtype: float16 | bfloat16 | float32, of the stored activations.
        max_norm_ratio: drop a token whose norm at some site is above this many times the median of
            the first batch. Some models grow a second attention sink on an early token: a few rows
            in 100,000 that carry 20 % of the variance. 3 drops those and nothing else.
        gradients: also store, as site `grad.NAME`, the gradient of the summed next-token loss of a
            chunk in each activation: what `GradientSAE` trains on. Needs bfloat16 or float32, since
            float16 flushes small gradients to zero, and a whole forward and backward pass.
        val_fraction: share of the documents kept for validation, in [0, 1).
        shard_rows: rows per file.
        overwrite: replace a complete harvest in `out`; an incomplete one is always replaced.
        meta: anything that can be JSON, kept in the manifest.
        progress: called with the number of rows stored, once per batch.

    Returns:
        The manifest, as written to `out`.

    Raises:
        ValueError: a bad argument, an unknown site, no text, an activation that is not finite or
            does not fit `dtype`.
        FileExistsError: `out` holds a complete harvest and `overwrite` is False.
        OSError: the disk is full; the shards written so far are kept and stay readable.
    """
    names = [sites] if isinstance(sites, str) else list(sites)
    _check(names, context, drop_prefix, val_fraction, shard_rows, batch_size, max_tokens)
    if gradients and dtype == torch.float16:
        raise ValueError("harvest: expected dtype bfloat16 or float32 with gradients, got float16")
    found = [resolve(model, name) for name in names]
    prefix = prefix_token(tokenizer) if prefix_id is None else prefix_id
    folder = _prepare(Path(out), overwrite)
    config = getattr(model, "config", None)
    manifest = Manifest(
        model=getattr(config, "_name_or_path", "") or type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        context=context,
        prefix_id=prefix,
        drop_prefix=drop_prefix,
        dropped={"prefix": 0, "norm": 0},
        meta=meta or {},
    )
    writer = ShardWriter(folder, manifest, shard_rows)
    seen: dict[str, set[int]] = {"train": set(), "val": set()}
    left = max_tokens
    training = model.training
    model.eval()
    try:
        for batch in _batched(chunks(tokenizer, texts, context, prefix), batch_size):
            columns = _rows(model, found, batch, manifest, max_norm_ratio, dtype, gradients)
            columns = {name: column[:left] for name, column in columns.items()}
            rows = len(columns["token_ids"])
            docs = columns["doc_ids"].tolist()
            is_val = torch.tensor([held_out(doc, val_fraction) for doc in docs], dtype=torch.bool)
            for split, mask in (("train", ~is_val), ("val", is_val)):
                seen[split].update(columns["doc_ids"][mask].unique().tolist())
                manifest.documents[split] = len(seen[split])
                writer.add(split, {name: column[mask] for name, column in columns.items()})
            if progress:
                progress(rows)
            if left is not None:
                left -= rows
                if left == 0:
                    break
    finally:
        model.train(training)
    if not any(seen.values()):
        raise ValueError("harvest: expected at least one token of text, the documents gave none")
    writer.close()
    return manifest


def _rows(
    model: nn.Module,
    sites: list[Site],
    batch: list[Chunk],
    manifest: Manifest,
    max_norm_ratio: float | None,
    dtype: torch.dtype,
    gradients: bool,
) -> dict[str, Tensor]:
    """Return the columns of one batch of chunks on the CPU: real, kept tokens, chunk by chunk."""
    tokens, real = pad([chunk.ids for chunk in batch], manifest.prefix_id)
    keep = real.clone()
    keep[:, : manifest.drop_prefix] = False
    manifest.dropped["prefix"] += int((real & ~keep).sum())
    device = next(model.parameters()).device
    tokens_there = tokens.to(device)
    if gradients:
        read_acts, grads = read_gradients(model, sites, tokens_there, real.to(device))
        read_acts |= {f"grad.{name}": g for name, g in grads.items()}
    else:
        read_acts = read(model, sites, tokens_there)
    acts = {name: x[keep.to(x.device)].cpu() for name, x in read_acts.items()}
    position = torch.arange(tokens.shape[1]).expand(tokens.shape)
    doc = torch.tensor([chunk.doc for chunk in batch]).unsqueeze(1).expand(tokens.shape)
    columns = dict(zip(COLUMNS, (tokens[keep], doc[keep], position[keep]), strict=True))
    columns = {name: column.int() for name, column in columns.items()}
    kept = torch.ones(len(columns["token_ids"]), dtype=torch.bool)
    for name, x in acts.items():
        manifest.sites.setdefault(name, x.shape[1])
        norm = x.float().norm(dim=1)
        if not norm.isfinite().all():
            raise ValueError(f"harvest: site {name} gave an activation that is not finite")
        if max_norm_ratio is not None and len(norm) and not name.startswith("grad."):
            limit = manifest.max_norm.setdefault(name, max_norm_ratio * float(norm.median()))
            kept &= norm <= limit
    manifest.dropped["norm"] += int((~kept).sum())
    for name, x in acts.items():
        x = x[kept]
        if x.numel() and (largest := float(x.abs().max())) > torch.finfo(dtype).max:
            raise ValueError(
                f"harvest: site {name} holds {largest:.0f}, more than the {manifest.dtype} maximum "
                f"{torch.finfo(dtype).max:.0f}; use dtype bfloat16 or float32"
            )
        columns[f"acts.{name}"] = x.to(dtype)
    return {name: c if name.startswith("acts.") else c[kept] for name, c in columns.items()}


def _batched(items: Iterator[Chunk], size: int) -> Iterator[list[Chunk]]:
    while batch := list(islice(items, size)):
        yield batch


def _prepare(folder: Path, overwrite: bool) -> Path:
    """Make `folder` ready for a new harvest; remove an old one, manifest first."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "manifest.json").exists():
        if not overwrite and Manifest.read(folder).complete:
            raise FileExistsError(
                f"harvest: {folder} already holds a complete harvest; choose another folder or "
                "overwrite it"
            )
        (folder / "manifest.json").unlink()
    for old in folder.glob("shard-*.safetensors*"):
        old.unlink()
    return folder


def _check(
    sites: list[str],
    context: int,
    drop_prefix: int,
    val_fraction: float,
    shard_rows: int,
    batch_size: int,
    max_tokens: int | None,
) -> None:
    if not sites or len(set(sites)) != len(sites):
        raise ValueError(f"harvest: expected one or more different sites, got {sites}")
    if context < 2:
        raise ValueError(f"harvest: expected context >= 2, got {context}")
    if not 0 <= drop_prefix < context:
        raise ValueError(
            f"harvest: expected 0 <= drop_prefix < context = {context}, got {drop_prefix}"
        )
    if not 0 <= val_fraction < 1:
        raise ValueError(f"harvest: expected val_fraction in [0, 1), got {val_fraction}")
    numbers = {"shard_rows": shard_rows, "batch_size": batch_size, "max_tokens": max_tokens}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"harvest: expected {name} >= 1, got {value}")
