"""Kill a process at every file operation, and at random moments; look, and run again."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.workloads import Workload

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")


def in_child(work: Callable[[], Any]) -> Callable[[], tuple[int, Any]]:
    """Start `work` in a fork; return what waits for it and gives its signal or status, and result.

    A result comes back through a file, as repr; None after a kill.
    """
    handle, name = tempfile.mkstemp()
    os.close(handle)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            text = repr(work())
            Path(name).write_text(text)
            status = 0
        except BaseException:
            Path(name).write_text(repr(traceback.format_exc()))
        finally:
            os._exit(status)

    def wait() -> tuple[int, Any]:
        _, status = os.waitpid(child, 0)
        text = Path(name).read_text()
        os.unlink(name)
        return status, eval(text, {"inf": math.inf, "nan": math.nan}) if text else None

    wait.pid = child  # type: ignore[attr-defined]
    return wait


def run(work: Callable[[], Any]) -> Any:
    """Run in a fork and return the result.

    Raises:
        AssertionError: it failed.
    """
    status, result = in_child(work)()
    assert status == 0, result
    return result


def kill_at(number: int) -> None:
    """End this process with SIGKILL at its file operation `number`, counted from 0."""
    seen = 0

    def hook(event: str, _: Any) -> None:
        nonlocal seen
        if event in OPERATIONS:
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)


def count_operations(work: Callable[[], None]) -> int:
    """Return how many file operations `work` has."""
    seen = [0]

    def hook(event: str, _: Any) -> None:
        seen[0] += event in OPERATIONS

    def counted() -> int:
        sys.addaudithook(hook)
        work()
        return seen[0]

    return int(run(counted))


def kills(workload: Workload, count: int, seed: int = 0) -> list[str]:
    """Kill `workload` `count` times, each in a new folder; return what was wrong, a line each.

    Half of the kills are at file operations, spread over all of them (all, if there are fewer), and
    half at random times. After each the folder is looked at, the work is done again (and, at
    random, killed again first), and the result compared with that of a run without kills.
    """
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as top:
        base, clean = Path(top) / "base", Path(top) / "clean"
        base.mkdir()
        run(lambda: workload.prepare(base))
        shutil.copytree(base, clean)
        started = time.perf_counter()
        run(lambda: workload.work(clean))
        seconds = time.perf_counter() - started
        expected = run(lambda: workload.result(clean))
        trial = Path(top) / "trial"
        shutil.copytree(base, trial)
        operations = count_operations(lambda: workload.work(trial))
        shutil.rmtree(trial)
        wrong = []
        for i in range(count):
            folder = Path(top) / "trial"
            shutil.copytree(base, folder)
            place = (i // 2) * operations // max(1, (count + 1) // 2) if i % 2 == 0 else None
            what = _kill(workload, folder, place, dice.uniform(0, seconds))
            found = _after(workload, folder, expected, dice, operations)
            if found:
                wrong.append(f"{workload.name}, killed {what}: {found}")
            shutil.rmtree(folder)
        return wrong


def _kill(workload: Workload, folder: Path, place: int | None, delay: float) -> str:
    def work() -> None:
        if place is not None:
            kill_at(place)
        workload.work(folder)

    wait = in_child(work)
    if place is None:
        time.sleep(delay)
        os.kill(wait.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    wait()
    return f"at operation {place}" if place is not None else f"after {delay:.4f} s"


def _after(
    workload: Workload, folder: Path, expected: Any, dice: random.Random, operations: int
) -> str | None:
    try:
        if wrong := run(lambda: workload.between(folder)):
            return str(wrong)
        if dice.random() < 0.3:  # the second run is killed as well
            place = dice.randrange(operations)

            def again() -> None:
                kill_at(place)
                workload.again(folder)

            in_child(again)()
            if wrong := run(lambda: workload.between(folder)):
                return f"after a second kill: {wrong}"
        run(lambda: workload.again(folder))
        got = run(lambda: workload.result(folder))
    except AssertionError as error:
        return str(error)
    return None if got == expected else f"another result: {_difference(got, expected)}"


def _difference(got: Any, expected: Any) -> str:
    if isinstance(got, dict):
        return str(sorted(k for k in got.keys() | expected if got.get(k) != expected.get(k)))
    if isinstance(got, tuple):
        return "; ".join(_difference(a, b) for a, b in zip(got, expected, strict=True) if a != b)
    return f"{got} instead of {expected}"
