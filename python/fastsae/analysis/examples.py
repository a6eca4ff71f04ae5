"""Max-activating examples: the strongest tokens of each latent over a store, with their text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.data import ActivationStore
from fastsae.nn import SAE

MIN_FREQUENCY, MAX_FREQUENCY, MIN_FIRINGS = 2e-4, 2e-2, 20


@dataclass(frozen=True)
class Context:
    """A stretch of one document around a strong activation of a latent."""

    token_ids: list[int]
    acts: list[float]
    """Activation of the latent on each token; 0 where it is inactive."""
    peak: int
    """Place of the strong token in `token_ids`."""


@dataclass(frozen=True)
class Latent:
    """One latent and its strongest contexts."""

    index: int
    frequency: float
    """Share of the tokens on which it is active."""
    max_act: float
    selectivity: float
    """Mean activation at the peaks of `contexts`, over its mean wherever it is active."""
    contexts: list[Context]
    """Strongest first, no two of them alike or overlapping."""


class ActivatingExamples:
    """Every activation of every latent over the rows of a store, by latent, strongest first.

    Args:
        sae: the SAE; put into eval mode.
        store: rows in the order of the text.
        max_rows: rows to look at; about 50 bytes for each active latent of each while sorting.
        batch_size: rows at a time.
    """

    def __init__(
        self, sae: SAE, store: ActivationStore, *, max_rows: int = 200_000, batch_size: int = 4096
    ) -> None:
        sae.eval()
        self.n = min(len(store), max_rows)
        span = slice(0, self.n)
        self.token_ids: list[int] = store.token_ids(span).tolist()
        self.doc_ids: list[int] = store.doc_ids(span).tolist()
        self.positions = store.positions(span)
        rows, latents, values = [], [], []
        for at in range(0, self.n, batch_size):
            x = store.rows(slice(at, min(at + batch_size, self.n))).to(sae.W_enc)
            with torch.no_grad():
                acts = sae.encode_sparse(x)
            active = acts.values != 0
            rows.append(acts.rows()[active].int().cpu() + at)
            latents.append(acts.indices[active].cpu())
            values.append(acts.values[active].float().cpu())
        value, latent, row = torch.cat(values), torch.cat(latents), torch.cat(rows)
        order = value.argsort(descending=True, stable=True)
        order = order[latent[order].argsort(stable=True)]
        self.rows, self.values = row[order], value[order]
        self.counts = torch.bincount(latent, minlength=sae.d_sae)
        self.ends = self.counts.cumsum(0)

    def of(self, latent: int) -> tuple[Tensor, Tensor]:
        """Return the rows and the values where a latent fires, strongest first."""
        span = slice(int(self.ends[latent] - self.counts[latent]), int(self.ends[latent]))
        return self.rows[span], self.values[span]

    def contexts(self, latent: int, n: int = 8, width: int = 12) -> list[Context]:
        """Return the `n` strongest contexts of a latent, `width` tokens to either side.

        Left out are contexts that overlap a stronger one, and those in which the four tokens up to
        the strong one and the one after it are as in a stronger one.
        """
        rows, values = self.of(latent)
        value_at = dict(zip(rows.tolist(), values.tolist(), strict=True))
        taken: list[int] = []
        found: list[Context] = []
        seen: set[tuple[int, ...]] = set()
        for row in value_at:
            core = tuple(self.token_ids[max(0, row - 3) : row + 2])
            if core in seen or any(abs(row - other) <= width for other in taken):
                continue
            seen.add(core)
            taken.append(row)
            doc = self.doc_ids[row]
            near = range(max(0, row - width), min(self.n, row + width + 1))
            span = [i for i in near if self.doc_ids[i] == doc]
            ids = [self.token_ids[i] for i in span]
            acts = [value_at.get(i, 0.0) for i in span]
            found.append(Context(ids, acts, span.index(row)))
            if len(found) == n:
                break
        return found

    def latent(self, index: int, n: int = 8) -> Latent:
        """Return one latent with its `n` strongest contexts; it fires at least once."""
        values = self.of(index)[1]
        contexts = self.contexts(index, n)
        peaks = [context.acts[context.peak] for context in contexts]
        selectivity = sum(peaks) / len(peaks) / float(values.mean())
        share = len(values) / self.n
        return Latent(index, share, float(values[0]), selectivity, contexts)

    def interesting(self, n: int = 50) -> list[Latent]:
        """Return the `n` most selective latents that are neither rare nor everywhere.

        A latent qualifies if it fires on 0.02 % to 2 % of the tokens, at least 20 times, and not
        mainly on the first token of a context (which the model treats apart). Qualified latents are
        ordered by selectivity; one that shares half of its 20 strongest tokens with a latent
        already listed is skipped.
        """
        frequency = self.counts / max(self.n, 1)
        fits = (frequency >= MIN_FREQUENCY) & (frequency <= MAX_FREQUENCY)
        fits &= self.counts >= MIN_FIRINGS
        start = int(self.positions.min()) if self.n else 0
        ranked: Iterable[Latent] = sorted(
            (self.latent(int(i)) for i in fits.nonzero() if self._mid_context(int(i), start)),
            key=lambda latent: (-latent.selectivity, latent.index),
        )
        chosen: list[Latent] = []
        tops: list[set[int]] = []
        for latent in ranked:
            top = set(self.of(latent.index)[0][:20].tolist())
            if all(len(top & other) < 10 for other in tops):
                chosen.append(latent)
                tops.append(top)
            if len(chosen) == n:
                break
        return chosen

    def _mid_context(self, latent: int, start: int) -> bool:
        """Whether most of the 20 strongest tokens are not the first of their context."""
        top = self.of(latent)[0][:20].long()
        return float((self.positions[top] > start).float().mean()) > 0.5
