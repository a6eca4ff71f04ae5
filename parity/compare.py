"""Compare what two sides computed, quantity by quantity, and write the table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

TOLERANCE = 1e-5
GRADIENT = "gradient of "

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Differs:
    """Why a quantity is not expected to be equal, and theirs / ours if the reason determines it."""

    reason: str
    ratio: float | None = None


@dataclass
class Comparison:
    """Quantities of both sides by name, and which of them are known to differ."""

    mode: str
    ours: Tensors
    theirs: Tensors
    differs: dict[str, Differs] = field(default_factory=dict)


@dataclass
class Row:
    """One line of the table."""

    ours: str
    peer: str
    what: str
    difference: float
    verdict: str
    ok: bool = True


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return max |ours - theirs| / max |ours|; inf if shapes differ, for NaN, or if ours is 0."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if ours.shape != theirs.shape or not bool((ours != 0).any()):
        return math.inf
    found = float((ours - theirs).abs().max() / ours.abs().max())
    return math.inf if math.isnan(found) else found


def compare(ours: str, peer: str, found: Comparison) -> list[Row]:
    """Return one row for everything that has to be equal, and one per known difference."""
    equal = {
        name: difference(found.ours[name], theirs)
        for name, theirs in found.theirs.items()
        if name not in found.differs
    }
    rows = []
    if equal:
        worst = max(equal.values())
        wrong = [name for name, size in equal.items() if not size <= TOLERANCE]
        verdict = f"DIFFERS: {', '.join(wrong)}" if wrong else "equal"
        what = f"{found.mode}: {_list(equal)}"
        rows.append(Row(ours, peer, what, worst, verdict, not wrong))
    for name, known in found.differs.items():
        a, b = found.ours[name].detach().double(), found.theirs[name].detach().double()
        size, ratio = difference(a, b), float(b.norm() / a.norm())
        says, ok = f"theirs / ours {ratio:.4g}: {known.reason}", True
        if known.ratio is not None:
            ok = float((b - known.ratio * a).abs().max()) <= TOLERANCE * float(a.abs().max())
            says = says if ok else f"DIFFERS from the ratio {known.ratio:.4g}, {says}"
        elif size <= TOLERANCE:
            says = f"equal in this version; was known for: {known.reason}"
        rows.append(Row(ours, peer, f"{found.mode}: {name}", size, says, ok))
    return rows


def _list(names: Iterable[str]) -> str:
    """Join names, with the gradients in one bracket."""
    names = list(names)
    gradients = [name.removeprefix(GRADIENT) for name in names if name.startswith(GRADIENT)]
    listed = [name for name in names if not name.startswith(GRADIENT)]
    if gradients:
        listed.append(f"gradients ({', '.join(gradients)})")
    return ", ".join(listed)


def table(rows: list[Row]) -> str:
    """Return the table."""
    lines = [
        "| ours | peer | compared | max relative difference | verdict |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        size = "" if math.isnan(row.difference) else f"{row.difference:.1e}"
        cells = (row.ours, row.peer, row.what, size, row.verdict)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
