"""A baseline without a language model: explain a latent by the tokens on which it peaks.

An explanation is a list of quoted tokens, and a text is judged by whether one of them is in it. It
says little of latents that respond to meaning, and is free: what an LLM's explanations score beyond
it is what the LLM adds.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

from fastsae.analysis.examples import Context
from fastsae.interpret.text import CLOSE, OPEN, Decode

PREFIX = "the tokens "


def keyword_explainer(contexts: Sequence[Context], decode: Decode, most: int = 3) -> str:
    """Return the tokens on which a latent peaks most often, each at least half as often as the
    first."""
    counts = Counter(decode([context.token_ids[context.peak]]) for context in contexts)
    ranked = counts.most_common(most)
    words = [token for token, count in ranked if 2 * count >= ranked[0][1]]
    return PREFIX + ", ".join(json.dumps(word, ensure_ascii=False) for word in words)


def keyword_judge(task: str, explanation: str, texts: Sequence[str]) -> list[bool | None]:
    """Return whether a quoted token is in a text; for "fuzzing", in what is marked in it."""
    quoted = re.findall(r'"(?:[^"\\]|\\.)*"', explanation)
    words = [word for word in map(_unquoted, quoted) if word]  # "" is in every text
    verdicts: list[bool | None] = []
    for text in texts:
        looked_at = [text]
        if task == "fuzzing":
            looked_at = re.findall(f"{OPEN}(.*?){CLOSE}(?!>)", text, re.DOTALL)  # "<<</p>>>" too
        verdicts.append(any(word in part for word in words for part in looked_at))
    return verdicts


def _unquoted(quoted: str) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError:  # not ours
        return quoted[1:-1]
