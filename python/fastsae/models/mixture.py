"""Mixtures of experts: who is chosen for which token, with which weight; and choosing otherwise.

A mixture is found by what is called: in each block a module `experts` that takes rows, the numbers
of the chosen experts and their weights,

    experts(x, index, weights) = sum_j weights[:, j] E_{index[:, j]}(x)

    x: [n, d]     index: int64 [n, k]     weights: [n, k]

whatever router made them: softmax or sigmoid, before or after the selection, with a bias or groups.
That the module is linear in the weights, and that they are these experts', is checked by running
it on a few tokens; a model where it is not so is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.models.blocks import look_up
from fastsae.models.eager import uncompiled
from fastsae.models.probe import Handle, Probe, evaluating
from fastsae.models.threads import not_elsewhere

INDEX, WEIGHTS = 1, 2
"""Arguments of `experts` that say who is chosen, and with which weight."""


@dataclass(frozen=True)
class Mixture:
    """The routed experts of one block."""

    layer: int
    experts: nn.Module
    count: int
    """How many experts there are."""
    chosen: int
    """How many of them a token gets."""


Route = Callable[[Mixture, Tensor, Tensor], tuple[Tensor, Tensor] | None]
"""Takes a mixture, numbers and weights `[n, k]`; returns others, or None to leave them."""

_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], dict[int, Mixture]]]
_known = weakref.WeakKeyDictionary()


def find_mixtures(model: nn.Module) -> dict[int, Mixture]:
    """Return the mixtures of a model by layer, checked; the verdict is kept with the model.

    Args:
        model: a causal language model of `transformers`.

    Raises:
        ValueError: there is none, or one is not called as above, or is not linear in its weights.
    """
    model = getattr(model, "_orig_mod", model)
    modules = {
        layer: experts
        for layer, block in enumerate(look_up(model).modules)
        if (experts := _experts_of(block, layer)) is not None
    }
    if not modules:
        raise ValueError(
            f"mixture: expected blocks with a module named experts, got {type(model).__name__}, "
            "which has none"
        )
    now = tuple(id(x) for x in modules.values())
    before = _known.get(model)
    if before is not None and before[0] == now:
        return before[1]
    calls: dict[int, list[Any]] = {}

    def watch(layer: int, experts: nn.Module) -> Callable[[], Handle]:
        def seen(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given = [*args, *kwargs.values(), output]
            calls[layer] = [x.clone() if isinstance(x, Tensor) else x for x in given]

        return lambda: experts.register_forward_hook(seen, with_kwargs=True)

    Probe(model).run([watch(layer, x) for layer, x in modules.items()])
    if missing := set(modules) - set(calls):
        raise ValueError(
            f"mixture: expected the experts of layer {min(missing)} to be called as one module, "
            f"got {type(modules[min(missing)]).__name__}, which is not"
        )
    with torch.no_grad(), evaluating(model):
        found = {layer: _checked(layer, x, calls[layer]) for layer, x in modules.items()}
    _known[model] = now, found
    return found


def _experts_of(block: nn.Module, layer: int) -> nn.Module | None:
    named = [x for path, x in block.named_modules() if path.split(".")[-1] == "experts"]
    if len(named) > 1:
        raise ValueError(
            f"mixture: expected one module named experts in layer {layer}, got {len(named)}"
        )
    return named[0] if named else None


def _checked(layer: int, experts: nn.Module, call: list[Any]) -> Mixture:
    """Return what is known of a mixture after one call of it: its arguments and its output."""
    what = f"mixture: expected the experts of layer {layer} ({type(experts).__name__}) to"
    if len(call) != 4 or not all(isinstance(x, Tensor) for x in call):
        raise ValueError(
            f"{what} take rows, numbers of experts and weights, and to give a tensor, got "
            f"{len(call) - 1} arguments"
        )
    x, index, weights, output = call
    if (
        index.dtype != torch.int64
        or index.ndim != 2
        or index.shape != weights.shape
        or not weights.is_floating_point()
        or x.shape[:-1].numel() != len(index)
    ):
        raise ValueError(
            f"{what} take numbers and weights [n, k] for rows [n, d], got {index.dtype} "
            f"{[*index.shape]} and {weights.dtype} {[*weights.shape]} for {[*x.shape]}"
        )
    count = _count(experts)
    if count is None or int(index.max()) >= count or int(index.min()) < 0:
        raise ValueError(f"{what} be as many as its numbers say, got {count}, {int(index.max())}")

    def run(weights: Tensor) -> Tensor:
        y: Tensor = experts.forward(x, index, weights)
        return y

    one = index == index[0, 0]
    parts = run(weights * one), run(weights * ~one)
    silent = parts[0].reshape(len(index), -1)[~one.any(1)]
    linear = _same(parts[0] + parts[1], output) and _same(2 * run(weights / 2), output)
    if not linear or bool(silent.any()) or bool(run(weights * 0).any()):
        raise ValueError(f"{what} be linear in their weights, got a module that is not")
    return Mixture(layer, experts, count, index.shape[1])


def _same(x: Tensor, y: Tensor) -> bool:
    """Return whether two outputs are the same up to the rounding of their dtype."""
    apart = (x.float() - y.float()).norm()
    return bool(apart <= max(1e-3, 8 * torch.finfo(y.dtype).eps) * y.float().norm())


def _count(experts: nn.Module) -> int | None:
    count = getattr(experts, "num_experts", None)
    if isinstance(count, int):
        return count
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        return len(experts)
    return next((len(p) for p in experts.parameters() if p.ndim == 3), None)


@contextmanager
def route(model: nn.Module, mixtures: Mapping[int, Mixture], fn: Route) -> Iterator[None]:
    """Call `fn` on what every router of some mixtures chose, in every pass inside the block.

    Args:
        model: calls go through it.
        mixtures: from `find_mixtures`.
        fn: what it returns takes the place of what was chosen.

    Raises:
        RuntimeError: a pass of the model reached none of them.
    """
    passes, reached = [0], [0]

    def on(mixture: Mixture) -> Handle:
        @not_elsewhere
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            reached[0] += 1
            given = [*args, *kwargs.values()]
            new = fn(mixture, given[INDEX], given[WEIGHTS])
            return None if new is None else ((given[0], *new), {})

        return mixture.experts.register_forward_pre_hook(before, with_kwargs=True)

    @not_elsewhere
    def count(*_: Any) -> None:
        passes[0] += 1

    handles = [on(mixture) for mixture in mixtures.values()]
    handles.append(model.register_forward_pre_hook(count))
    try:
        with uncompiled(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
    if passes[0] and not reached[0]:
        raise RuntimeError("mixture: expected a pass of the model to reach its experts, got none")
