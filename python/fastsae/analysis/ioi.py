"""Indirect object identification: who gets it, of two people of whom one gives it.

    "Then, Mary and John went to the store. John gave a drink to" -> " Mary"

Three attributes say what a prompt is about, whatever else it talks of: IO, the name to answer; S,
the name that comes twice; Pos, which comes first, ABB (IO, S, S) or BAB (S, IO, S). Where the
answer is worked out is known in GPT-2 small, and the attributes are what it is worked out from. The
template is an attribute as well: no answer depends on it, but most of an activation may.

Sources: Wang et al. 2022 (arXiv 2211.00593), the task; Makelov et al. 2024 (arXiv 2405.08366), its
attributes. Ours: these templates, the template as a fourth attribute, and keeping the names and
templates that a model can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.analysis.task import TaskPrompts, TaskRuns
from fastsae.models.chunks import prefix_token

_NAMES = (
    "James John Robert Michael William David Richard Joseph Thomas Charles Mary Patricia "
    "Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Daniel Matthew Anthony Mark "
    "Paul Andrew Kevin Brian George Emma Alice Anna Laura Kate Lucy Jane Amy Rachel Emily "
    "Peter Simon Adam Henry Jack Tom Max Ben Luke Ryan Eric Scott Frank Jason Martin Maria "
    "Lisa Nancy Helen Ruth Julia Claire Sophia Lily Ella "
)
NAMES = tuple(_NAMES.split())
"""Common ones; those that are not one token are left out by the task."""
TEMPLATES = (
    "Then, {A} and {B} went to the {place}. {S} gave a {thing} to",
    "When {A} and {B} got a {thing} at the {place}, {S} decided to give it to",
    "Then, {A} and {B} had a long argument at the {place}. Afterwards {S} said to",
    "After {A} and {B} went to the {place}, {S} handed a {thing} to",
    "While {A} and {B} were working at the {place}, {S} passed a {thing} to",
    "Friends {A} and {B} found a {thing} at the {place}. {S} gave it to",
)
PLACES = ("store", "garden", "school", "hospital", "office", "station", "house", "restaurant")
THINGS = ("book", "drink", "ring", "letter", "snack", "ball", "basket", "necklace")
ORDERS = ("ABB", "BAB")
FIELDS = ("template", "place", "thing", "IO", "S", "Pos")


@dataclass(frozen=True)
class IOIPrompts(TaskPrompts):
    """Prompts of an `IOITask`."""

    task: IOITask
    fields: Tensor
    """int64 `[n, 6]`: template, place, thing, IO, S and Pos, by number."""

    def changed(self, attribute: str, seed: int = 0) -> IOIPrompts:
        """Return the same prompts with another value of one attribute.

        Args:
            attribute: "IO" | "S" | "Pos". Another IO or S is a name that the prompt does not have.
            seed: of the names.
        """
        if attribute not in ("IO", "S", "Pos"):
            raise ValueError(f"ioi: expected attribute to be IO, S or Pos, got {attribute!r}")
        fields = self.fields.clone()
        column = FIELDS.index(attribute)
        if attribute == "Pos":
            fields[:, column] = 1 - fields[:, column]
        else:
            names = fields[:, [FIELDS.index("IO"), FIELDS.index("S")]]
            fields[:, column] = _other(names, len(self.task.names), seed)
        return self.task.build(fields)

    def subset(self, keep: Tensor) -> IOIPrompts:
        """Return the prompts whose number is in `keep`, or of which the mask says so."""
        return self.task.build(self.fields[keep])


class IOITask:
    """Makes prompts of two names, of whom one gives something to the other.

        task = IOITask(tokenizer)
        prompts = task.draw(500, seed=0)

    Args:
        tokenizer: called as `tokenizer(text, add_special_tokens=False)["input_ids"]`.
        names: those that are not one token with the space in front are left out.
        templates: each with {A}, {B} and {S}, and ending before the answer; {place} and {thing} are
            filled in where they are.
        prefix: token put first; None takes the tokenizer's BOS, else its EOS.

    Raises:
        ValueError: fewer than three names are one token, or a template has no {A}, {B} or {S}.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        names: Sequence[str] = NAMES,
        templates: Sequence[str] = TEMPLATES,
        prefix: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.prefix = prefix_token(tokenizer) if prefix is None else prefix
        self.names = [name for name in names if len(self._tokens(" " + name)) == 1]
        if len(self.names) < 3:
            raise ValueError(
                f"ioi: expected three names that are one token each, got {', '.join(self.names)}"
            )
        self.templates = list(templates)
        for template in self.templates:
            if wrong := next((x for x in ("{A}", "{B}", "{S}") if x not in template), None):
                raise ValueError(f"ioi: expected {wrong} in a template, got {template!r}")

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def draw(self, n: int, seed: int) -> IOIPrompts:
        """Return n prompts, every field drawn uniformly, IO and S different."""
        generator = torch.Generator().manual_seed(seed)
        sizes = [len(self.templates), len(PLACES), len(THINGS), len(self.names)]
        drawn = [torch.randint(size, (n,), generator=generator) for size in sizes]
        shift = torch.randint(1, len(self.names), (n,), generator=generator)
        subject = (drawn[-1] + shift) % len(self.names)
        order = torch.randint(2, (n,), generator=generator)
        return self.build(torch.stack([*drawn, subject, order], 1))

    def build(self, fields: Tensor) -> IOIPrompts:
        """Return the prompts of `fields: int64 [n, 6]`, see `IOIPrompts.fields`."""
        rows = [self._prompt(*row) for row in fields.tolist()]
        columns = dict(zip(FIELDS, fields.unbind(1), strict=True))
        roles = ("IO", "S1", "S2", "end")
        places = torch.tensor([[at[role] for role in roles] for _, at in rows]).view(-1, len(roles))
        return IOIPrompts(
            ids=[ids for ids, _ in rows],
            candidates=torch.tensor([self._tokens(" " + name)[0] for name in self.names]),
            right=columns["IO"],
            wrong=columns["S"],
            attributes={name: columns[name] for name in ("IO", "S", "Pos", "template")},
            values={
                "IO": self.names,
                "S": self.names,
                "Pos": list(ORDERS),
                "template": self.templates,
            },
            positions=dict(zip(roles, places.unbind(1), strict=True)),
            task=self,
            fields=fields,
        )

    def _prompt(
        self, template: int, place: int, thing: int, io: int, s: int, order: int
    ) -> tuple[list[int], dict[str, int]]:
        """Return the tokens of a prompt and where the names and the end are.

        Pieces are tokenized by themselves, cut in front of the space before a name, where
        tokenizers of this kind cut anyway: so each name is one token wherever it stands.
        """
        first, second = (io, s) if ORDERS[order] == "ABB" else (s, io)
        number = {"A": first, "B": second, "S": s}
        text = self.templates[template].replace("{place}", PLACES[place])
        ids, at = [self.prefix], dict[str, int]()
        for piece in text.replace("{thing}", THINGS[thing]).replace("{", "\0").split("\0"):
            key, _, rest = piece.rpartition("}")
            if key:
                seen = "IO" if number[key] == io else "S1" if "S1" not in at else "S2"
                at[seen] = len(ids)
                ids += self._tokens(" " + self.names[number[key]])
            ids += self._tokens(rest.rstrip(" ")) if rest.strip() else []
        return ids, at | {"end": len(ids) - 1}

    def keep(self, names: Sequence[str], templates: Sequence[str]) -> IOITask:
        """Return the task with these names and templates."""
        return IOITask(self.tokenizer, names=names, templates=templates, prefix=self.prefix)


@dataclass(frozen=True)
class Solved:
    """What a model makes of a task."""

    accuracy: float
    """Share of the prompts with a larger logit for IO than for S."""
    first: float
    """Share of the prompts with the largest logit of all names for IO."""
    logit_difference: float
    """Mean logit of IO minus that of S."""
    by: dict[str, Tensor]
    """Accuracy by value: of "IO", "S" and "template"; nan where there is no prompt."""


def solved(model: nn.Module, prompts: IOIPrompts, *, batch_size: int = 64) -> Solved:
    """Return how well a model does the task, by name and by template as well.

    Args:
        model: a causal language model of `transformers`.
        prompts: some dozens of each name, to tell names apart.
        batch_size: prompts per forward pass.
    """
    logits = TaskRuns(model, prompts, "end", batch_size=batch_size).logits()
    difference = prompts.logit_difference(logits)
    right = (difference > 0).double()
    sizes = {"IO": len(prompts.task.names), "template": len(prompts.task.templates)}
    by = {}
    for name, size in {**sizes, "S": sizes["IO"]}.items():
        values = prompts.fields[:, FIELDS.index(name)]
        total = torch.zeros(size, dtype=torch.float64).index_add_(0, values, right)
        by[name] = total / values.bincount(minlength=size)
    return Solved(
        accuracy=float(right.mean()),
        first=float((logits.argmax(1) == prompts.right).double().mean()),
        logit_difference=float(difference.mean()),
        by=by,
    )


def solvable(task: IOITask, found: Solved, at_least: float = 0.9) -> IOITask:
    """Return the task with the names and templates that a model can do.

    Args:
        task: as it was when the model was run.
        found: from `solved`.
        at_least: accuracy of what is kept; a name needs it as IO and as S. What no prompt had is
            left out.
    """
    names = (found.by["IO"] >= at_least) & (found.by["S"] >= at_least)
    templates = found.by["template"] >= at_least
    return task.keep(
        [name for name, keep in zip(task.names, names.tolist(), strict=True) if keep],
        [text for text, keep in zip(task.templates, templates.tolist(), strict=True) if keep],
    )


def _other(taken: Tensor, size: int, seed: int) -> Tensor:
    """Return for each row of `taken: [n, 2]`, two numbers that differ, another one below size."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(size - 2, (len(taken),), generator=generator)
    for limit in taken.sort(1).values.unbind(1):  # skip what is taken, the smaller one first
        drawn = drawn + (drawn >= limit)
    return drawn
