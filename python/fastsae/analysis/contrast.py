"""What is more active on one set of prompts than on others: experts of a mixture, or latents.

    m_p[j]         mean over the tokens of prompt p of the activity of unit j
    difference_j   mean_{p in target} m_p[j] - mean_c mean_{p in class c} m_p[j]
    standardized_j difference_j / sqrt(mean over classes of the variance of m_p[j] within them)
    auroc_j        how often a target prompt has a larger m_p[j] than a prompt of the others

A unit is an expert of a layer, active by the weight that its router gives it or by being chosen; or
a latent of an SAE, active by its value or by firing. Differences favor units that are very active
anyway, as dense latents are; the other two scores do not.

Sources: Dahlke et al. 2025 (arXiv 2502.11096), differences of experts ("fTRI"). Ours: latents, the
other two scores, and controls that are as active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.analysis.firing import rows
from fastsae.analysis.head_codes import roc_auc
from fastsae.analysis.steer import Sites, fitting
from fastsae.models import resolve
from fastsae.models.chunks import pad
from fastsae.models.mixture import Mixture, find_mixtures, route
from fastsae.models.probe import device_of, evaluating, options
from fastsae.nn import SAE, NormalizedSAE

Prompts = Sequence[Sequence[int]]
SCORES = ("difference", "standardized", "auroc")
POOL = 4
"""Units that a control is drawn from: those most alike in activity."""


@dataclass(frozen=True)
class Activity:
    """How active units are on prompts."""

    values: Tensor
    """float64 `[prompts, units]`"""
    units: list[Any]
    """A latent, or the layer and number of an expert."""


@dataclass(frozen=True)
class Contrast:
    """What `contrast` found, by unit: float64 `[units]` each."""

    units: list[Any]
    difference: Tensor
    standardized: Tensor
    auroc: Tensor
    activity: Tensor
    """Mean of the class means: how active a unit is at all."""

    def top(self, n: int, by: str = "difference") -> list[Any]:
        """Return the n units that stand out most for the target; ties to the first ones.

        Args:
            n: how many.
            by: "difference" | "standardized" | "auroc".

        Raises:
            ValueError: another score, or fewer units.
        """
        if by not in SCORES:
            raise ValueError(f"contrast: expected by to be one of {', '.join(SCORES)}, got {by!r}")
        if not 0 <= n <= len(self.units):
            raise ValueError(f"contrast: expected at most {len(self.units)} units, got {n}")
        score: Tensor = getattr(self, by)
        order = score.argsort(descending=True, stable=True)
        return [self.units[i] for i in order[:n].tolist()]

    def controls(self, units: Sequence[Any], seed: int) -> list[Any]:
        """Return other units, for each one drawn among those most alike in activity.

        Args:
            units: what they are controls of, such as `top(10)`.
            seed: of the draw.

        Raises:
            ValueError: a unit that is not known, or too few active ones to draw from.
        """
        generator = torch.Generator().manual_seed(seed)
        taken = [self.units.index(unit) for unit in units]
        free = self.activity > 0
        free[taken] = False
        drawn: list[Any] = []
        for at in taken:
            others = free.nonzero().flatten()
            if not len(others):
                raise ValueError(
                    f"contrast: expected {len(units)} other active units to draw controls from, "
                    f"got {len(drawn)}"
                )
            apart = (self.activity[others] - self.activity[at]).abs()
            pool = others[apart.argsort(stable=True)[:POOL]]
            pick = int(pool[torch.randint(len(pool), (1,), generator=generator)])
            free[pick] = False
            drawn.append(self.units[pick])
        return drawn


def contrast(target: Activity, *others: Activity) -> Contrast:
    """Compare activity on the prompts of a target class with that of one or more other classes.

    Args:
        target: from `expert_activity` or `latent_activity`.
        others: the same units on other prompts.

    Raises:
        ValueError: no other class, different units, fewer than two prompts in a class, or NaN.
    """
    classes = [target, *others]
    if not others or any(x.units != target.units for x in others):
        raise ValueError("contrast: expected other classes with the units of the target, got none")
    for x in classes:
        if len(x.values) < 2 or bool(x.values.isnan().any()):
            raise ValueError(
                f"contrast: expected two or more prompts in a class, without NaN, got "
                f"{len(x.values)}"
            )
    means = torch.stack([x.values.mean(0) for x in classes])
    spread = torch.stack([x.values.var(0) for x in classes]).mean(0).sqrt()
    difference = means[0] - means[1:].mean(0)
    pooled = torch.cat([x.values for x in classes])
    labels = torch.arange(len(pooled)) < len(target.values)
    auroc = [roc_auc(column, labels) for column in pooled.T]
    return Contrast(
        units=target.units,
        difference=difference,
        standardized=torch.where(difference == 0, 0.0, difference / spread),
        auroc=torch.tensor(auroc, dtype=torch.float64),
        activity=means.mean(0),
    )


@torch.no_grad()
def expert_activity(
    model: nn.Module,
    prompts: Prompts,
    *,
    how: str = "weight",
    batch_size: int = 8,
    drop_prefix: int = 1,
) -> Activity:
    """Return how active every expert of every layer is on each prompt.

    Args:
        model: as in `tune_experts`.
        prompts: token lists, each with its prefix token first.
        how: "weight": mean weight, 0 where not chosen; "rate": share of tokens that it is chosen
            for.
        batch_size: prompts per forward pass.
        drop_prefix: positions at the start of each prompt that are left out.

    Returns:
        Units are (layer, expert).

    Raises:
        ValueError: another word, a model without such experts, or a prompt with no token left.
    """
    if how not in ("weight", "rate"):
        raise ValueError(f"expert_activity: expected how to be weight or rate, got {how!r}")
    _check_prompts("expert_activity", prompts, drop_prefix)
    mixtures = find_mixtures(model)
    parts = []
    for at in range(0, len(prompts), batch_size):
        ids, real = pad(prompts[at : at + batch_size], 0)
        counted = real.clone()
        counted[:, :drop_prefix] = False
        found: dict[int, Tensor] = {}

        def take(
            mixture: Mixture,
            index: Tensor,
            weights: Tensor,
            counted: Tensor = counted,
            found: dict[int, Tensor] = found,
        ) -> None:
            given = torch.ones_like(weights) if how == "rate" else weights
            dense = torch.zeros(len(index), mixture.count, dtype=torch.float64)
            dense.scatter_add_(1, index.cpu(), given.double().cpu())
            dense = dense.view(*counted.shape, -1) * counted[..., None]
            found[mixture.layer] = dense.sum(1) / counted.sum(1, keepdim=True)

        with evaluating(model), route(model, mixtures, take):
            model(input_ids=ids.to(device_of(model)), **options(model))
        parts.append(torch.cat([found[layer] for layer in mixtures], 1))
    units = [(layer, e) for layer, x in mixtures.items() for e in range(x.count)]
    return Activity(torch.cat(parts), units)


@torch.no_grad()
def latent_activity(
    model: nn.Module,
    sae: SAE | NormalizedSAE,
    prompts: Prompts,
    *,
    site: Sites,
    how: str = "value",
    drop_prefix: int = 1,
    max_norm: float | None = None,
) -> Activity:
    """Return how active every latent of an SAE is on each prompt.

    Args:
        model: a causal language model of `transformers`.
        sae: as in `steer`, like `site`; in eval mode meanwhile.
        prompts: as in `expert_activity`.
        site: where the SAE belongs.
        how: "value": mean value; "rate": share of tokens on which it fires.
        drop_prefix: positions at the start of each prompt that are left out.
        max_norm: rows of a larger norm are left out.

    Returns:
        Units are latents.

    Raises:
        ValueError: another word, the SAE and the site do not fit each other, or a prompt with no
            token left.
    """
    if how not in ("value", "rate"):
        raise ValueError(f"latent_activity: expected how to be value or rate, got {how!r}")
    _check_prompts("latent_activity", prompts, drop_prefix)
    source, target = fitting("latent_activity", site, sae)
    where = target if source is None else source
    place = resolve(model, where) if isinstance(where, str) else where
    values = torch.zeros(len(prompts), sae.d_sae, dtype=torch.float64)
    with evaluating(sae):
        for row, prompt in enumerate(prompts):
            ((x,),) = rows(model, [place], [prompt], 1, drop_prefix, max_norm)
            if not len(x):
                raise ValueError(
                    f"latent_activity: expected a token to encode in prompt {row}, got none"
                )
            f = sae.encode(x.to(sae.W_enc_rows.dtype)).double().cpu()
            values[row] = ((f != 0).double() if how == "rate" else f).mean(0)
    return Activity(values, list(range(sae.d_sae)))


def _check_prompts(owner: str, prompts: Prompts, drop_prefix: int) -> None:
    if not len(prompts) or min(len(ids) for ids in prompts) <= drop_prefix:
        raise ValueError(
            f"{owner}: expected prompts of more than {drop_prefix} tokens, got "
            f"{min((len(ids) for ids in prompts), default=0)}"
        )
