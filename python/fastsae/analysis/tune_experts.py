"""Switch experts of a mixture off, or force them on, while the model runs or generates.

    off   its weight becomes 0; the other chosen ones are scaled up to the sum that there was.
          No other expert is drafted in its place.
    on    it is chosen for every token: where it is not, it takes the place of the chosen expert of
          the smallest weight, with 1/k of the sum of weights, and all are scaled to the sum again.

Where all chosen experts of a token are off, it gets nothing of them (shared experts still run).

Source: Dahlke et al. 2025, "Mixture of tunable experts" (arXiv 2502.11096). Ours: keeping the sum
of weights, which is 1 or another constant in most models, where it varies as well; and the weight
of an expert that is forced on, of which we know no definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastsae.models.mixture import Mixture, find_mixtures, route

Expert = tuple[int, int]
"""Layer and number of an expert."""


@contextmanager
def tune_experts(
    model: nn.Module, *, off: Sequence[Expert] = (), on: Sequence[Expert] = ()
) -> Iterator[None]:
    """Change which experts are chosen, for every token, in every pass inside the block.

        with fastsae.analysis.tune_experts(model, off=[(12, 3), (20, 41)]):
            model.generate(...)

    Blocks nest; the inner one acts last.

    Args:
        model: a causal language model of `transformers` whose blocks have `experts` that are called
            with the numbers of the chosen ones and their weights: see `docs/experts.md`.
        off: experts to switch off, as (layer, expert).
        on: experts to force on.

    Raises:
        ValueError: a model without such experts, an expert that it does not have or that is named
            twice, or more of one layer to force on than a token gets.
        RuntimeError: a pass of the model reached none of these experts.

    Numerics: weights are summed and scaled in float32, or in their dtype if that is wider.
    """
    mixtures = find_mixtures(model)
    _check(mixtures, [*off, *on])
    chosen = {layer: mixtures[layer] for layer, _ in (*off, *on)}
    numbers = {
        layer: ([e for at, e in off if at == layer], [e for at, e in on if at == layer])
        for layer in chosen
    }
    for layer, (_, forced) in numbers.items():
        if len(forced) > chosen[layer].chosen:
            raise ValueError(
                f"tune_experts: expected at most {chosen[layer].chosen} experts of layer {layer} "
                f"to be on, as many as a token gets, got {len(forced)}"
            )

    def change(mixture: Mixture, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return rerouted(index, weights, *numbers[mixture.layer])

    with route(model, chosen, change):
        yield


def rerouted(
    index: Tensor, weights: Tensor, off: Sequence[int], on: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return numbers and weights `[n, k]` of chosen experts, some of them off or on."""
    wide = torch.promote_types(weights.dtype, torch.float32)
    w, index = weights.to(wide), index.clone()
    total = w.sum(1, keepdim=True)
    forced = torch.tensor(on, dtype=index.dtype, device=index.device)
    for number in on:
        absent = ~(index == number).any(1, keepdim=True)
        weakest = w.masked_fill(torch.isin(index, forced), torch.inf).argmin(1, keepdim=True)
        there = torch.zeros_like(index, dtype=torch.bool).scatter(1, weakest, absent)
        index = index.masked_fill(there, number)
        w = torch.where(there, total / index.shape[1], w)
    silent = torch.isin(index, torch.tensor(off, dtype=index.dtype, device=index.device))
    w = w.masked_fill(silent, 0)
    left = w.sum(1, keepdim=True)
    w = torch.where(left > 0, w * (total / left), torch.zeros_like(w))
    return index, w.to(weights.dtype)


def _check(mixtures: dict[int, Mixture], experts: Sequence[Expert]) -> None:
    for layer, number in experts:
        if layer not in mixtures:
            known = ", ".join(map(str, mixtures))
            raise ValueError(f"tune_experts: expected a layer of experts ({known}), got {layer}")
        count = mixtures[layer].count
        if not 0 <= number < count:
            raise ValueError(
                f"tune_experts: expected an expert in 0..{count - 1} of layer {layer}, got {number}"
            )
        if list(experts).count((layer, number)) > 1:
            raise ValueError(
                f"tune_experts: expected different experts, got {(layer, number)} twice"
            )
    if not experts:
        raise ValueError("tune_experts: expected experts to switch off or on, got none")
