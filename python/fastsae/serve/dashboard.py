"""What the pages show, as JSON values, a page or a latent at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsae._files.read import printable
from fastsae.analysis.examples import Context
from fastsae.interpret import ContextSample
from fastsae.interpret.sample import EDGES
from fastsae.models.sites import describe
from fastsae.nn import SAE, NormalizedSAE
from fastsae.nn.cross_layer_base import CrossLayerMixin
from fastsae.serve.explanations import Explained, Explanations
from fastsae.serve.live import Live
from fastsae.serve.text_search import Found, TextSearch
from fastsae.serve.words import Words

PAGE = 50
NEAREST, LOGITS, PEAKS, PER_TOKEN, IN_TEXT = 12, 12, 6, 10, 20
LONGEST_QUERY = 200
LATENTS_AT_ONCE = 1 << 14
KEYS = ("index", "rate", "largest", "mean")
Json = dict[str, Any]


class Refused(Exception):
    """A request that cannot be answered: the reason in one line, and the status of HTTP."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Dashboard:
    """All latents of an SAE, to look through.

    What is asked for is read from the sample's file; nothing here grows with the number of latents
    but a few numbers of each.

    Args:
        sae: the SAE; used for nearest latents and logits.
        sample: its contexts.
        words: how tokens are shown; with a tokenizer, contexts can be searched for text.
        explanations: of latents.
        live: the model; None: texts cannot be tried.
    """

    def __init__(
        self,
        sae: SAE | NormalizedSAE,
        sample: ContextSample,
        words: Words,
        explanations: Explanations,
        live: Live | None = None,
    ) -> None:
        if sae.d_sae != sample.d_sae:
            raise ValueError(
                f"Dashboard: expected a sample of {sae.d_sae} latents, got {sample.d_sae}"
            )
        self.sae, self.sample, self.words = sae, sample, words
        self.explanations, self.live = explanations, live
        self._numbers = {
            "index": np.arange(sample.d_sae),
            "rate": sample.counts.numpy() / max(sample.tokens, 1),
            "largest": sample.largest.numpy(),
            "mean": sample.mean.numpy(),
        }
        self._texts = TextSearch(sample)
        self._find = lru_cache(16)(self._search)

    def start(self) -> None:
        """Prepare, in threads that nobody needs to wait for, what the first search and the first
        text would wait for: an index of the windows, and the model."""

        def prepare(call: Callable[[], object]) -> None:
            with suppress(Exception):  # whoever needs it is told
                call()

        calls: list[Callable[[], object]] = []
        if self.words.tokenizer is not None:
            calls.append(self._texts.tables)
        if self.live is not None:
            calls.append(self.live.start)
        for call in calls:
            threading.Thread(target=prepare, args=[call], daemon=True).start()

    def about(self) -> Json:
        """Return what this SAE is, and what can be asked."""
        sae, sample = self.sae, self.sample
        site = str(sample.about.get("site", ""))
        return {
            "class": type(getattr(sae, "sae", sae)).__name__,
            "d_in": sae.d_in,
            "d_sae": sample.d_sae,
            "model": printable(str(sample.about.get("model", ""))),
            "site": site,
            "site_in_words": describe(site.split("+")[0]) if site else "",
            "tokens": sample.tokens,
            "windows": sample.windows,
            "width": sample.width,
            "silent": int((sample.counts == 0).sum()),
            "explained": len(self.explanations.current()),
            "scores": self.explanations.scores(),
            "text": self.words.tokenizer is not None,
            "live": self.live is not None,
            "page": PAGE,
        }

    def latents(
        self,
        sort: str = "index",
        order: str = "asc",
        page: int = 0,
        explanation: str = "",
        score: str = "",
    ) -> Json:
        """Return a page of latents.

        Args:
            sort: index, rate, largest, mean or score.
            order: asc or desc; of equal ones the lower number comes first. Latents without a score
                come last.
            page: number of the page.
            explanation: only latents whose explanation contains all of its words.
            score: which score is shown; "": the first by name.
        """
        if sort not in (*KEYS, "score"):
            raise Refused(400, f"expected sort to be {', '.join(KEYS)} or score, got {sort!r}")
        if order not in ("asc", "desc"):
            raise Refused(400, f"expected order to be asc or desc, got {order!r}")
        known = self.explanations.current()
        score = self._score(score)
        if words := _query("explanation", explanation).lower().split():
            found = [i for i, e in known.items() if all(w in e.text.lower() for w in words)]
            chosen = np.array(sorted(found), dtype=np.int64)
        else:
            chosen = self._numbers["index"]
        if sort == "score":
            by = np.full(self.sample.d_sae, np.nan)
            for i, e in known.items():
                by[i] = e.scores.get(score, np.nan)
        else:
            by = self._numbers[sort].astype(np.float64)
        keys = by[chosen] if order == "asc" else -by[chosen]
        chosen = chosen[np.argsort(keys, kind="stable")]  # NaN comes last
        rows = self._rows(_page(chosen, page), known, score)
        return {"total": len(chosen), "page": page, "score": score, "rows": rows}

    def search(self, text: str = "", page: int = 0) -> Json:
        """Return a page of the latents that fire on a text, see `text_search.Found`."""
        if self.words.tokenizer is None:
            raise Refused(404, "expected a tokenizer to search for text (--model), got none")
        if not _query("text", text).strip():
            raise Refused(400, "expected some text to search for, got none")
        known, score = self.explanations.current(), self._score("")
        found, spellings = self._find(text.strip())
        shown = _page(np.arange(len(found.latents)), page)
        rows = self._rows([int(found.latents[at]) for at in shown], known, score)
        for at, row in zip(shown, rows, strict=True):
            row["strength"] = _number(found.strength[at])
            row["on_text"] = _number(found.largest[at])
            row["share"] = _number(found.share[at])
        spelled = [self.words.of(spelling) for spelling in spellings]
        return {
            "total": len(found.latents),
            "page": page,
            "score": score,
            "spellings": spelled,
            "every": found.every,
            "rows": rows,
        }

    def latent(self, latent: int) -> Json:
        """Return what is known of a latent but for what needs its weights or the model."""
        self._check(latent)
        sample = self.sample
        top, quantiles = sample.top(latent), sample.quantiles(latent)
        peaks = [abs(a) for c in [*top, *(c for part in quantiles for c in part)] for a in c.acts]
        known = self.explanations.current()
        return self._row(latent, known, "") | {
            "count": int(sample.counts[latent]),
            "mean": _number(sample.mean[latent]),
            "scores": known[latent].scores if latent in known else {},
            "scale": max(peaks, default=0.0),
            "histogram": self._histogram(latent),
            "top": [self._context(c) for c in top],
            "quantiles": [[self._context(c) for c in part] for part in quantiles],
        }

    def nearest(self, latent: int) -> Json:
        """Return the latents whose decoder rows have the largest cosines with that of a latent."""
        self._check(latent)
        W = self._decoder()
        if W is None:
            return {"rows": [], "why": "a cross-layer transcoder has several decoders"}
        own = W[latent].float()
        cosine = torch.cat([_cosines(part, own) for part in W.split(LATENTS_AT_ONCE)])
        cosine[latent] = -2.0
        best = cosine.topk(min(NEAREST, len(cosine) - 1))
        known = self.explanations.current()
        rows = self._rows(best.indices.tolist(), known, self._score(""))
        for near, value in zip(rows, best.values, strict=True):
            near["cosine"] = _number(value)
        return {"rows": rows}

    def logits(self, latent: int) -> Json:
        """Return the tokens whose logits a latent raises most and lowers most, skipping the blocks
        in between."""
        self._check(latent)
        W = self._decoder()
        if self.live is None:
            return {"why": "no model was given (--model)"}
        if W is None:
            return {"why": "a cross-layer transcoder has several decoders"}
        found = self.live.logits(W[latent : latent + 1].float(), LOGITS)
        if found is None:
            return {
                "why": "the blocks in between can be skipped only at resid_post in the last third "
                "of a model"
            }
        raised, lowered = found
        return {"promoted": self.words.of(raised[0]), "suppressed": self.words.of(lowered[0])}

    def run(self, text: str, latent: int | None = None) -> Json:
        """Return the strongest latents of every token of a text, and one of them on all tokens."""
        if self.live is None:
            raise Refused(404, "expected a model to run text through (--model), got none")
        if latent is not None:
            self._check(latent)
        try:
            code = self.live.encode(text)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        strongest: list[list[Json]] = [[] for _ in code.token_ids]
        for at in code.act.abs().argsort(descending=True, stable=True).tolist():
            here = strongest[int(code.token[at])]
            if len(here) < PER_TOKEN:
                here.append({"latent": int(code.latent[at]), "act": _number(code.act[at])})
        every = sorted(
            ({**entry, "token": i} for i, row in enumerate(strongest) for entry in row),
            key=lambda entry: -abs(entry["act"]),
        )
        first: dict[int, Json] = {}
        for entry in every:
            first.setdefault(entry["latent"], entry)
        overall = list(first.values())[:IN_TEXT]
        latent = overall[0]["latent"] if latent is None and overall else latent
        known = self.explanations.current()
        shown = {entry["latent"] for row in strongest for entry in row} | {latent} - {None}
        return {
            "tokens": self.words.of(code.token_ids),
            "encoded": code.encoded,
            "strongest": strongest,
            "overall": overall,
            "latent": latent,
            "acts": [] if latent is None else code.of(latent),
            "largest": {i: _number(self.sample.largest[i]) for i in shown if i is not None},
            "explanations": {i: known[i].text for i in shown if i in known},
            "note": self.live.note,
        }

    def _check(self, latent: int) -> None:
        if not 0 <= latent < self.sample.d_sae:
            raise Refused(404, f"expected a latent in 0..{self.sample.d_sae - 1}, got {latent}")

    def _score(self, name: str) -> str:
        names = self.explanations.scores()
        if name and name not in names:
            raise Refused(400, f"expected score to be one of {', '.join(names)}, got {name!r}")
        return name or (names[0] if names else "")

    def _search(self, text: str) -> tuple[Found, Sequence[Sequence[int]]]:
        spellings = self.words.spellings(text)
        return self._texts.find(spellings), spellings

    def _rows(self, latents: list[int], known: dict[int, Explained], score: str) -> list[Json]:
        """Return latents as they are listed."""
        rows = [self._row(latent, known, score) for latent in latents]
        for row, tokens in zip(rows, self._peaks(latents), strict=True):
            row["peaks"] = list(dict.fromkeys(self.words.of(tokens)))
        return rows

    def _peaks(self, latents: list[int]) -> list[list[int]]:
        """Return the strongest tokens of the first windows of some latents."""
        every, _, shapes = self.sample.windows_of("top")
        window = every[latents, :PEAKS].long()
        peak = shapes[latents, :PEAKS].float().abs().argmax(2)
        row = self.sample.bounds[window.clamp(min=0)] + peak
        tokens = self.sample.all_token_ids[row]
        return [t[w >= 0].tolist() for t, w in zip(tokens, window, strict=True)]

    def _row(self, latent: int, known: dict[int, Explained], score: str) -> Json:
        explained = known.get(latent)
        return {
            "latent": latent,
            "rate": float(self._numbers["rate"][latent]),
            "largest": _number(self.sample.largest[latent]),
            "explanation": explained.text if explained else None,
            "score": explained.scores.get(score) if explained else None,
        }

    def _context(self, context: Context) -> Json:
        acts = [float(f"{a:.4g}") for a in context.acts]
        return {"tokens": self.words.of(context.token_ids), "acts": acts, "peak": context.peak}

    def _histogram(self, latent: int) -> Json:
        """Return the counts of a latent from its first to its last bin that is not empty; bin i is
        between edges i and i + 1, of which the outermost may be missing (null)."""
        counts = self.sample.histogram[latent].tolist()
        filled = [i for i, count in enumerate(counts) if count]
        if not filled:
            return {"edges": [], "counts": []}
        a, b = filled[0], filled[-1] + 1
        edges = [None, *EDGES.tolist(), None]
        return {"edges": edges[a : b + 1], "counts": counts[a:b]}

    def _decoder(self) -> Tensor | None:
        """Return what latents write, `[d_sae, d]`; None where there are several rows of each."""
        sae = self.sae.sae if isinstance(self.sae, NormalizedSAE) else self.sae
        return None if isinstance(sae, CrossLayerMixin) else sae.W_dec.detach()


def _cosines(rows: Tensor, row: Tensor) -> Tensor:
    """Return the cosines of rows `[n, d]` with one `[d]`, 0 where one of them is 0: `[n]`."""
    rows = rows.float()
    norms = torch.linalg.vector_norm(rows, dim=1) * torch.linalg.vector_norm(row)
    cosines: Tensor = rows @ row / norms.clamp(min=torch.finfo(torch.float32).tiny)
    return cosines.cpu()


def _page(items: NDArray[np.int64], page: int) -> list[int]:
    if page < 0:
        raise Refused(400, f"expected page >= 0, got {page}")
    return [int(i) for i in items[page * PAGE : (page + 1) * PAGE]]


def _query(name: str, text: str) -> str:
    if len(text) > LONGEST_QUERY:
        raise Refused(
            400, f"expected {name} of at most {LONGEST_QUERY} characters, got {len(text)}"
        )
    return text


def _number(x: Tensor) -> float | None:
    """Return a number as JSON has it, rounded as float32 is."""
    value = float(f"{float(x):.6g}")
    return value if np.isfinite(value) else None
