"""Explain latents and score the explanations, one line of JSON for each, resumable."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from operator import index
from pathlib import Path
from typing import Any, Self

from fastsae._files import checksum
from fastsae._files.lock import try_lock
from fastsae._files.read import read_bytes
from fastsae.analysis.examples import Context
from fastsae.data import ActivationStore
from fastsae.interpret.ask import Explainer, Judge
from fastsae.interpret.negatives import Silent
from fastsae.interpret.sample import ContextSample, spread_by_strength
from fastsae.interpret.scores import Score, detection, fuzzing
from fastsae.interpret.text import Decode
from fastsae.nn import SAE, NormalizedSAE

Scorer = Callable[[str, Sequence[Context], Sequence[Context], Decode], Score]
"""Explanation, windows with the latent, windows without it, decode."""

_Job = tuple[int, list[Context], list[Context], list[Context]]
"""A latent, windows to explain it, others to score the explanation, and windows without it."""

FEWEST = 8
"""Windows that a latent must fire in; half of them are for the explanation."""


@dataclass(frozen=True)
class Interpretation:
    """A latent in words."""

    latent: int
    explanation: str
    scores: dict[str, Score] = field(default_factory=dict)
    reason: str = ""
    """Why there is no explanation; empty if there is one."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: "latent", "explanation", "scores" (name to number), "details"."""
        found: dict[str, Any] = {"latent": self.latent, "explanation": self.explanation}
        details = {name: score.to_dict() for name, score in self.scores.items()}
        found["scores"] = {name: values["value"] for name, values in details.items()}
        found["details"] = details
        return {**found, "reason": self.reason} if self.reason else found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Interpretation:
        """Return what `to_dict` was of."""
        details = values.get("details", {})
        scores = {
            name: Score(**{**score, "value": _number(score["value"])})
            for name, score in details.items()
        }
        return cls(values["latent"], values["explanation"], scores, values.get("reason", ""))


def judge_scorers(judge: Judge, seed: int = 0) -> dict[str, Scorer]:
    """Return detection and fuzzing by a judge."""

    def detect(
        explanation: str, with_it: Sequence[Context], without: Sequence[Context], decode: Decode
    ) -> Score:
        return detection(judge, explanation, with_it, without, decode, seed)

    def fuzz(
        explanation: str, with_it: Sequence[Context], without: Sequence[Context], decode: Decode
    ) -> Score:
        return fuzzing(judge, explanation, with_it, without, decode, seed)

    return {"detection": detect, "fuzzing": fuzz}


def interpret(
    sae: SAE | NormalizedSAE,
    store: ActivationStore,
    sample: ContextSample,
    decode: Decode,
    explain: Explainer,
    scorers: Mapping[str, Scorer],
    *,
    latents: Sequence[int] | None = None,
    out: str | os.PathLike[str] | None = None,
    examples: int = 20,
    windows: int = 30,
    negatives: str = "random",
    label: str = "",
    workers: int = 1,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Interpretation]:
    """Explain latents by some of their windows, and score each explanation on others.

        judge = llm_judge(client)
        found = interpret(sae, store, sample, tokenizer.decode, llm_explainer(client),
                          judge_scorers(judge), latents=range(100), out="explanations.jsonl")

    Args:
        sae: the SAE.
        store: what the sample is of.
        sample: of `sample_contexts`; twice `windows` should be drawn.
        decode: token ids to text, such as `tokenizer.decode`.
        explain: an explainer, such as `llm_explainer(client)`; of any other kind as well.
        scorers: by name, such as `judge_scorers(llm_judge(client))`.
        latents: which ones; None: all that fire.
        out: a JSONL file, one line for each latent, written as it is found. Latents that are there
            already are not asked for again.
        examples: windows that the explainer is shown, at equal distances from the strongest to the
            weakest of those for it.
        windows: of each kind that a scorer is given; those with the latent likewise.
        negatives: "random", or "neighbors": windows of the latents with the most similar decoder
            rows, which are harder to tell apart.
        label: what explainer and scorers are, such as the name of a model; part of what `out`
            remembers.
        workers: latents that are asked for at the same time; explainers and scorers are then called
            from several threads.
        seed: of the windows at random and the order of texts.
        progress: called with 1 after each latent.

    Returns:
        In the order of `latents`. Latents in too few windows have a reason and no explanation.

    Raises:
        ValueError: a number below 1, another word, a sample of something else, a latent that is
            not there, or `out` was written with other settings or for another SAE.
        RuntimeError: another run writes to `out`.
    """
    _check(examples, windows, negatives, workers)
    if latents is None:
        latents = sample.counts.nonzero().flatten().tolist()
    latents = list(dict.fromkeys(map(index, latents)))  # of a tensor or an array as well
    if wrong := [i for i in latents if not 0 <= i < sae.d_sae]:
        raise ValueError(f"interpret: expected latents in 0..{sae.d_sae - 1}, got {wrong[0]}")
    of = [sample.about, sample.width, sample.tokens]
    settings = [of, examples, windows, negatives, label, seed, sorted(scorers)]
    silent = Silent(sae, store, sample, seed)
    find = silent.random if negatives == "random" else silent.neighbors

    def prepared(latent: int) -> Interpretation | _Job:
        shown, rest = sample.split(latent)
        if len(shown) + len(rest) < FEWEST:
            return Interpretation(latent, "", {}, "fires in too few windows")
        if not rest:
            return Interpretation(latent, "", {}, "has no windows to score on")
        others = find(latent, windows)
        if not others:
            return Interpretation(latent, "", {}, "is silent in no window that was looked at")
        held = spread_by_strength(rest, windows)
        return latent, spread_by_strength(shown, examples), held, others

    def work(given: Interpretation | _Job) -> Interpretation:
        if isinstance(given, Interpretation):
            return given
        latent, shown, held, others = given
        text = explain(shown, decode)
        if not text:
            return Interpretation(latent, "", {}, "got no explanation")
        scores = {name: scorer(text, held, others, decode) for name, scorer in scorers.items()}
        return Interpretation(latent, text, scores)

    path = None if out is None else Path(out)
    with _Log(path, checksum.of_json(settings)) as log, ThreadPoolExecutor(workers) as pool:
        jobs = (prepared(latent) for latent in latents if latent not in log.done)
        # The SAE is used by one thread only, and no more is prepared than is soon asked for.
        while part := list(islice(jobs, workers)):
            for found in pool.map(work, part):
                log.add(found)
                if progress:
                    progress(1)
    return [log.done[latent] for latent in latents]


def read_interpretations(path: str | os.PathLike[str]) -> list[Interpretation]:
    """Return what `interpret` wrote to a file; a last line that was cut short is left out.

    Raises:
        FileNotFoundError, ValueError: it is not there, or is another file.
    """
    path = Path(path)
    return list(_read(path, read_bytes(path, "interpret"), None)[0].values())


class _Log:
    """The lines of a file, which no other run writes to meanwhile: see `_read`."""

    def __init__(self, path: Path | None, settings: str) -> None:
        self.done, self._file = dict[int, Interpretation](), None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
        try:
            if not try_lock(file.fileno()):
                raise RuntimeError(
                    f"interpret: expected no other run that writes {path}, got one; wait for it, "
                    "or choose another file"
                )
            file.seek(0)
            data, whole = file.read(), 0
            head = f"{json.dumps({'interpretations': 1, 'settings': settings})}\n".encode()
            if not head.startswith(data):  # else it is new, or its first line was cut short
                self.done, whole = _read(path, data, settings)
            file.truncate(whole)
            self._file = file
            if not whole:
                self._write(head)
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, found: Interpretation) -> None:
        """Remember an interpretation, on the disk as well."""
        self.done[found.latent] = found
        self._write(f"{json.dumps(found.to_dict())}\n".encode())

    def _write(self, line: bytes) -> None:
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())


def _read(path: Path, data: bytes, settings: str | None) -> tuple[dict[int, Interpretation], int]:
    """Return what whole lines say, and how many bytes these are: the first one says what the file
    is of, then comes one for each latent."""
    whole = data.rfind(b"\n") + 1
    first, *lines = data[:whole].decode(errors="replace").split("\n")[:-1] or [""]
    _check_head(path, first, settings)
    done = {}
    for number, line in enumerate(lines, 2):
        try:
            found = Interpretation.from_dict(json.loads(line))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"interpret: expected an explanation in line {number} of {path}, got {line[:60]!r}"
            ) from None
        done[found.latent] = found
    return done, whole


def _check_head(path: Path, first: str, settings: str | None) -> None:
    try:
        head = json.loads(first)
        if head["interpretations"] != 1:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"interpret: expected {path} to hold explanations, got {first[:60]!r}"
        ) from None
    if settings is not None and head.get("settings") != settings:
        raise ValueError(
            f"interpret: expected {path} to be of this SAE, this sample and these settings, got "
            "others; choose another file"
        )


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _check(examples: int, windows: int, negatives: str, workers: int) -> None:
    for name, value in (("examples", examples), ("windows", windows), ("workers", workers)):
        if value < 1:
            raise ValueError(f"interpret: expected {name} >= 1, got {value}")
    if negatives not in ("random", "neighbors"):
        raise ValueError(
            f"interpret: expected negatives to be random or neighbors, got {negatives!r}"
        )
