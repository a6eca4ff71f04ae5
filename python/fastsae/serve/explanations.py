"""Explanations of latents, from a file that may grow while it is shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from fastsae._files.read import read_bytes, visible


class Explained(NamedTuple):
    """What is known of a latent in words."""

    text: str
    scores: dict[str, float]


class Explanations:
    """The lines of `explanations.jsonl`, as `fastsae.interpret` writes them, or anybody:

        {"latent": 7, "explanation": "names of rivers", "scores": {"detection": 0.81}}

    The last line of a latent counts; an empty explanation is none. The file may be written to
    meanwhile: it is read again when it has changed, and a line without its end is left for then.

    Args:
        path: the file; one that is not there holds nothing.
        d_sae: number of latents.

    Raises:
        ValueError: a line is something else; also by `current`.
    """

    def __init__(self, path: Path, d_sae: int) -> None:
        self.path, self._d_sae, self._lock = path, d_sae, Lock()
        self._state: tuple[int, int] | None = None
        self._held: dict[int, Explained] = {}
        self.current()

    def current(self) -> dict[int, Explained]:
        """Return what the file holds now, by latent; do not change it."""
        with self._lock:
            try:
                stat = self.path.stat()
            except FileNotFoundError:
                state = None
            else:
                state = stat.st_mtime_ns, stat.st_size
            if state != self._state:
                self._held = {} if state is None else self._read()
                self._state = state
            return self._held

    def scores(self) -> list[str]:
        """Return the names of all scores, sorted."""
        return sorted({name for found in self.current().values() for name in found.scores})

    def _read(self) -> dict[int, Explained]:
        found = {}
        *lines, _ = read_bytes(self.path, "serve").decode(errors="replace").split("\n")
        for number, line in enumerate(lines, 1):
            head = number == 1 and line.startswith('{"interpretations":')
            if line.strip() and not head:
                latent, explained = self._line(number, line)
                found[latent] = explained
        return {latent: explained for latent, explained in found.items() if explained.text}

    def _line(self, number: int, line: str) -> tuple[int, Explained]:
        try:
            value = json.loads(line)
            latent, text = value["latent"], value["explanation"]
            given = (value.get("scores") or {}).items()
            scores = {str(k): float(v) for k, v in given if v is not None}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            latent, text, scores = None, None, {}
        if type(latent) is not int or not isinstance(text, str):
            raise ValueError(
                f"serve: expected line {number} of {self.path} to be a JSON object with latent, "
                f"explanation and maybe scores, got {line[:60]!r}"
            )
        if not 0 <= latent < self._d_sae:
            raise ValueError(
                f"serve: expected latents in 0..{self._d_sae - 1} in {self.path}, got {latent} in "
                f"line {number}"
            )
        return latent, Explained(
            visible(text), {k: v for k, v in scores.items() if math.isfinite(v)}
        )
