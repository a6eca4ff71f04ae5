"""Stores of rows made up for a test."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastsae.data import ActivationStore
from fastsae.data.shards import Manifest, ShardWriter


def write_store(
    folder: Path, x: Tensor, token_ids: Tensor, doc_ids: Tensor, positions: Tensor
) -> ActivationStore:
    """Write rows `[n, d]` as a store of small shards."""
    manifest = Manifest(model="made up", dtype="float32", sites={"resid_post.0": x.shape[1]})
    writer = ShardWriter(folder, manifest, 700)
    columns = {"token_ids": token_ids, "doc_ids": doc_ids, "positions": positions}
    rows = {name: column.int() for name, column in columns.items()}
    writer.add("train", {**rows, "acts.resid_post.0": x})
    writer.close()
    return ActivationStore(folder)


def documents(n: int, lengths: list[int], context: int) -> tuple[Tensor, Tensor]:
    """Return documents and positions of n rows whose documents have these lengths, over and over,
    cut into contexts."""
    docs, places = [], []
    doc = 0
    while len(docs) < n:
        for i in range(lengths[doc % len(lengths)]):
            docs.append(doc)
            places.append(1 + i % context)
        doc += 1
    return torch.tensor(docs[:n]), torch.tensor(places[:n])
