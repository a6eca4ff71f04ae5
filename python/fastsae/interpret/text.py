"""Contexts as text, with the tokens on which a latent fires marked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby

from fastsae.analysis.examples import Context

Decode = Callable[[list[int]], str]
"""Token ids to text, such as `tokenizer.decode`."""

OPEN, CLOSE = "<<", ">>"
PARTIAL = "\N{REPLACEMENT CHARACTER}"
"""What decoders show of a part of a character."""
THRESHOLD = 0.3
"""Tokens of less than this share of the peak of their window are not marked."""


def plain(context: Context, decode: Decode) -> str:
    """Return the text of a context."""
    return decode(context.token_ids)


def active(context: Context) -> list[bool]:
    """Return which tokens are strong enough to be marked."""
    least = THRESHOLD * abs(context.acts[context.peak])
    return [act != 0 and abs(act) >= least for act in context.acts]


def marked(context: Context, decode: Decode, which: Sequence[bool]) -> str:
    """Return the text with runs of tokens between `<<` and `>>`.

    A run is what the text grows by, since tokens read alone may lose a space at their beginning, or
    be a part of a character. Where this is nothing it is the tokens read alone.
    """
    ids, out, end, done = context.token_ids, list[str](), 0, 0
    whole = plain(context, decode)
    for inside, run in groupby(which):
        start, end = end, end + len(list(run))
        so_far = whole if end == len(ids) else decode(ids[:end]).rstrip(PARTIAL)
        grown = so_far[done:] if whole.startswith(so_far) else ""
        text = grown or decode(ids[start:end])
        done = max(done, len(so_far))
        out.append(f"{OPEN}{text}{CLOSE}" if inside else text)
    return "".join(out)


def strengths(context: Context, decode: Decode, largest: float) -> list[tuple[str, int]]:
    """Return the tokens on which a latent fires, with strengths from 1 to 10 of its largest; those
    of negative activations are negative."""
    return [
        (decode([token]), int(math.copysign(min(10, math.ceil(10 * abs(act) / largest)), act)))
        for token, act in zip(context.token_ids, context.acts, strict=True)
        if act
    ]
