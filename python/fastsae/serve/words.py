"""Tokens as text that can be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastsae._files.read import visible


class Words:
    """The text of tokens, line breaks and control characters visible.

    Args:
        tokenizer: with `decode([id])`, and called to make tokens of text; None: tokens are shown by
            their numbers.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """Return the text of a token."""
        if token not in self._known:
            named = self.tokenizer is not None and token >= 0  # -1: of an image or sound
            text = self.tokenizer.decode([token]) if named else f"[{token}]"
            self._known[token] = visible(str(text))
        return self._known[token]

    def of(self, tokens: Sequence[int]) -> list[str]:
        """Return the texts of some tokens."""
        return [self(token) for token in tokens]

    def spellings(self, text: str) -> list[list[int]]:
        """Return the tokens of a text in the ways in which it may occur: as it is and after a
        space, with small letters, and with a capital one in front; none that the tokenizer has no
        token for."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        forms = [text, text.lower(), text[:1].upper() + text[1:]]
        found = []
        for form in [form for x in forms for form in (x, f" {x}")]:
            ids = list(self.tokenizer(form, add_special_tokens=False)["input_ids"])
            if ids and ids not in found and (unknown is None or unknown not in ids):
                found.append(ids)
        return found
