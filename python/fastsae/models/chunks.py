"""Documents cut into contexts: one prefix token, then up to `context - 1` tokens of one document.

The first position of a causal model is an attention sink: its activation has a norm 100 times that
of the others and says nothing about the text. Each chunk starts with a prefix token that takes this
role, so that position can be dropped and no real token is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """A context: `ids` with the prefix token first, from document number `doc`."""

    ids: list[int]
    doc: int


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
    tokenizer: Any, texts: Iterable[str], context: int, prefix: int | None = None
) -> Iterator[Chunk]:
    """Tokenize documents and cut each into chunks of at most `context` tokens.

    The last chunk of a document may be shorter; no token is lost and no chunk spans two documents.

    Args:
        tokenizer: called as `tokenizer(text, add_special_tokens=False)["input_ids"]`.
        texts: one string per document; an empty document gives no chunk.
        context: tokens per chunk, the prefix included; at least 2.
        prefix: token put first; None takes `prefix_token(tokenizer)`.

    Raises:
        TypeError: `texts` is one string, or a document is not a string.
    """
    if isinstance(texts, str):
        raise TypeError("harvest: expected texts to be an iterable of documents, got one str")
    prefix = prefix_token(tokenizer) if prefix is None else prefix
    for doc, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"harvest: expected document {doc} to be a str, got {type(text).__name__}"
            )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        for start in range(0, len(ids), context - 1):
            yield Chunk([prefix, *ids[start : start + context - 1]], doc)


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


def spread(contexts: Sequence[list[int]], n: int) -> list[list[int]]:
    """Return up to `n` of the contexts, evenly spaced from the first to the last."""
    if len(contexts) <= n:
        return list(contexts)
    return [contexts[i * len(contexts) // n] for i in range(n)]
