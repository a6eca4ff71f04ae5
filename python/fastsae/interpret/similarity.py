"""How alike the explanations of two SAEs are, latent by latent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsae.interpret.scores import Embed
from fastsae.nn import SAE


@dataclass(frozen=True)
class ExplanationSimilarity:
    """What `explanation_similarity` found."""

    pairs: list[tuple[int, int]]
    """Latents of the first SAE, each with the one of the second whose decoder row is nearest."""
    cosines: Tensor
    """Of the decoder rows of each pair: float64 `[m]`."""
    similarities: Tensor
    """Of the vectors of the explanations of each pair: float64 `[m]`."""
    chance: float
    """Mean similarity of the explanations of latents that do not belong together."""


@torch.no_grad()
def explanation_similarity(
    first: SAE,
    explained: Mapping[int, str],
    second: SAE,
    explained_too: Mapping[int, str],
    embed: Embed,
) -> ExplanationSimilarity:
    """Match the explained latents of two SAEs by their decoder rows, and compare the words.

    Args:
        first: an SAE.
        explained: its latents, with explanations.
        second: another SAE of the same site, or of one that means the same.
        explained_too: its latents, with explanations.
        embed: texts to vectors, see `scores.mean_embedding`.

    Raises:
        ValueError: nothing is explained, or the SAEs write to different widths.

    Source: Paulo et al. 2024 (arXiv 2410.13928), similarity of SAEs by their explanations. Ours:
    the nearest row instead of an assignment, and the mean of all other pairs as chance.
    """
    owner = "explanation_similarity"
    if not explained or not explained_too:
        raise ValueError(
            f"{owner}: expected explanations of both SAEs, got {len(explained)} and "
            f"{len(explained_too)}"
        )
    left, right = list(explained), list(explained_too)
    a, b = (sae.W_dec.detach()[i].double().cpu() for sae, i in ((first, left), (second, right)))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{owner}: expected SAEs of one width, got {a.shape[1]} and {b.shape[1]}")
    cosine = F.normalize(a, dim=1) @ F.normalize(b, dim=1).t()
    best, nearest = cosine.max(1)
    texts = [*explained.values(), *explained_too.values()]
    vectors = F.normalize(embed(texts).double().cpu(), dim=1)
    alike = vectors[: len(left)] @ vectors[len(left) :].t()
    matched = alike.gather(1, nearest.unsqueeze(1)).squeeze(1)
    others = alike.numel() - len(left)
    chance = float((alike.sum() - matched.sum()) / others) if others else float("nan")
    pairs = [(i, right[int(j)]) for i, j in zip(left, nearest, strict=True)]
    return ExplanationSimilarity(pairs, best, matched, chance)
