"""Damage files and use them: what is used has to be right, or refused by the name of the file."""

from __future__ import annotations

import logging
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fastsae
from fastsae.data import ActivationStore
from fastsae.train.metrics import TIMED
from fastsae.verification import verify
from tests.faults.kills import run
from tests.faults.workloads import Fit, Harvest, Save


def mutate(data: bytes, dice: random.Random) -> tuple[str, bytes]:
    """Return what was done to a file, and its new content."""
    n = len(data)
    at = dice.randrange(n)
    kind = dice.choice(("flip", "flip", "byte", "cut", "extend", "zero", "swap", "digit"))
    if kind == "flip":
        return f"flipped a bit at {at}", _with(data, at, bytes([data[at] ^ 1 << dice.randrange(8)]))
    if kind == "byte":
        return f"changed byte {at}", _with(
            data, at, bytes([(data[at] + dice.randrange(1, 256)) % 256])
        )
    if kind == "cut":
        return f"cut to {at} bytes", data[:at]
    if kind == "extend":
        return "extended", data + dice.randbytes(dice.randrange(1, 100))
    if kind == "zero":
        return f"zeros from {at}", _with(data, at, bytes(min(n - at, dice.randrange(1, 512))))
    if kind == "swap":
        other = dice.randrange(n)
        swapped = _with(_with(data, at, data[other : other + 1]), other, data[at : at + 1])
        return f"swapped bytes {at} and {other}", swapped
    places = [i for i, c in enumerate(data[: 1 << 16]) if 48 <= c <= 57]  # digits of a header
    if not places:
        return "changed byte 0", _with(data, 0, bytes([data[0] ^ 1]))
    at = dice.choice(places)
    return f"another digit at {at}", _with(
        data, at, b"%d" % ((data[at] - 48 + 1 + dice.randrange(9)) % 10)
    )


def _with(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


class Victim:
    """A folder, the files in it that are damaged, and how they are used."""

    def __init__(self, make: Callable[[Path], None], use: Callable[[Path], Any]) -> None:
        self.make, self.use = make, use


def use_store(folder: Path) -> Any:
    """Read every number of a store."""
    out = []
    for split in ("train", "val"):
        store = ActivationStore(folder, split=split, partial=True)
        out += [store.rows(), store.token_ids(), store.doc_ids(), store.positions()]
    return [x.tolist() for x in out], store.manifest.to_dict()


def use_sae(folder: Path) -> Any:
    """Load an SAE and read all of it."""
    sae = fastsae.load(folder)
    state = {name: tensor.tolist() for name, tensor in sae.state_dict().items()}
    return type(sae).__name__, sae.config(), sae.metadata, state


def use_run(folder: Path) -> Any:
    """Go on with a run, or take its end."""
    result = Fit().trainer(folder, seed=7).fit(resume=True)
    state = {name: tensor.tolist() for name, tensor in result.sae.state_dict().items()}
    log = [{**row, **dict.fromkeys(TIMED, 0)} for row in result.history]
    return state, log


def make_interrupted(folder: Path) -> None:
    """Make a harvest that was stopped in the middle."""

    class Stop(Exception):
        pass

    calls = []

    def stop(_: int) -> None:
        calls.append(1)
        if len(calls) == 9:
            raise Stop

    with suppress(Stop):
        Harvest().harvest(folder, progress=stop)


def make_run(folder: Path) -> None:
    """Make a run that was stopped at a checkpoint."""
    import signal

    trainer = Fit().trainer(folder)
    steps = trainer._step

    def stop(x: Any) -> Any:
        out = steps(x)
        if trainer.steps_done == 8:
            signal.raise_signal(signal.SIGTERM)
        return out

    trainer._step = stop  # type: ignore[method-assign]
    with suppress(KeyboardInterrupt):
        trainer.fit()


VICTIMS = {
    "store": Victim(lambda folder: Harvest().work(folder), use_store),
    "interrupted store": Victim(make_interrupted, use_store),
    "continued store": Victim(
        make_interrupted, lambda folder: (Harvest().again(folder), use_store(folder))[1]
    ),
    "SAE": Victim(Save().work, use_sae),
    "run": Victim(make_run, use_run),
    "finished run": Victim(lambda folder: Fit().work(folder), use_run),
}


def damage(count: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Damage one file at a time, `count` times in all; return outcomes, and what was wrong.

    detected: refused, by the name of the file. harmless: the result is right. warned: rows of
    metrics that a warning names the file of, which is no reason to lose a run. Everything else is
    wrong: another result, an error of another kind, or one that does not name the file. `verify`
    has to notice what is not harmless to the letter of the file.
    """
    dice = random.Random(seed)
    outcomes: Counter[str] = Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as top:
        for name, victim in VICTIMS.items():
            base = Path(top) / name.replace(" ", "-")
            run(lambda: victim.make(base))  # noqa: B023
            copy = Path(top) / "copy"
            shutil.copytree(base, copy)
            expected = run(lambda: victim.use(copy))  # noqa: B023
            shutil.rmtree(copy)
            files = sorted(p for p in base.rglob("*") if p.is_file() and not p.name.startswith("."))
            for _ in range(-(-count // len(VICTIMS))):
                shutil.copytree(base, copy)
                file = copy / dice.choice(files).relative_to(base)
                before = file.read_bytes()
                what, after = mutate(before, dice)
                if before == after:
                    shutil.rmtree(copy)
                    continue
                file.write_bytes(after)
                outcome, error = run(lambda: _use(victim, copy, file, expected))  # noqa: B023
                outcomes[outcome] += 1
                if outcome not in ("detected", "harmless", "warned"):
                    wrong.append(f"{name}, {file.relative_to(copy)}, {what}: {outcome}, {error}")
                shutil.rmtree(copy)
    return outcomes, wrong


def _use(victim: Victim, folder: Path, file: Path, expected: Any) -> tuple[str, str]:
    noticed = not verify(folder).ok
    said = Said()
    logging.getLogger("fastsae").addHandler(said)
    try:
        got = victim.use(folder)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        text = str(error)
        named = file.name in text or str(file.parent) in text
        if "\n" in text:
            return "more than one line", text
        if not noticed:
            return "refused, but verify said it was right", text
        return ("detected", text) if named else ("detected without the file's name", text)
    except BaseException as error:
        return "raw error", f"{type(error).__name__}: {error}"
    if repr(got) == repr(expected):
        return "harmless", ""
    warned = noticed and any(file.name in line for line in said.lines)
    return ("warned", "") if warned else ("silently wrong", "")


class Said(logging.Handler):
    """Keeps the warnings of fastsae."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
