"""Which latents stand for which value of an attribute: F1 of single latents and of unions.

    precision = |A and F| / |F|     recall = |A and F| / |A|     F1 = 2 |A and F| / (|A| + |F|)

F: the prompts where a latent (or any of a union) fires; A: those with a value of an attribute.

Two faults that a good reconstruction may hide show up here. Occlusion: of two attributes at a site,
the one whose vectors are smaller gets no latents. Over-splitting: one value gets many latents, each
for a few of its prompts and hardly any two for the same ones.

Source: Makelov et al. 2024 (arXiv 2405.08366), sections 4.3 and 5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class LatentUnion(NamedTuple):
    """Latents that stand for a value together."""

    latents: list[int]
    """In the order in which they were taken."""
    f1: float
    """Of all of them together."""


class Splitting(NamedTuple):
    """How one value is shared out among latents."""

    latents: int
    """Those that fire, and hardly anywhere else."""
    best_f1: float
    """The largest F1 of a single latent, of all."""
    recall: float
    """Median share of the value's prompts on which one of these latents fires; nan of none."""
    overlap: float
    """Mean |F and F'| / |F or F'| of two of them: 0 for disjoint ones; nan of fewer than two."""
    covered: float
    """Share of the value's prompts on which any of them fires."""


def attribute_f1(active: Tensor, values: Tensor, size: int | None = None) -> Tensor:
    """Return F1 of every latent for every value: float64 `[d_sae, values]`.

    Args:
        active: bool `[n, d_sae]`, where latents fire, such as `sae.encode(x) > 0`.
        values: int64 `[n]`, value of the attribute in each prompt.
        size: how many values there are; None: one more than the largest.

    Returns:
        0 where a latent never fires or no prompt has the value.

    Raises:
        TypeError: active is not bool, or values are not int64.
        ValueError: a shape that does not fit.
    """
    _check("attribute_f1", active, values)
    labels = F.one_hot(values, -1 if size is None else size).double()
    fires = active.double()
    return 2 * (fires.T @ labels) / (fires.sum(0)[:, None] + labels.sum(0)).clamp_min(1)


def union_f1(active: Tensor, label: Tensor, limit: int = 10) -> LatentUnion:
    """Return a union of latents with a large F1 for one value, chosen greedily.

    Args:
        active: bool `[n, d_sae]`.
        label: bool `[n]`, the prompts that have the value.
        limit: latents in the union; fewer where no other one raises its F1.

    Raises:
        TypeError: not bool.
        ValueError: a shape that does not fit, or no prompt has the value.
    """
    _check("union_f1", active, label, torch.bool)
    if not bool(label.any()):
        raise ValueError("union_f1: expected a prompt that has the value, got none")
    chosen: list[int] = []
    fires, best = torch.zeros_like(label), 0.0
    for _ in range(min(limit, active.shape[1])):
        new = active & ~fires[:, None]  # what each latent would add
        hits = (fires & label).sum() + (new & label[:, None]).sum(0)
        f1 = 2 * hits.double() / (label.sum() + fires.sum() + new.sum(0))
        latent = int(f1.argmax())
        if float(f1[latent]) <= best:
            break
        best = float(f1[latent])
        fires |= active[:, latent]
        chosen.append(latent)
    return LatentUnion(chosen, best)


def share_found(f1: Tensor, at_least: float = 0.5) -> float:
    """Return the share of values that have a latent of their own: of F1 `[d_sae, values]`.

    Next to the norms of the attributes' vectors (`SupervisedDictionary.norms`) it shows occlusion.
    """
    return float((f1.amax(0) >= at_least).double().mean())


def splitting(active: Tensor, label: Tensor, at_least: float = 0.9) -> Splitting:
    """Return how one value is shared out among latents.

    Args:
        active: bool `[n, d_sae]`.
        label: bool `[n]`, the prompts that have the value.
        at_least: precision of the latents that count.

    Raises:
        TypeError: not bool.
        ValueError: a shape that does not fit, or no prompt has the value.
    """
    _check("splitting", active, label, torch.bool)
    if not bool(label.any()):
        raise ValueError("splitting: expected a prompt that has the value, got none")
    counts, hits = active.sum(0), (active & label[:, None]).sum(0)
    own = (counts > 0) & (hits >= at_least * counts)
    fires = active[:, own].double()
    together = fires.T @ fires
    sizes = together.diagonal()
    jaccard = together / (sizes[:, None] + sizes - together)
    m = len(sizes)
    pairs = (jaccard.sum() - jaccard.trace()) / (m * (m - 1)) if m > 1 else torch.tensor(torch.nan)
    recall = (hits[own] / label.sum()).double()
    return Splitting(
        latents=m,
        best_f1=float(attribute_f1(active, label.long(), 2)[:, 1].max()),
        recall=float(recall.median()) if m else torch.nan,
        overlap=float(pairs),
        covered=float((active[:, own].any(1) & label).sum() / label.sum()),
    )


def _check(owner: str, active: Tensor, values: Tensor, dtype: torch.dtype = torch.int64) -> None:
    if active.dtype != torch.bool or values.dtype != dtype:
        raise TypeError(
            f"{owner}: expected bool and {dtype}, got {active.dtype} and {values.dtype}"
        )
    if active.ndim != 2 or values.shape != active.shape[:1]:
        raise ValueError(
            f"{owner}: expected [n, d_sae] and [n], got {[*active.shape]} and {[*values.shape]}"
        )
