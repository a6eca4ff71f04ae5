"""Fuzz the ops of this machine: every instruction set, then the emulated CUDA kernels.

    python -m tests.fuzz [--rows N] [--calls M] [--seed S] [--isa LEVEL | --emulated]
    python -m tests.fuzz --seed S --isa LEVEL --call topk:123    one call again, in this process

Without --isa and --emulated it is `make fuzz`: N rows of topk and M calls of the other ops at every
instruction set that the machine has, and of the emulated kernels N / 100 rows and M / 10 calls.
Calls run in a child process with FASTSAE_ISA set, on one thread. A call that is wrong, or that ends
the process or hangs, is printed with the command that makes it again. The same seed makes the same
calls everywhere. Ends with 1 if anything was wrong.

The default, 10 million rows and 20,000 calls, takes about three minutes for each instruction set on
one core, and so do the emulated kernels: `inputs.WIDTHS` says how wide rows are.
"""

from __future__ import annotations

import argparse
import faulthandler
import signal
import sys
from pathlib import Path

from tests.fuzz import driver

LEVELS = ("scalar", "avx2", "avx512")


def main() -> int:
    """Parse arguments; be the parent, the child, or make one call."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of topk, at least")
    parser.add_argument("--calls", type=int, default=20_000, help="calls of the other ops")
    parser.add_argument("--seed", type=int, default=0)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--isa", choices=LEVELS, help="this instruction set only")
    where.add_argument("--emulated", action="store_true", help="the emulated CUDA kernels only")
    parser.add_argument("--call", metavar="STREAM:INDEX", help="make this call only")
    parser.add_argument("--patience", type=float, default=120, help="seconds that a call may take")
    parser.add_argument("--crashes", type=int, default=10, help="give up after as many")
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.progress or a.call:
        return _child(a)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child ends too
    from fastsae import _host

    available = LEVELS[: LEVELS.index(_host.best_isa()) + 1]
    if a.isa:
        if a.isa not in available:
            parser.error(f"expected an instruction set of this machine, {available}, got {a.isa}")
        runs = [(a.isa, a.rows, a.calls)]
    elif a.emulated:
        runs = [("emulated", a.rows, a.calls)]
    else:
        runs = [(isa, a.rows, a.calls) for isa in available]
        runs.append(("emulated", a.rows // 100, a.calls // 10))
    good = True
    for name, rows, calls in runs:
        outcome = _run(name, rows, calls, a)
        print(f"{name}: {outcome}", flush=True)
        good = good and outcome.good
    return 0 if good else 1


def _where(name: str) -> list[str]:
    return ["--emulated"] if name == "emulated" else ["--isa", name]


def _run(name: str, rows: int, calls: int, a: argparse.Namespace) -> driver.Outcome:
    common = ["--seed", str(a.seed), *_where(name)]
    command = ["-m", "tests.fuzz", *common, "--rows", str(rows), "--calls", str(calls)]
    environment = {} if name == "emulated" else {"FASTSAE_ISA": name}
    again = " ".join(["python -m tests.fuzz", *common])
    return driver.supervise(driver.python(*command), environment, again, a.patience, a.crashes)


def _child(a: argparse.Namespace) -> int:
    faulthandler.enable()
    import torch

    from fastsae import _host
    from tests.fuzz import checks

    torch.set_num_threads(1)
    # Fills what torch.empty returns with NaN and the largest integers: what a kernel forgets to
    # write is not right by what was there before.
    torch.use_deterministic_algorithms(True, warn_only=True)
    if a.emulated:
        checks.emulate()
    elif a.isa:
        _host.set_isa(a.isa)
    if a.call:
        stream, index = a.call.split(":")
        try:
            what, rows = checks.call(a.seed, stream, int(index))
        except checks.Wrong as e:
            print(f"wrong: {e}")
            return 1
        print(f"right: {what}, {rows} rows")
        return 0
    progress = driver.Progress(a.progress)
    progress.read()
    again = " ".join(["python -m tests.fuzz --seed", str(a.seed), *_where(a.isa or "emulated")])
    driver.work(lambda *c: checks.call(a.seed, *c)[1], a.rows, a.calls, progress, again)
    return 0


if __name__ == "__main__":
    sys.exit(main())
