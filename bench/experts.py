"""Which mixtures of transformers `tune_experts` works on: tiny random models of every family.

    python -m bench.experts [FAMILY ...]        # prints one line per family, docs/experts.md

A family works if an expert that is switched off has no influence left: giving it other parameters
changes the logits of the model, and with the expert off not one bit of them.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bench.tiny_models import NotBuilt, build, example, families
from fastsae.analysis import tune_experts
from fastsae.models.mixture import Mixture, find_mixtures, route


def has_experts(model: nn.Module) -> bool:
    """Return whether some module is called experts, or is of a class that is."""
    return any(
        path.split(".")[-1] == "experts" or "xperts" in type(module).__name__
        for path, module in model.named_modules()
    )


@torch.no_grad()
def spoil(mixture: Mixture, number: int) -> None:
    """Give one expert other parameters."""
    if isinstance(mixture.experts, nn.ModuleList):
        own: list[Tensor] = list(mixture.experts[number].parameters())
    else:
        own = [p.view(mixture.count, -1)[number] for p in mixture.experts.parameters()]
    for p in own:
        p.mul_(-3).add_(0.1)


def sums_of_weights(model: nn.Module, run: Callable[[], Any], layer: int) -> tuple[Tensor, int]:
    """Return the sums of weights of the tokens in a layer, and the expert chosen most."""
    seen: list[tuple[Tensor, Tensor]] = []

    def take(mixture: Mixture, index: Tensor, weights: Tensor) -> None:
        if mixture.layer == layer:
            seen.append((index.clone(), weights.clone()))

    with route(model, find_mixtures(model), take):
        run()
    index, weights = seen[0]
    return weights.sum(1), int(index.flatten().mode().values)


def check(model: nn.Module) -> str:
    """Return what came of switching off the expert that is chosen most in the last layer."""
    inputs = example(model)

    @torch.no_grad()
    def run() -> Tensor:
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits

    try:
        mixtures = find_mixtures(model)
    except ValueError as error:
        return f"refused: {error}"
    layer = max(mixtures)
    sums, number = sums_of_weights(model, run, layer)
    clean = run()
    with tune_experts(model, off=[(layer, number)]):
        off = run()
    spoil(mixtures[layer], number)
    spoiled = run()
    with tune_experts(model, off=[(layer, number)]):
        still = run()
    works = torch.equal(off, still) and not torch.equal(off, clean)
    if not works or torch.equal(spoiled, clean):
        return "WRONG: the expert has influence, or never had"
    low, high = float(sums.min()), float(sums.max())
    span = f"{low:.2f}" if high - low < 1e-3 else f"{low:.2f} to {high:.2f}"
    return f"works: weights of a token sum to {span}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="FAMILY", help="default: all with experts")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet: Any = transformers.logging.set_verbosity_error
    quiet()
    for name in args.names or families():
        try:
            model = build(name)
        except NotBuilt:
            continue
        if args.names or has_experts(model):
            print(f"{name:24} {check(model)}", flush=True)


if __name__ == "__main__":
    main()
