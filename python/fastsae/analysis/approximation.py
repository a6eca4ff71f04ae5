"""Does a reconstruction hold what a task needs, and is what it leaves out not needed?

    sufficiency   a replaced by a_hat               sum LD(patched) / sum LD(clean)
    necessity     a replaced by mean a + (a - a_hat)
                  sum [LD(clean) - LD(patched)] / sum [LD(clean) - LD(a replaced by mean a)]

LD is the logit of the right answer minus that of the wrong one. Both are 1 for a_hat = a, and 0
for a_hat = mean a where the mean answers nothing.

Source: Makelov et al. 2024 (arXiv 2405.08366), section 4.1. Ours: the intervals, of the percentile
bootstrap over prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastsae.analysis.bootstrap import interval
from fastsae.analysis.task import TaskRuns
from fastsae.models import Site


@dataclass(frozen=True)
class Share:
    """A ratio of sums over prompts, with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Approximation:
    """What `approximation` measured."""

    sufficiency: Share
    necessity: Share
    clean: float
    """Mean logit difference of the model as it is."""
    ablated: float
    """The same with the mean activation."""


def approximation(
    runs: TaskRuns,
    site: str | Site,
    x: Tensor,
    x_hat: Tensor,
    mean: Tensor,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Approximation:
    """Measure sufficiency and necessity of reconstructions.

    Args:
        runs: the model and the prompts, and at which position x was read.
        site: where x was read.
        x: `[n, d]`, activations, from `task_activations`.
        x_hat: `[n, d]`, reconstructions, say of a `SupervisedDictionary` or of an SAE.
        mean: `[d]`, the mean activation, of other prompts of the task.
        resamples: of the prompts, for the intervals.
        confidence: of the intervals.
        seed: of the resamples.

    Raises:
        ValueError: a shape does not fit, the model does not prefer right answers as it is, or not
            more than with the mean activation: then there is nothing to be a share of.
    """
    if x.ndim != 2 or x.shape != x_hat.shape or mean.shape != x.shape[1:]:
        raise ValueError(
            "approximation: expected x and x_hat to be [n, d] and mean to be [d], got "
            f"{[*x.shape]}, {[*x_hat.shape]} and {[*mean.shape]}"
        )
    x, x_hat, mean = (y.detach().double().cpu() for y in (x, x_hat, mean))

    def difference(rows: Tensor | None) -> Tensor:
        logits = runs.logits() if rows is None else runs.logits(site, rows)
        return runs.prompts.logit_difference(logits)

    clean, ablated = difference(None), difference(mean.expand_as(x))
    if not clean.sum() > max(0, float(ablated.sum())):
        raise ValueError(
            "approximation: expected a logit difference above 0 and above that of the mean "
            f"activation, got {float(clean.mean()):.3f} and {float(ablated.mean()):.3f}"
        )

    def share(totals: Tensor, weights: Tensor) -> Share:
        ends = interval(totals[None], weights, resamples, confidence, seed)
        return Share(float(totals.sum() / weights.sum()), *ends)

    return Approximation(
        sufficiency=share(difference(x_hat), clean),
        necessity=share(clean - difference(mean + (x - x_hat)), clean - ablated),
        clean=float(clean.mean()),
        ablated=float(ablated.mean()),
    )
