"""What a change of activations does to a model: to its next token, its text and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsae.analysis.firing import Firing, firing, rows
from fastsae.analysis.steer import Change
from fastsae.models import Site
from fastsae.models.chunks import pad
from fastsae.models.probe import device_of, options
from fastsae.models.splice import intervene
from fastsae.nn import SAE, NormalizedSAE
from fastsae.nn.loss import upcast

Prompts = Sequence[Sequence[int]]


class Outcome(NamedTuple):
    """One measure of every prompt or context; their mean is sum totals / sum weights."""

    totals: Tensor
    """[n], float64, on the CPU"""
    weights: Tensor
    """[n], float64, on the CPU: tokens that a total is over, or 1"""


@dataclass(frozen=True)
class Outcomes:
    """Runs a model on prompts and contexts, as it is or with a change at a site."""

    model: nn.Module
    source: Site | None
    """Where is read; None: at `target`."""
    target: Site
    prompts: Prompts
    targets: Sequence[int]
    contexts: Prompts
    new_tokens: int
    samples: int
    seed: int
    batch_size: int
    drop_prefix: int
    max_norm: float | None

    def run(self, fn: Change | None) -> dict[str, Outcome]:
        """Return every measure with a change; None: of the model as it is."""
        found = dict(zip(("logit", "log_probability"), self._next(fn), strict=True))
        if self.new_tokens:
            found["rate"] = _each(self._rates(fn))
        if any(len(ids) > self.drop_prefix + 1 for ids in self.contexts):
            found["cross_entropy"] = self._losses(fn)
        return found

    def firing(self, sae: SAE | NormalizedSAE) -> Firing:
        """Return how often latents fire on the contexts."""
        site = self.target if self.source is None else (self.source, self.target)
        return firing(
            self.model, sae, self.contexts, site=site, batch_size=self.batch_size,
            drop_prefix=self.drop_prefix, max_norm=self.max_norm,
        )  # fmt: skip

    def difference(self, to: Prompts, away: Prompts) -> Tensor:
        """Return the direction to the mean activation of some prompts from that of others: `[d]`,
        float64, of norm 1.

        Raises:
            ValueError: there is no token to read, or no difference.
        """
        apart = self._mean(to) - self._mean(away)
        if not apart.norm() > 0:
            raise ValueError("effect_curve: expected contrast to differ in its means, got the same")
        unit: Tensor = apart / apart.norm()
        return unit

    def _mean(self, prompts: Prompts) -> Tensor:
        """Return the mean activation at `target` of all tokens that a change may touch."""
        sites = [self.target] if self.source is None else [self.source, self.target]
        total, count = torch.zeros((), dtype=torch.float64), 0
        rules = (self.batch_size, self.drop_prefix, self.max_norm)
        for found in rows(self.model, sites, prompts, *rules):
            total, count = total + found[-1].double().sum(0).cpu(), count + len(found[-1])
        if not count:
            raise ValueError("effect_curve: expected contrast with a token to read, got none")
        return total / count

    def _changed(self, fn: Change | None, keep: Tensor | None) -> AbstractContextManager[None]:
        if fn is None:
            return nullcontext()
        return intervene(
            self.model, self.target, fn, self.source, keep, self.drop_prefix, self.max_norm
        )

    def _passes(
        self, prompts: Prompts, fn: Change | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield tokens `[b, t]`, which of them are real, and logits `[b, t, vocabulary]`."""
        device = device_of(self.model)
        for at in range(0, len(prompts), self.batch_size):
            ids, real = pad(prompts[at : at + self.batch_size], 0)
            with self._changed(fn, ~real):
                logits = self.model(input_ids=ids.to(device), **options(self.model)).logits
            yield ids.to(device), real.to(device), logits

    def _next(self, fn: Change | None) -> tuple[Outcome, Outcome]:
        """Return the mean logit of the targets after each prompt, and their log-probability."""
        logits, chances = [], []
        for _, real, found in self._passes(self.prompts, fn):
            last = found[torch.arange(len(found), device=found.device), real.sum(1) - 1].double()
            wanted = torch.tensor(self.targets, device=found.device)
            logits.append(last[:, wanted].mean(1))
            chances.append(last.log_softmax(1)[:, wanted].logsumexp(1))
        return _each(torch.cat(logits)), _each(torch.cat(chances))

    def _losses(self, fn: Change | None) -> Outcome:
        """Return the summed loss of each context and the number of its predictions, of those made
        from `drop_prefix` on as in `eval.cross_entropy`."""
        totals, counts = [], []
        for ids, real, logits in self._passes(self.contexts, fn):
            scored = real[:, self.drop_prefix + 1 :]
            given = upcast(logits[:, self.drop_prefix : -1][scored])
            wanted = ids[:, self.drop_prefix + 1 :][scored]
            losses = torch.zeros(scored.shape, dtype=torch.float64, device=scored.device)
            losses[scored] = F.cross_entropy(given, wanted, reduction="none").double()
            totals.append(losses.sum(1))
            counts.append(scored.sum(1))
        return Outcome(torch.cat(totals).cpu(), torch.cat(counts).double().cpu())

    def _rates(self, fn: Change | None) -> Tensor:
        """Return the share of targets among the tokens generated after each prompt: `[n]`."""
        generate: Callable[..., Tensor] = self.model.generate  # type: ignore[assignment]
        how: dict[str, Any] = {"do_sample": False}
        if self.samples:
            how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        length = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens}
        device = device_of(self.model)
        wanted = torch.tensor(self.targets, device=device)
        cuda = range(torch.cuda.device_count()) if device.type == "cuda" else []
        rates = []
        for at in range(0, len(self.prompts), self.batch_size):
            ids, mask = (x.to(device) for x in padded_left(self.prompts[at : at + self.batch_size]))
            shares = []
            for sample in range(max(self.samples, 1)):
                with self._changed(fn, None), torch.random.fork_rng(cuda):
                    torch.manual_seed(self.seed + sample)
                    out = generate(ids, attention_mask=mask, pad_token_id=0, **length, **how)
                shares.append(torch.isin(out[:, ids.shape[1] :], wanted).double().mean(1))
            rates.append(torch.stack(shares).mean(0))
        return torch.cat(rates)


def _each(x: Tensor) -> Outcome:
    """Return a measure `[n]` whose units count the same."""
    return Outcome(x.cpu(), torch.ones(len(x), dtype=torch.float64))


def padded_left(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Return tokens `[n, t]` with padding in front, and their attention mask."""
    longest = max(len(ids) for ids in prompts)
    gaps = [longest - len(ids) for ids in prompts]
    tokens = [[0] * gap + [*ids] for gap, ids in zip(gaps, prompts, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    return torch.tensor(tokens), torch.tensor(mask)
