"""Runs calls in a process of their own, so that a crash or a hang ends that and names its call.

The process writes the name of every call to a file before it makes it. When it dies, the call is
reported and another process goes on behind it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SHOWN = 10
"""Wrong calls that are printed; the others are counted."""


@dataclass
class Progress:
    """What has been done, and the call that is being made."""

    path: Path
    stream: str = "topk"
    index: int = 0
    rows: int = 0
    topk_calls: int = 0
    calls: int = 0
    wrong: int = 0

    def read(self) -> None:
        """Take over what another process wrote."""
        text = self.path.read_text().split()
        if text:
            self.stream = text[0]
            self.index, self.rows, self.topk_calls, self.calls, self.wrong = map(int, text[1:])

    def write(self) -> None:
        """Write the state at the start of the file: one line of a fixed width."""
        numbers = (self.index, self.rows, self.topk_calls, self.calls, self.wrong)
        line = f"{self.stream} " + " ".join(f"{n:>19}" for n in numbers) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY)
        os.pwrite(descriptor, f"{line:>120}".encode(), 0)
        os.close(descriptor)


def work(
    call: Callable[[str, int], int], rows: int, calls: int, progress: Progress, again: str
) -> None:
    """Make calls until there were `rows` rows of topk and `calls` of the other ops.

    `call` returns the rows of the call that it makes, or raises; `again` says how to make a call
    again, with the name of it to follow.
    """
    while progress.stream == "topk" and progress.rows < rows:
        progress.rows += _one(call, progress, again)
        progress.topk_calls += 1
        progress.index += 1
    if progress.stream == "topk":
        progress.stream, progress.index = "ops", 0
    while progress.index < calls:
        _one(call, progress, again)
        progress.calls += 1
        progress.index += 1
    progress.write()


def _one(call: Callable[[str, int], int], progress: Progress, again: str) -> int:
    progress.write()
    try:
        return call(progress.stream, progress.index)
    except Exception as e:
        progress.wrong += 1
        if progress.wrong <= SHOWN:
            name = f"{progress.stream}:{progress.index}"
            print(f"wrong: {name}: {type(e).__name__}: {e}\n  {again} --call {name}", flush=True)
        return 0


@dataclass
class Outcome:
    """The result of a run."""

    progress: Progress
    seconds: float = 0.0
    crashed: list[str] = field(default_factory=list)
    """The calls that ended a process, or did not return."""

    @property
    def good(self) -> bool:
        """Whether everything was right."""
        return not (self.progress.wrong or self.crashed)

    def __str__(self) -> str:
        p = self.progress
        return (
            f"{p.rows} rows of topk in {p.topk_calls} calls, {p.calls} calls of other ops, "
            f"{p.wrong} wrong, {len(self.crashed)} crashes, {self.seconds:.0f} s"
        )


def supervise(
    command: Sequence[str], environment: dict[str, str], again: str, patience: float, crashes: int
) -> Outcome:
    """Run `command --progress FILE` until it ends well, starting it behind each call that kills it.

    Args:
        command: calls `work` with the `Progress` that FILE holds.
        environment: of the process.
        again: how to make a call again, with the name of it to follow.
        patience: seconds that a call may take.
        crashes: how many are enough to give up.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        progress = Progress(Path(folder) / "progress")
        progress.path.touch()
        outcome = Outcome(progress)
        while True:
            process = subprocess.Popen(
                [*command, "--progress", str(progress.path)], env={**os.environ, **environment}
            )
            try:
                status = _wait(process, progress.path, patience)
            except BaseException:
                process.kill()
                raise
            if not progress.path.read_text():
                raise RuntimeError(f"fuzz: expected a call, but the process {_said(status)}")
            progress.read()
            if status == 0:
                break
            name = f"{progress.stream}:{progress.index}"
            outcome.crashed.append(name)
            print(
                f"crash: {name}: the process {_said(status)}\n  {again} --call {name}", flush=True
            )
            if len(outcome.crashed) >= crashes:
                print("fuzz: gave up", flush=True)
                break
            progress.index += 1
            progress.topk_calls += progress.stream == "topk"
            progress.calls += progress.stream == "ops"
            progress.write()
    outcome.seconds = time.monotonic() - started
    return outcome


def _wait(process: subprocess.Popen[bytes], path: Path, patience: float) -> int | None:
    """Return the exit status, or None after killing a process that no longer makes progress."""
    seen, since = "", time.monotonic()
    while True:
        try:
            return process.wait(timeout=min(1.0, patience / 2))
        except subprocess.TimeoutExpired:
            text = path.read_text()
            if text != seen:
                seen, since = text, time.monotonic()
            elif time.monotonic() - since > patience:
                process.kill()
                process.wait()
                return None


def _said(status: int | None) -> str:
    if status is None:
        return "did not return"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with {status}"


def python(*arguments: str) -> list[str]:
    """Return a command of this interpreter."""
    return [sys.executable, *arguments]
