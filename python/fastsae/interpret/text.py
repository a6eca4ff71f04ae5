"""Contexts as text, with the tokens on which a latent fires marked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby

from fastsae.analysis.examples import Context

Decode = Callable[[list[int]], str]
"""Token ids to text, such as `tokenizer.decode`."""

OPEN, CLOSE = "<<", ">>"
THRESHOLD = 0.3
"""Tokens of less than this share of the peak of their window are not marked."""


def plain(context: Context, decode: Decode) -> str:
    """Return the text of a context."""
    return decode(context.token_ids)


def active(context: Context) -> list[bool]:
    """Return which tokens are strong enough to be marked."""
    least = THRESHOLD * context.acts[context.peak]
    return [act > 0 and act >= least for act in context.acts]


def marked(context: Context, decode: Decode, which: Sequence[bool]) -> str:
    """Return the text with runs of tokens between `<<` and `>>`."""
    out = []
    pairs = zip(context.token_ids, which, strict=True)
    for inside, run in groupby(pairs, key=lambda pair: pair[1]):
        text = decode([token for token, _ in run])
        out.append(f"{OPEN}{text}{CLOSE}" if inside else text)
    return "".join(out)


def strengths(context: Context, decode: Decode, largest: float) -> list[tuple[str, int]]:
    """Return the tokens on which a latent fires, with strengths from 1 to 10 of its largest."""
    return [
        (decode([token]), min(10, math.ceil(10 * act / largest)))
        for token, act in zip(context.token_ids, context.acts, strict=True)
        if act > 0
    ]
