"""Stretches of text: every context of a store cut into windows of a few tokens."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

from fastsae.data import ActivationStore

ROWS_AT_ONCE = 1 << 22


class Windows:
    """The rows of a store, in the order of the text, as windows of at most `width` tokens.

    No window spans two documents or two contexts, or a token that was not stored; the last one of
    a context may be shorter.

    Args:
        store: rows in the order of the text.
        width: tokens per window.
        max_rows: rows of the store to use; None: all.
    """

    def __init__(self, store: ActivationStore, width: int, max_rows: int | None = None) -> None:
        n = len(store) if max_rows is None else min(len(store), max_rows)
        ends, tokens, documents, positions, repeats = [torch.zeros(1).long()], [], [], [], []
        seen: set[int] = set()
        for at in range(0, n, ROWS_AT_ONCE):
            span = slice(at, min(at + ROWS_AT_ONCE, n))
            ids, docs, places = store.token_ids(span), store.doc_ids(span), store.positions(span)
            starts = _starts(docs, places, width)
            stops = torch.cat([starts[1:], torch.tensor([len(ids)])])
            ends.append(stops + at)
            tokens.append(ids)
            documents.append(docs[starts])
            positions.append(places[starts])
            repeats.append(_repeats(ids, starts, stops, seen))
        none = torch.empty(0, dtype=torch.int32)
        self.bounds = torch.cat(ends)
        """Window w holds rows bounds[w] to bounds[w + 1]: int64 `[windows + 1]`."""
        self.token_ids = torch.cat([none, *tokens])
        """int32 `[n]`"""
        self.documents = torch.cat([none, *documents])
        """Of the windows: int32 `[windows]`."""
        self.positions = torch.cat([none, *positions])
        """Of their first tokens in their contexts: int32 `[windows]`."""
        self.repeated = torch.cat([none.bool(), *repeats])
        """Whether an earlier window holds the very same tokens: bool `[windows]`. Images and sound
        have none, and are never repeated."""

    def __len__(self) -> int:
        return len(self.documents)


def _starts(documents: Tensor, positions: Tensor, width: int) -> Tensor:
    """Return the first rows of windows: int64, ascending."""
    row = torch.arange(len(documents))
    new = torch.ones(len(documents), dtype=torch.bool)
    new[1:] = (documents[1:] != documents[:-1]) | (positions[1:] != positions[:-1] + 1)
    begin = torch.where(new, row, 0).cummax(0).values
    return ((row - begin) % width == 0).nonzero().flatten()


def _repeats(ids: Tensor, starts: Tensor, stops: Tensor, seen: set[int]) -> Tensor:
    data = ids.numpy()
    found = []
    for a, b in zip(starts.tolist(), stops.tolist(), strict=True):
        mark = xxhash.xxh3_64_intdigest(data[a:b].tobytes())
        found.append(mark in seen and data[a] >= 0)
        seen.add(mark)
    return torch.tensor(found, dtype=torch.bool)
