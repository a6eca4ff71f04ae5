"""Prompts of a task with known attributes, and what a model answers when one activation changes.

The answer is the logit of every candidate token after the last token of a prompt. Only tokens from
the changed position on are run again: what is left of it is kept as keys and values, so that a
change at the last token costs one token per prompt, not the prompt.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsae.models import Site, read, replace, resolve
from fastsae.models.probe import device_of, evaluating


@dataclass(frozen=True)
class TaskPrompts:
    """Prompts of which it is known what they are made of."""

    ids: list[list[int]]
    """Tokens of every prompt, the prefix token first."""
    candidates: Tensor
    """int64 `[c]`, different tokens: what may be answered."""
    right: Tensor
    """int64 `[n]`, which candidate is the answer."""
    wrong: Tensor
    """int64 `[n]`, which candidate it is compared with."""
    attributes: dict[str, Tensor]
    """Of each attribute its value in every prompt: int64 `[n]`."""
    values: dict[str, list[str]]
    """Of each attribute its values in words."""
    positions: dict[str, Tensor]
    """Of each role, such as "end", its token in every prompt: int64 `[n]`."""

    def __len__(self) -> int:
        return len(self.ids)

    def logit_difference(self, logits: Tensor) -> Tensor:
        """Return the logit of the right candidate minus that of the wrong one: float64 `[n]`."""
        rows = torch.arange(len(self))
        return (logits[rows, self.right] - logits[rows, self.wrong]).double()


class _Group(NamedTuple):
    """Prompts of the same length, changed at the same position."""

    rows: Tensor
    tokens: Tensor
    """[b, t - position]: those that are run again."""
    cache: Any
    """Keys and values of the others; None where there are none."""
    position: int


class TaskRuns:
    """Runs a model on prompts again and again, each time with another activation at one position.

        runs = TaskRuns(model, prompts, "end")
        clean = runs.logits()
        patched = runs.logits("resid_post.20", rows)

    Args:
        model: a causal language model of `transformers`.
        prompts: what to run.
        position: a key of `prompts.positions`.
        batch_size: prompts per forward pass.

    Raises:
        ValueError: no such position.

    Cost: one pass over the prompts to begin with, then one over their tokens from `position` on.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: TaskPrompts,
        position: str,
        *,
        batch_size: int = 64,
    ) -> None:
        self.model, self.prompts, self.position = model, prompts, position
        known = inspect.signature(model.forward).parameters
        self._cache = "cache" if "cache" in known else "past_key_values"  # older transformers
        places = _places(prompts, position)
        shapes: dict[tuple[int, int], list[int]] = {}
        for row, (ids, place) in enumerate(zip(prompts.ids, places, strict=True)):
            shapes.setdefault((len(ids), place), []).append(row)
        self._groups = [
            self._prepared(rows[at : at + batch_size], place)
            for (_, place), rows in sorted(shapes.items())
            for at in range(0, len(rows), batch_size)
        ]

    @torch.no_grad()
    def _prepared(self, rows: list[int], place: int) -> _Group:
        tokens = torch.tensor([self.prompts.ids[row] for row in rows])
        cache = None
        if place:
            given = tokens[:, :place].to(device_of(self.model))
            with evaluating(self.model):
                output = self.model(input_ids=given, use_cache=True)
            cache = getattr(output, self._cache, None)
            if cache is None:
                raise TypeError(
                    f"TaskRuns: expected a model that returns a {self._cache}, got "
                    f"{type(output).__name__} of {type(self.model).__name__} without one"
                )
        return _Group(torch.tensor(rows), tokens[:, place:], cache, place)

    @torch.no_grad()
    def logits(self, site: str | Site | None = None, rows: Tensor | None = None) -> Tensor:
        """Return the logits of the candidates after each prompt: float32 `[n, c]`, on the CPU.

        Args:
            site: where an activation is replaced; None leaves the model as it is.
            rows: `[n, d]`, by what.

        Raises:
            ValueError: no such site, one that cannot be replaced, or not one row for each prompt.
        """
        if (site is None) != (rows is None):
            raise ValueError("TaskRuns: expected a site and rows, or neither, got one of them")
        if rows is not None and (rows.ndim != 2 or len(rows) != len(self.prompts)):
            raise ValueError(
                f"TaskRuns: expected rows to be [{len(self.prompts)}, d], got {[*rows.shape]}"
            )
        where = resolve(self.model, site) if isinstance(site, str) else site
        found = torch.empty(len(self.prompts), len(self.prompts.candidates))
        for group in self._groups:
            change = nullcontext() if where is None else self._replaced(where, group, rows)
            with change:
                found[group.rows] = self._answers(group)
        return found

    def _replaced(self, site: Site, group: _Group, rows: Any) -> AbstractContextManager[None]:
        """Put rows in the place of the activations of a group, at its position only."""
        own: Tensor = rows[group.rows]
        keep = torch.ones(len(own), group.position + group.tokens.shape[1], dtype=torch.bool)
        keep[:, group.position] = False
        return replace(self.model, site, lambda x: own.to(x.device), keep=keep, drop_prefix=0)

    def _answers(self, group: _Group) -> Tensor:
        before = {} if group.cache is None else {self._cache: copy.deepcopy(group.cache)}
        tokens = group.tokens.to(device_of(self.model))
        with evaluating(self.model):
            logits = self.model(input_ids=tokens, use_cache=True, **before).logits
        wanted = self.prompts.candidates.to(logits.device)
        answers: Tensor = logits[:, -1].index_select(1, wanted).float().cpu()
        return answers


@torch.no_grad()
def task_activations(
    model: nn.Module,
    prompts: TaskPrompts,
    sites: Sequence[str | Site],
    position: str,
    *,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """Return the activations of every prompt at one of its positions.

    Args:
        model: a causal language model of `transformers`.
        prompts: what to run; the pass ends at the last site.
        sites: see `fastsae.models.sites`.
        position: a key of `prompts.positions`.
        batch_size: prompts per forward pass.

    Returns:
        `[n, d]` by the name of each site, on the CPU.

    Raises:
        ValueError: no such position, or no such site.
    """
    where = [resolve(model, site) if isinstance(site, str) else site for site in sites]
    places = torch.tensor(_places(prompts, position))
    lengths = torch.tensor([len(ids) for ids in prompts.ids])
    parts = [
        rows
        for length in lengths.unique().tolist()
        for rows in (lengths == length).nonzero().flatten().split(batch_size)
    ]
    found: dict[str, list[Tensor]] = {site.name: [] for site in where}
    for rows in parts:
        tokens = torch.tensor([prompts.ids[row] for row in rows.tolist()])
        with evaluating(model):
            got = read(model, where, tokens.to(device_of(model)))
        for name, x in got.items():
            found[name].append(x[torch.arange(len(rows)), places[rows].to(x.device)].cpu())
    order = torch.cat(parts).argsort()
    return {name: torch.cat(x)[order] for name, x in found.items()}


def _places(prompts: TaskPrompts, position: str) -> list[int]:
    if position not in prompts.positions:
        known = ", ".join(prompts.positions)
        raise ValueError(f"task: expected position to be one of {known}, got {position!r}")
    places: list[int] = prompts.positions[position].tolist()
    return places
