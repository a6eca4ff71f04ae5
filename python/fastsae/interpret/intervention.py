"""What a latent does when it is added: explain it by its effect, and score that explanation.

    strength  s such that the mean of KL(p clean || p steered) at the last token of prompts is `kl`
    effect    the tokens whose probability rises most there, which an explainer is shown
    score     mean over prompts of  log p(explanation | steered text) - log p(explanation | clean)

A latent that makes the model write about what the explanation says scores above 0, one that does
something else around 0; random directions of the same KL say what 0 means.

Source: Paulo et al. 2024 (arXiv 2410.13928), intervention scoring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.analysis.outcomes import padded_left
from fastsae.analysis.steer import Sites, steer
from fastsae.interpret.ask import explanation_in
from fastsae.interpret.clients import Client
from fastsae.interpret.scores import log_probability
from fastsae.interpret.text import Decode
from fastsae.models.probe import device_of, evaluating, options
from fastsae.nn import SAE

EFFECT = """\
A feature of a language model was strengthened. Below are ends of prompts, each with the tokens \
that became more likely to follow. Say in one short phrase what the feature makes the model write. \
End with a line of this form:
EXPLANATION: the phrase"""
ASKED = "\n\nThe text above is about: "
DOUBLINGS = 40


@dataclass(frozen=True)
class Effect:
    """What adding a latent does."""

    strength: float
    """What was added, in units of the code."""
    kl: float
    """Mean divergence of the next token that it gives, in nats."""
    raised: list[list[int]]
    """For each prompt the tokens whose probability rises most, strongest first."""


class Intervention:
    """Adds latents of an SAE at the last token of prompts, and at all that is generated.

    Args:
        model: a causal language model of `transformers`.
        sae: an SAE of `site`.
        site: see `fastsae.models.sites`.
        prompts: token lists of two or more, the prefix token first.
        kl: nats that strengths are chosen for.
        new_tokens: generated for the score.
        batch_size: prompts per forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        sae: SAE,
        site: Sites,
        prompts: Sequence[Sequence[int]],
        *,
        kl: float = 0.5,
        new_tokens: int = 8,
        batch_size: int = 16,
    ) -> None:
        if not prompts or min(map(len, prompts)) < 2:
            raise ValueError("Intervention: expected prompts of two or more tokens, got none")
        if not kl > 0:
            raise ValueError(f"Intervention: expected kl > 0, got {kl}")
        self.model, self.sae, self.site, self.kl = model, sae, site, kl
        self.new_tokens = new_tokens
        self._batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        self._clean = self._next(None, 0.0)
        self._clean_texts: list[list[int]] | None = None

    def effect(self, latent: int, n: int = 10) -> Effect | None:
        """Return what a latent does at the strength that gives the divergence asked for.

        Returns:
            None if no strength up to 2^40 reaches it.
        """
        strength = self._strength(latent)
        if strength is None:
            return None
        steered = self._next(latent, strength)
        rise = steered.exp() - self._clean.exp()
        return Effect(strength, self._divergence(steered), rise.topk(n, dim=1).indices.tolist())

    def texts(self, latent: int | None, strength: float = 0.0) -> list[list[int]]:
        """Return what the model writes after each prompt, the likeliest; None: as it is."""
        generate: Callable[..., Tensor] = self.model.generate  # type: ignore[assignment]
        out: list[list[int]] = []
        for prompts in self._batches:
            ids, mask = (x.to(device_of(self.model)) for x in padded_left(prompts))
            length = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens}
            with evaluating(self.model), self._steered(latent, strength, mask):
                found = generate(
                    ids, attention_mask=mask, do_sample=False, pad_token_id=0, **length
                )
            out += found[:, ids.shape[1] :].tolist()
        return out

    def score(
        self,
        latent: int,
        explanation: str,
        strength: float,
        scorer: nn.Module,
        tokenizer: Any,
        decode: Decode,
    ) -> float:
        """Return how much likelier an explanation is after steered texts than after clean ones.

        Args:
            latent: what is added.
            explanation: of its effect.
            strength: see `effect`.
            scorer: a causal language model of `transformers` that reads the texts.
            tokenizer: the scorer's.
            decode: of the tokens of the steered model.

        Returns:
            Nats, the mean over prompts.
        """
        if self._clean_texts is None:
            self._clean_texts = self.texts(None)
        clean, steered = (
            [log_probability(scorer, tokenizer, decode(ids) + ASKED, explanation) for ids in found]
            for found in (self._clean_texts, self.texts(latent, strength))
        )
        return sum(steered) / len(steered) - sum(clean) / len(clean)

    def _steered(
        self, latent: int | None, strength: float, mask: Tensor
    ) -> AbstractContextManager[None]:
        if latent is None:
            return nullcontext()
        keep = torch.ones_like(mask, dtype=torch.bool)
        keep[:, -1] = False
        return steer(
            self.model, self.sae, latent, site=self.site, how="add", strength=strength, keep=keep
        )

    @torch.no_grad()
    def _next(self, latent: int | None, strength: float) -> Tensor:
        """Return the log-probabilities of the next token: float64 `[prompts, vocabulary]`."""
        found = []
        for prompts in self._batches:
            ids, mask = (x.to(device_of(self.model)) for x in padded_left(prompts))
            with evaluating(self.model), self._steered(latent, strength, mask):
                logits = self.model(
                    input_ids=ids, attention_mask=mask, **options(self.model)
                ).logits
            found.append(logits[:, -1].double().log_softmax(1))
        return torch.cat(found)

    def _divergence(self, steered: Tensor) -> float:
        p = self._clean.exp()
        terms = torch.where(p > 0, p * (self._clean - steered), 0.0)  # of a token that is masked
        return float(terms.sum(1).mean())

    def _strength(self, latent: int) -> float | None:
        """Return a strength whose divergence is within a tenth of `kl`, by bisection of its
        logarithm."""
        low, high = None, None
        strength = 1.0
        for _ in range(DOUBLINGS):
            kl = self._divergence(self._next(latent, strength))
            if math.isfinite(kl) and abs(kl - self.kl) <= 0.1 * self.kl:
                return strength
            if kl < self.kl:
                low = strength
            else:
                high = strength
            if low is not None and high is not None:
                strength = math.sqrt(low * high)
                if high / low < 1 + 1e-6:  # it jumps over what is asked
                    return strength
            else:
                strength = strength * 2 if high is None else strength / 2
        return None


def effect_explainer(client: Client) -> Callable[[Effect, Sequence[Sequence[int]], Decode], str]:
    """Return what asks a language model to explain an effect: takes it, the prompts, and decode."""

    def explain(effect: Effect, prompts: Sequence[Sequence[int]], decode: Decode) -> str:
        parts = [
            f"Prompt ends: {decode(list(ids[-24:]))}\nMore likely: "
            + ", ".join(repr(decode([token])) for token in raised)
            for ids, raised in zip(prompts, effect.raised, strict=True)
        ]
        messages = [
            {"role": "system", "content": EFFECT},
            {"role": "user", "content": "\n\n".join(parts)},
        ]
        return explanation_in(client(messages))

    return explain
