"""Sparse control: can an attribute of an activation be changed by changing a few latents?

    a' = a_s + sum_{j in J} (f_j(a_t) - f_j(a_s)) W_dec[j],     |J| <= k

a_s is the activation of a prompt and a_t that of the same prompt with one attribute changed. J is
chosen greedily, each time the latent that brings a' closest to a_t. An edit succeeds where the
model then answers as it does with a_t itself in that place.

Source: Makelov et al. 2024 (arXiv 2405.08366), section 4.2; a latent that both removes and adds
counts once, as in its code. Ours: latents drawn at random as a control.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.analysis.steer import fitting
from fastsae.analysis.task import TaskRuns
from fastsae.models import Site
from fastsae.models.probe import evaluating
from fastsae.nn import SAE


class Edit(NamedTuple):
    """Activations with a few latents changed."""

    x: Tensor
    """float64 `[n, d]`"""
    changed: Tensor
    """bool `[n, d_sae]`: which latents."""
    magnitude: Tensor
    """float64 `[n]`: share of the reconstruction that the changed latents held before; nan where
    there is none. Small is better: the rest of the activation was left alone."""


@torch.no_grad()
def sparse_edit(
    sae: SAE, x: Tensor, target: Tensor, k: int, *, how: str = "greedy", seed: int = 0
) -> Edit:
    """Change at most k latents of each activation, towards another activation.

    Args:
        sae: reads and writes one site.
        x: `[n, d]`, a_s.
        target: `[n, d]`, a_t.
        k: latents that may change; fewer do where another one brings x no closer.
        how: "greedy", or "random": k of the latents whose values differ.
        seed: of the random ones.

    Raises:
        ValueError: a shape that does not fit, another word, a negative k, or a transcoder.
        TypeError: no SAE.

    Numerics: float64, but for the SAE. Ties go to the lowest latent.
    Cost: 2 k d d_sae flops per row, and memory for [n, d_sae] in float64.
    """
    if not isinstance(sae, SAE):
        raise TypeError(f"sparse_edit: expected an SAE, got {type(sae).__name__}")
    fitting("sparse_edit", "x", sae)
    if x.ndim != 2 or x.shape != target.shape or x.shape[1] != sae.d_in or k < 0:
        raise ValueError(
            f"sparse_edit: expected x and target to be [n, {sae.d_in}] and k >= 0, got "
            f"{[*x.shape]}, {[*target.shape]} and {k}"
        )
    if how not in ("greedy", "random"):
        raise ValueError(f"sparse_edit: expected how to be greedy or random, got {how!r}")
    with evaluating(sae):
        f, f_target = (sae.encode(a.to(sae.W_enc)).double().cpu() for a in (x, target))
    W = sae.W_dec.double().cpu()
    difference = f_target - f
    a, goal = x.double().cpu(), target.double().cpu()
    if how == "random":
        changed = _drawn(difference != 0, k, seed)
    else:
        changed = _greedy(goal - a, difference, W, k)
    made = f @ W
    held = f * (made @ W.T) / made.square().sum(1, keepdim=True)
    return Edit(a + (difference * changed) @ W, changed, (held * changed).sum(1))


def _greedy(residual: Tensor, difference: Tensor, W: Tensor, k: int) -> Tensor:
    """Return which latents to change: bool `[n, d_sae]`.

    |r - c u|^2 - |r|^2 = c^2 |u|^2 - 2 c r.u, which is what a change gains.
    """
    squares = difference.square() * W.square().sum(1)
    changed = torch.zeros(difference.shape, dtype=torch.bool)
    rows = torch.arange(len(residual))
    for _ in range(min(k, difference.shape[1])):
        gain = (squares - 2 * difference * (residual @ W.T)).masked_fill(changed, torch.inf)
        best, latent = gain.min(1)
        closer = best < 0
        changed[rows[closer], latent[closer]] = True
        step = difference[rows, latent] * closer
        residual = residual - step[:, None] * W[latent]
    return changed


def _drawn(candidates: Tensor, k: int, seed: int) -> Tensor:
    """Return up to k of the candidates of each row, at random."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(candidates.shape, generator=generator).masked_fill(~candidates, -1)
    top = scores.topk(min(k, candidates.shape[1]), 1)
    return torch.zeros_like(candidates).scatter(1, top.indices, top.values >= 0)


def edit_success(
    runs: TaskRuns, site: str | Site, target: Tensor, edits: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return where each edit makes the model answer as the ground truth does: bool `[n]` each.

    The answer is the candidate of the largest logit.

    Args:
        runs: the model and the prompts to edit, and at which position.
        site: where activations were read.
        target: `[n, d]`, a_t: what is put there for the ground truth.
        edits: `[n, d]` by name: what is put there by each edit, such as x itself, the mean
            activation, `SupervisedDictionary.edit` and `sparse_edit`.
    """
    truth = runs.logits(site, target).argmax(1)
    return {name: runs.logits(site, x).argmax(1) == truth for name, x in edits.items()}
