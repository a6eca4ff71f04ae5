"""Effect curves: what steering a latent does, by strength, next to what else would do it.

A latent that moves the logits of some tokens says little by itself: a push of that norm in any
direction may do so, and a crude one, the difference of two means, may do it better. So each
strength is also given to other latents, drawn among those that are most alike in how often they
fire or in the norm of what they write, and to the difference of the mean activations of two sets of
prompts, all at the same norm.

Every number is a change from the model as it is, with an interval of the percentile bootstrap over
prompts (for the mean of the controls over controls and prompts).

Sources: Turner et al. 2023 (arXiv 2308.10248), activation addition; Rimsky et al. 2024 (arXiv
2312.06681), differences of means over many prompts; Efron 1979, the bootstrap. Ours: the matching
of controls, and the intervals over both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fastsae.analysis.bootstrap import interval
from fastsae.analysis.controls import Key, draw, push, pushes
from fastsae.analysis.outcomes import Outcome, Outcomes, Prompts
from fastsae.analysis.steer import Sites, checked_latents, fitting
from fastsae.models.probe import evaluating
from fastsae.models.resolve import resolve
from fastsae.nn import SAE, NormalizedSAE


@dataclass(frozen=True)
class EffectRow:
    """One number of an effect curve."""

    direction: str
    """What was pushed along: "latent", "control", or "difference"."""
    latent: int | None
    """Which latent; None for the mean over all controls, and for the difference."""
    strength: float
    """As given; what other latents get is scaled where "add" says so."""
    measure: str
    """"logit": mean logit of the targets after a prompt; "log_probability": of any of them;
    "rate": share of targets among generated tokens; "cross_entropy": nats per token of contexts."""
    value: float
    """Change from the model as it is."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int
    """Prompts or contexts that it is over."""


@dataclass(frozen=True)
class EffectCurve:
    """What `effect_curve` measured."""

    rows: list[EffectRow]
    clean: dict[str, float]
    """Every measure of the model as it is."""
    latent: int
    controls: list[int]
    """The latents that were drawn."""
    confidence: float
    """Of the intervals."""

    def of(self, direction: str, measure: str) -> list[EffectRow]:
        """Return a curve by strength: of the latent, the difference, or the mean of controls."""
        found = [r for r in self.rows if (r.direction, r.measure) == (direction, measure)]
        if direction == "control":
            found = [r for r in found if r.latent is None]
        return sorted(found, key=lambda r: r.strength)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in JSON types."""
        return asdict(self)


@torch.no_grad()
def effect_curve(
    model: nn.Module,
    sae: SAE | NormalizedSAE,
    latent: int,
    prompts: Prompts,
    targets: Sequence[int],
    strengths: Sequence[float],
    *,
    site: Sites,
    how: str = "add",
    unit: float = 1.0,
    contexts: Prompts = (),
    controls: int = 8,
    match: str = "rate",
    contrast: tuple[Prompts, Prompts] | None = None,
    new_tokens: int = 0,
    samples: int = 1,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    batch_size: int = 8,
    drop_prefix: int = 1,
    max_norm: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> EffectCurve:
    """Measure what steering a latent does at each strength, and what controls do.

    Args:
        model: a causal language model of `transformers`; in eval mode meanwhile, like the SAE.
        sae: as in `steer`, like `site`.
        latent: which one.
        prompts: token lists, each with its prefix token first and longer than drop_prefix.
        targets: token ids whose logits, probability and rate are measured.
        strengths: see `steer`.
        site: where the SAE belongs.
        how: "add" | "scale" | "clamp", see `steer`. With "add" every control is pushed by a vector
            of the norm that the latent's has; with the others it gets the same strength.
        unit: what strengths of "add" and "clamp" are multiples of.
        contexts: token lists on which the cost in cross entropy and firing rates are measured;
            empty: no cost.
        controls: how many latents to draw among the 4 times as many most alike;
            0: none.
        match: "rate", by the logarithm of how often they fire on `contexts`, or "norm", by that of
            the norm of their row of W_dec; latents without either are left out.
        contrast: prompts with and without what the latent is about; the difference of their mean
            activations, in the direction from the second to the first, is pushed along at the norm
            of the latent's row. Means are over all tokens that `steer` would act on. With "add".
        new_tokens: generated after each prompt, to count targets; the end of the text is put off
            until then. 0: none.
        samples: sampled continuations of each prompt, at temperature 1, the same random numbers for
            every strength; 0: the likeliest tokens instead.
        seed: of the draw of controls, the samples and the bootstrap.
        resamples: of the bootstrap.
        confidence: of the intervals, between 0 and 1.
        batch_size: prompts or contexts per forward pass.
        drop_prefix: as in `steer`.
        max_norm: as in `steer`.
        progress: called with 1 after each direction at each strength.

    Returns:
        The rows of "latent", of each control and of their mean, and of "difference".

    Raises:
        ValueError: no prompts or targets, a prompt too short, too few latents to draw controls
            from, a latent that never fires matched by rate, or what `steer` refuses.

    Numerics: cross entropy of a token in float32 (float64 of a float64 model), the rest after the
    model in float64. Percentile intervals are too narrow for a handful of prompts or controls.
    Cost: 1 + len(strengths) (1 + controls + 1) times a pass over the prompts, one over the
    contexts, and max(samples, 1) times new_tokens passes of one token of each prompt.
    """
    ends = fitting("effect_curve", site, sae)
    source, target = (resolve(model, x) if isinstance(x, str) else x for x in ends)
    assert target is not None
    (chosen,) = checked_latents("effect_curve", [latent], sae.d_sae).tolist()
    _check(prompts, targets, strengths, how, contrast, confidence, drop_prefix)
    by_rate = bool(controls) and match == "rate"
    if by_rate and not contexts:
        raise ValueError("effect_curve: expected contexts, or match 'norm', got match 'rate' alone")
    outcomes = Outcomes(
        model, source, target, prompts, targets, contexts, new_tokens, samples, seed, batch_size,
        drop_prefix, max_norm,
    )  # fmt: skip
    norms = sae.W_dec.detach().double().norm(dim=1).cpu()
    with evaluating(model), evaluating(sae):
        score = outcomes.firing(sae).rate if by_rate else norms
        drawn = draw(score, norms, chosen, controls, match, seed) if controls else []
        ways = pushes(sae, how, unit, norms, chosen, drawn)
        if contrast is not None:
            vector = outcomes.difference(*contrast) * norms[chosen]
            ways["difference", None] = push(sae, "add", unit, chosen, vector.to(sae.W_dec.dtype))
        clean = outcomes.run(None)
        changes: dict[tuple[Key, float], dict[str, Outcome]] = {}
        for strength in map(float, strengths):
            for key, way in ways.items():
                found = outcomes.run(way(strength))
                changes[key, strength] = {
                    name: Outcome(x.totals - clean[name].totals, x.weights)
                    for name, x in found.items()
                }
                if progress:
                    progress(1)
    groups = {key: [key] for key in ways}
    if drawn:
        groups["control", None] = [("control", index) for index in drawn]
    rows = [
        _row(key, strength, name, [changes[one, strength][name] for one in group],
             resamples, confidence, seed)
        for key, group in groups.items()
        for strength in map(float, strengths)
        for name in clean
    ]  # fmt: skip
    whole = {name: float(x.totals.sum() / x.weights.sum()) for name, x in clean.items()}
    return EffectCurve(rows, whole, chosen, drawn, confidence)


def _check(
    prompts: Prompts,
    targets: Sequence[int],
    strengths: Sequence[float],
    how: str,
    contrast: object,
    confidence: float,
    drop_prefix: int,
) -> None:
    owner = "effect_curve"
    if how not in ("add", "scale", "clamp"):
        raise ValueError(f"{owner}: expected how to be add, scale or clamp, got {how!r}")
    if contrast is not None and how != "add":
        raise ValueError(f"{owner}: expected contrast only for 'add', got one for {how!r}")
    if not targets or not prompts:
        raise ValueError(
            f"{owner}: expected prompts and targets, got {len(prompts)} and {len(targets)} of them"
        )
    if min(targets) < 0:
        raise ValueError(f"{owner}: expected targets to be token ids, got {min(targets)}")
    if not all(math.isfinite(x) for x in strengths):
        raise ValueError(f"{owner}: expected strengths to be finite, got {[*strengths]}")
    if (shortest := min(len(ids) for ids in prompts)) <= drop_prefix:
        raise ValueError(
            f"{owner}: expected prompts of at least {drop_prefix + 1} tokens, got {shortest}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"{owner}: expected 0 < confidence < 1, got {confidence}")


def _row(
    key: Key,
    strength: float,
    measure: str,
    found: list[Outcome],
    resamples: int,
    confidence: float,
    seed: int,
) -> EffectRow:
    """Return the row of one direction, or of the mean of several."""
    weights = found[0].weights
    used = weights > 0
    totals, weights = torch.stack([x.totals for x in found])[:, used], weights[used]
    value = float(totals.mean(0).sum() / weights.sum())
    low, high = interval(totals, weights, resamples, confidence, seed)
    return EffectRow(*key, strength, measure, value, low, high, len(weights))
