"""Documents cut into contexts: one prefix token, then up to `context - 1` tokens of one document.

The first position of a causal model is an attention sink: its activation has a norm 100 times that
of the others and says nothing about the text. Each chunk starts with a prefix token that takes this
role, so that position can be dropped and no real token is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """A context: `ids` with the prefix token first, from document number `doc`."""

    ids: list[int]
    doc: int
    keep: list[bool] | None = None
    """Which of them are wanted; None: all."""


def prefix_token(tokenizer: Any) -> int:
    """Return the token put in front of every chunk: the tokenizer's BOS, else its EOS.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    raise ValueError("harvest: expected a tokenizer with a BOS or EOS token, got one with neither")


def chunks(
    tokenizer: Any, texts: Iterable[Any], context: int, prefix: int | None = None
) -> Iterator[Chunk]:
    """Tokenize documents and cut each into chunks of at most `context` tokens.

    The last chunk of a document may be shorter; no token is lost and no chunk spans two documents.

    Args:
        tokenizer: called as `tokenizer(text, add_special_tokens=False)["input_ids"]`; not needed
            for documents of tokens.
        texts: a document each: a string; token ids, as a list, array or tensor `[t]`; or a mapping
            with "text" or "input_ids", as rows of a dataset are. A mapping of ids may have "keep",
            a truth value for each of them, which says what is wanted, such as the tokens of a
            user's turns. A prefix token that the ids begin with is not doubled. An empty document
            gives no chunk.
        context: tokens per chunk, the prefix included; at least 2.
        prefix: token put first; None takes `prefix_token(tokenizer)`.

    Raises:
        TypeError: `texts` is one string, or a document is something else.
        ValueError: "keep" is of another length than the ids.
    """
    if isinstance(texts, str):
        raise TypeError("harvest: expected texts to be an iterable of documents, got one str")
    prefix = prefix_token(tokenizer) if prefix is None else prefix
    for doc, text in enumerate(texts):
        ids, keep = _tokens(tokenizer, text, doc)
        if ids and ids[0] == prefix and not isinstance(text, str):
            ids, keep = ids[1:], keep and keep[1:]
        for start in range(0, len(ids), context - 1):
            part = slice(start, start + context - 1)
            wanted = None if keep is None else [False, *keep[part]]
            yield Chunk([prefix, *ids[part]], doc, wanted)


def _tokens(tokenizer: Any, document: Any, number: int) -> tuple[list[int], list[bool] | None]:
    """Return the token ids of a document, and which of them are wanted."""
    keep = None
    if isinstance(document, Mapping):
        keep = document.get("keep")
        document = document.get("input_ids", document.get("text"))
    if isinstance(document, str):
        if keep is not None:
            raise TypeError(f"harvest: expected input_ids with keep in document {number}, got text")
        return (
            tokenizer(document, add_special_tokens=False)["input_ids"] if document else []
        ), None
    ids = _integers(document)
    if ids is None:
        raise TypeError(
            f"harvest: expected document {number} to be a str or token ids [t], got "
            f"{type(document).__name__}"
        )
    if keep is None:
        return ids, None
    keep = [bool(x) for x in keep]
    if len(keep) != len(ids):
        raise ValueError(
            f"harvest: expected keep of {len(ids)} values in document {number}, got {len(keep)}"
        )
    return ids, keep


def _integers(x: Any) -> list[int] | None:
    """Return a list of ints out of a list, array or tensor of them; None for anything else."""
    values = x.tolist() if hasattr(x, "tolist") else x
    if not isinstance(values, list | tuple):
        return None
    return list(values) if all(type(value) is int for value in values) else None


def held_out(doc: int, fraction: float) -> bool:
    """Return whether document number `doc` is for validation: every (1 / fraction)-th one is."""
    return math.floor((doc + 1) * fraction + 1e-9) > math.floor(doc * fraction + 1e-9)


def pad(ids: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Stack token lists into one batch, padded on the right.

    In a causal model a position sees only what is left of it, so padding on the right changes
    nothing at the real positions and needs no attention mask.

    Returns:
        tokens: `[n, t]`, int64, t the longest length.
        real: `[n, t]`, bool, False at padding.
    """
    lengths = torch.tensor([len(row) for row in ids])
    longest = int(lengths.max())
    tokens = torch.tensor([[*row, *[fill] * (longest - len(row))] for row in ids])
    return tokens, torch.arange(longest) < lengths.unsqueeze(1)


def spread(items: Sequence[T], n: int) -> list[T]:
    """Return up to `n` of the items, evenly spaced from the first to the last."""
    if len(items) <= n:
        return list(items)
    return [items[i * len(items) // n] for i in range(n)]
