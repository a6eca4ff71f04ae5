"""What an effect curve pushes along: a latent, others that are like it, a difference of means."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsae.analysis.steer import Change, change
from fastsae.nn import SAE, NormalizedSAE

POOL = 4
"""Candidates for each control: those most alike."""

Key = tuple[str, int | None]
"""A direction, and the latent that it is of; see `EffectRow`."""


def draw(score: Tensor, norms: Tensor, chosen: int, count: int, match: str, seed: int) -> list[int]:
    """Draw `count` of the POOL * count latents whose score [d_sae] is most like that of `chosen`,
    ties at random."""
    if match not in ("rate", "norm"):
        raise ValueError(f"effect_curve: expected match to be rate or norm, got {match!r}")
    if not score[chosen] > 0:
        raise ValueError(
            f"effect_curve: expected a latent of a positive {match}, got {chosen} with "
            f"{float(score[chosen]):g}"
        )
    generator = torch.Generator().manual_seed(seed)
    usable = (score > 0) & (norms > 0)
    usable[chosen] = False
    others = usable.nonzero().flatten()
    if len(others) < count:
        raise ValueError(
            f"effect_curve: expected {count} other latents of a positive {match} to draw controls "
            f"from, got {len(others)}"
        )
    others = others[torch.randperm(len(others), generator=generator)]
    far = (score[others].log() - score[chosen].log()).abs()
    pool = others[far.argsort(stable=True)[: POOL * count]]
    picked: list[int] = pool[torch.randperm(len(pool), generator=generator)[:count]].tolist()
    return sorted(picked)


def pushes(
    sae: SAE | NormalizedSAE, how: str, unit: float, norms: Tensor, chosen: int, drawn: list[int]
) -> dict[Key, Callable[[float], Change]]:
    """Return what makes a change of a strength, of the latent and of every control."""
    found: dict[Key, Callable[[float], Change]] = {}
    for index in (chosen, *drawn):
        by = 1.0 if how == "scale" else unit
        by *= float(norms[chosen] / norms[index]) if how == "add" and index != chosen else 1.0
        found["latent" if index == chosen else "control", index] = push(sae, how, by, index)
    return found


def push(
    sae: SAE | NormalizedSAE, how: str, unit: float, index: int, vector: Tensor | None = None
) -> Callable[[float], Change]:
    """Return what makes a change of a strength: of a latent, or along another `vector: [d]`."""
    latents = torch.tensor([index])
    vectors = None if vector is None else vector[None]

    def make(strength: float) -> Change:
        amount = torch.tensor([strength * unit], dtype=torch.float64)
        return change(sae, how, amount, latents, vectors)

    return make
