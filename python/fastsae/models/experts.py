"""Single experts of a mixture, where they are modules: which tokens their rows belong to.

An expert sees the rows of the tokens that are routed to it, and is not told which these are. They
are found again among the rows that the mixture takes, in whose order they come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.models.probe import Handle, first_tensor, with_first

Guard = Callable[[Callable[..., Any]], Callable[..., Any]]


def find_expert(mixture: nn.Module, name: str, number: int) -> nn.Module:
    """Return one expert of a mixture.

    Raises:
        ValueError: there are none, they are not modules, or fewer.
    """
    found = (module for path, module in mixture.named_modules() if path.split(".")[-1] == "experts")
    experts = next(found, None)
    if experts is None:
        raise ValueError(
            f"site {name}: expected a mixture of experts, got {type(mixture).__name__}, which has "
            "none"
        )
    if not isinstance(experts, nn.ModuleList | nn.ModuleDict):
        held = ", ".join(f"{path} {[*p.shape]}" for path, p in experts.named_parameters())
        layer = name.split(".")[1]
        raise ValueError(
            f"site {name}: expected experts that are modules, got {type(experts).__name__}, which "
            f"computes all of them from shared tensors ({held}) and gives only their sum; "
            f"mlp_out.{layer} is that sum, router.{layer} says who takes part in it"
        )
    modules = list(experts.values() if isinstance(experts, nn.ModuleDict) else experts)
    if number >= len(modules):
        raise ValueError(f"site {name}: expected an expert in 0..{len(modules) - 1}, got {number}")
    return modules[number]


def hook_expert(
    expert: nn.Module,
    mixture: nn.Module,
    name: str,
    fn: Callable[[Tensor], Tensor | None],
    guard: Guard,
) -> list[Handle]:
    """Call `fn` once in each pass of a mixture, on what one expert gives.

    Args:
        expert: one of the experts.
        mixture: what routes tokens to them.
        name: of the site, for messages.
        fn: takes `[..., d]` with the leading dimensions of what the mixture takes, NaN in the rows
            of tokens that are not routed to the expert; returns a replacement, or None.
        guard: in which threads.

    Returns:
        Hooks to take off.

    Raises:
        RuntimeError: in a pass, the expert takes rows that are not those of tokens, in their order,
            runs twice, or gives NaN.
    """
    seen = threading.local()

    @guard
    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        seen.x, seen.ran, seen.places = x, False, None

    @guard
    def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if seen.ran:
            raise RuntimeError(f"site {name}: expected an expert that runs once, got it twice")
        rows = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        seen.places = places_of(rows.reshape(-1, rows.shape[-1]), seen.x.flatten(0, -2))
        if seen.places is None:
            raise RuntimeError(
                f"site {name}: expected an expert that takes rows of tokens, in their order, got "
                f"{[*rows.shape]} of which some are not among those that "
                f"{type(mixture).__name__} takes"
            )

    @guard
    def give(module: nn.Module, args: Any, output: Any) -> Any:
        rows = first_tensor(output)
        if rows is None or bool(rows.isnan().any()):
            got = type(output).__name__ if rows is None else "NaN"
            raise RuntimeError(f"site {name}: expected an expert to give numbers, got {got}")
        seen.ran = True
        lead = seen.x.shape[:-1]
        spread = rows.new_full((lead.numel(), rows.shape[-1]), torch.nan)
        spread = spread.index_copy(0, seen.places, rows.reshape(-1, rows.shape[-1]))
        new = fn(spread.view(*lead, -1))
        if new is None:
            return None
        new = new.flatten(0, -2).index_select(0, seen.places).view(rows.shape)
        return with_first(output, new.to(rows.dtype))

    @guard
    def end(module: nn.Module, args: Any, output: Any) -> None:
        if not seen.ran:  # no token was routed to it
            fn(torch.full_like(seen.x, torch.nan))

    return [
        mixture.register_forward_pre_hook(begin, with_kwargs=True),
        expert.register_forward_pre_hook(take, with_kwargs=True),
        expert.register_forward_hook(give),
        mixture.register_forward_hook(end),
    ]


def places_of(rows: Tensor, x: Tensor) -> Tensor | None:
    """Return where in x the rows are, ascending; None if they are not there in this order.

    Of equal rows of x the first ones are taken: where they differ in nothing, an expert that takes
    one takes all of them, and gives the same.
    """
    if rows.shape[-1] != x.shape[-1] or len(rows) > len(x):
        return None
    _, numbers = torch.cat([x, rows]).unique(dim=0, return_inverse=True)
    there, wanted = numbers[: len(x)].tolist(), numbers[len(x) :].tolist()
    places, at = [], 0
    for number in wanted:
        try:
            at = there.index(number, at) + 1
        except ValueError:
            return None
        places.append(at - 1)
    return torch.tensor(places, dtype=torch.long, device=x.device)
