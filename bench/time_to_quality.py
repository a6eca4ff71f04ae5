"""Time how long a TopK SAE trains until it reaches a given FVU: fastsae and other libraries.

    python -m bench.time_to_quality DATA --out RESULTS.jsonl      # trains what RESULTS lacks
    python -m bench.time_to_quality --report RESULTS.jsonl        # prints the tables

DATA is a store of `fastsae harvest`, or safetensors with `acts` [n, d] and, in its metadata,
`n_train`, the number of training rows; FVU is pooled over the other rows. The target is what
fastsae's old rate, 2e-4 / sqrt(d_sae / 2^14), reaches in 1024 updates of 512 rows; `--target` sets
another one.

A schedule depends on the length of the run, so the answer is the shortest run that ends at the
target or below. fastsae has its defaults, or the rates in `--lr`. Every other implementation gets
the best of a sweep of its own rate, which goes on while the best one is at an end; that uses the
first seed only. Then the shortest run is searched for each seed, and these runs are repeated
alternately and timed. `bench.training_runs` says how each library is called.

Each line of RESULTS is one run; an interrupted command continues where it stopped. Remove the lines
of an implementation that has changed. A library that cannot be imported is skipped with a message;
to install them all: pip install eai-sparsify dictionary-learning sae-lens
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from bisect import bisect_left
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.architectures import read_results
from bench.peers import import_error
from bench.run import machine
from bench.training_runs import OLD, RUNS, Job, fvu, load, train

OLD_STEPS, WARM_UP = 1024, 8
SLACK = 1.005  # a run repeated with several threads ends a little elsewhere
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
PACKAGES = ("dictionary-learning", "sae-lens", "eai-sparsify")
Row = dict[str, Any]


def step_grid(shortest: int, longest: int, per_octave: int) -> list[int]:
    """Return numbers of steps at equal ratios: 32, 45, 64 ... for two per octave."""
    places = round(per_octave * math.log2(longest / shortest))
    return sorted({round(shortest * 2 ** (i / per_octave)) for i in range(places + 1)})


class Runs:
    """Runs on the same rows and of the same size, made once and remembered in a file."""

    def __init__(self, data: Path, site: str | None, out: Path, d_sae: int, k: int) -> None:
        self.rows, self.held_out = load(data, site)
        self.same = {"data": self.rows.fingerprint(), "d_sae": d_sae, "k": k}
        self.out = out
        self.lines = read_results(out)

    def add(self, line: Row) -> None:
        """Write a line, unless it is there already."""
        if line not in self.lines:
            self.lines.append(line)
            with self.out.open("a") as out:
                out.write(json.dumps(line) + "\n")

    def __call__(
        self, name: str, lr: float | None, steps: int, seed: int, **timed: float | int
    ) -> Row:
        """Return the line of a run; timed: what tells its repetitions apart, of kind timed."""
        kind = "timed" if timed else "run"
        key = {"kind": kind, **self.same, "implementation": name, "lr": lr, "steps": steps}
        key |= {"seed": seed, **timed}
        for line in self.lines:
            if key.items() <= line.items():
                return line
        job = Job(self.rows, self.same["d_sae"], self.same["k"], lr, steps, seed)
        found: Row = {"fvu": None, "seconds": None, "rate": lr}
        try:
            trained = train(name, job)
            reached = fvu(self.held_out, trained.reconstruct)
            found = {"seconds": trained.seconds, "rate": trained.lr}
            found["fvu"] = reached if math.isfinite(reached) else None
        except RuntimeError as e:  # fastsae refuses to go on
            if "finite" not in str(e):
                raise
        self.add(key | found)
        of = f"FVU {found['fvu'] or math.inf:.4f}, {found['seconds'] or math.inf:.1f} s"
        print(f"{name}, lr {lr}, {steps} steps, seed {seed}: {of}", file=sys.stderr, flush=True)
        return key | found

    def fvu(self, name: str, lr: float | None, steps: int, seed: int) -> float:
        """Return where a run ends; infinite where it diverged."""
        found: float | None = self(name, lr, steps, seed)["fvu"]
        return math.inf if found is None else found


def sweep(
    runs: Runs, name: str, rates: Sequence[float], grid: Sequence[int], target: float, seed: int
) -> tuple[float, int]:
    """Return the rate that needs the fewest steps, and the place of that number in the grid.

    At the same number the lower FVU counts. A rate that does not reach the target in as many steps
    as the best so far is done after one run.
    """
    waiting = sorted(rates, key=lambda lr: abs(math.log(lr / rates[len(rates) // 2])))
    best = (len(grid), math.inf, waiting[0])  # place, FVU there, rate
    tried: list[tuple[int, float, float]] = []
    for lr in waiting:  # which grows

        def ends_at(place: int, lr: float = lr) -> float:
            return runs.fvu(name, lr, grid[place], seed)

        place = best[0]
        if not tried or ends_at(place) <= target:
            place = bisect_left(range(place), True, key=lambda i: ends_at(i) <= target)
        place = min(place, len(grid) - 1)
        tried.append((place, ends_at(place), lr))
        best = min(tried, key=lambda found: found[:2])  # the first of equal ones
        if lr == waiting[-1]:
            known = [lr for _, _, lr in tried]
            ends = ((max(known), 2 * max(known)), (min(known), min(known) / 2))
            waiting += [more for end, more in ends if end == best[2] and more < 1]
    return best[2], best[0]


def fewest(
    runs: Runs,
    name: str,
    lr: float | None,
    place: int,
    grid: Sequence[int],
    target: float,
    seed: int,
) -> int:
    """Return the fewest steps after which a run of `seed` ends at the target; near `place`."""

    def reached(i: int) -> bool:
        return runs.fvu(name, lr, grid[i], seed) <= target

    while place > 0 and reached(place - 1):
        place -= 1
    while place < len(grid) - 1 and not reached(place):
        place += 1
    return grid[place]


def measure(runs: Runs, arguments: argparse.Namespace, names: list[str]) -> None:
    """Find the target, the best rates and the shortest runs, and time these alternately."""
    seeds, target = arguments.seeds, arguments.target
    if target is None:
        old = [runs.fvu(OLD, None, OLD_STEPS, seed) for seed in seeds]
        target = statistics.fmean(old)
    runs.add({"kind": "target", **runs.same, "target": target})
    shortest, longest = arguments.range
    grid = step_grid(shortest, longest, arguments.per_octave)
    found: dict[tuple[str, float | None], list[int]] = {}
    for name in names:
        if name == "fastsae":
            middle = len(grid) // 2
            starts = dict.fromkeys(arguments.lr or [None], middle)
        else:
            starts = dict([sweep(runs, name, arguments.rates, grid, target, seeds[0])])
        for lr, place in starts.items():
            found[name, lr] = [fewest(runs, name, lr, place, grid, target, seed) for seed in seeds]
    for again in range(arguments.repeats):
        for (name, lr), steps in found.items():
            i = again % len(seeds)
            job = Job(runs.rows, runs.same["d_sae"], runs.same["k"], lr, WARM_UP, seeds[i])
            train(name, job)  # caches as it leaves them itself
            runs(name, lr, steps[i], seeds[i], again=again, target=target)


def _table(head: str, rows: list[list[object]]) -> list[str]:
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    middle = round(statistics.median(values))
    return f"{middle}" if low == high else f"{middle} ({low} to {high})"


def _timed(lines: list[Row], target: float) -> list[str]:
    """Return the table of timed runs: medians, relative to the first rate of fastsae."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for line in lines:
        if line["kind"] == "timed" and line["target"] == target:
            groups.setdefault((line["implementation"], line["rate"]), []).append(line)
    rows: list[list[object]] = []
    base, others = math.nan, []
    for (name, rate), own in groups.items():
        spent = statistics.median(row["seconds"] for row in own)
        ends = statistics.fmean(math.inf if row["fvu"] is None else row["fvu"] for row in own)
        each = 1e3 * statistics.median(row["seconds"] / row["steps"] for row in own)
        base = spent if name == "fastsae" and base != base else base
        reached = ends <= SLACK * target
        others += [spent] if reached and name != "fastsae" else []
        ratio = f"{base / spent:.2f}" if reached else "not reached"
        steps = _span([row["steps"] for row in own])
        rows.append([name, f"{rate:.2g}", steps, f"{ends:.4f}", f"{spent:.2f}", f"{each:.1f}"])
        rows[-1].append(ratio)
    head = "| implementation | rate | steps | FVU | seconds | ms a step | fastsae / this |"
    best = ["", f"fastsae / best of the others: {base / min(others):.3f}"] if others else []
    return _table(head, rows) + best


def _rates(lines: list[Row], target: float) -> list[str]:
    """Return the table of the sweeps: the first seed's fewest steps of every rate."""
    rows: list[list[object]] = []
    groups: dict[tuple[str, float], list[Row]] = {}
    seed = next((line["seed"] for line in lines if line["kind"] == "run"), 0)
    for line in lines:
        if line["kind"] == "run" and line["seed"] == seed and line["implementation"] != OLD:
            groups.setdefault((line["implementation"], line["rate"]), []).append(line)
    for (name, rate), own in sorted(groups.items()):
        ends = {row["steps"]: math.inf if row["fvu"] is None else row["fvu"] for row in own}
        good = [steps for steps, reached in ends.items() if reached <= target]
        answer = str(min(good)) if good else f"> {max(ends)}"
        rows.append([name, f"{rate:.2g}", answer, f"{ends[min(good) if good else max(ends)]:.4f}"])
    return _table("| implementation | rate | steps | FVU then |", rows)


def report(lines: list[Row]) -> str:
    """Return the tables of every target."""
    text = []
    for target in [line for line in lines if line["kind"] == "target"]:
        same = ("data", "d_sae", "k")
        own = [row for row in lines if all(row.get(name) == target[name] for name in same)]
        text += [f"d_sae {target['d_sae']}, k {target['k']}, target FVU {target['target']:.4f}", ""]
        if old := [row for row in own if row.get("implementation") == OLD]:
            seconds = statistics.median(row["seconds"] for row in old)
            text += [f"{OLD}, {old[0]['steps']} steps: {seconds:.1f} s, not paired", ""]
        text += [*_timed(own, target["target"]), "", *_rates(own, target["target"]), ""]
    return "\n".join(text)


def main() -> None:
    """Parse arguments, train what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", help="activations")
    parser.add_argument("--out", type=Path, help="results, one line a run")
    parser.add_argument("--report", type=Path, help="print the tables of these results")
    parser.add_argument("--site", help="of a store with several")
    every = [name for name in RUNS if name != OLD]
    parser.add_argument("--only", nargs="*", default=every, choices=every, metavar="NAME")
    parser.add_argument("--d-sae", type=int, nargs="*", default=[2304, 9216])
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, nargs="*", help="rates of fastsae instead of its own")
    parser.add_argument("--rates", type=float, nargs="*", default=RATES, help="of the others")
    parser.add_argument("--target", type=float, help="FVU to reach")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    parser.add_argument("--range", type=int, nargs=2, default=[32, 1448], help="of steps")
    parser.add_argument("--per-octave", type=int, default=4, help="numbers of steps to try")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.report:
        print(report(read_results(arguments.report)))
        return
    if arguments.data is None or arguments.out is None:
        parser.error("expected DATA and --out, or --report")
    torch.set_num_threads(arguments.threads)
    reasons = {name: import_error(RUNS[name][2]) for name in arguments.only}
    for name in filter(reasons.get, reasons):
        print(f"left out: {name} ({reasons[name]})", file=sys.stderr)
    names = [name for name in arguments.only if not reasons[name]]
    used = [package for package in PACKAGES if any(name.startswith(package) for name in names)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for d_sae in arguments.d_sae:
        runs = Runs(arguments.data, arguments.site, arguments.out, d_sae, arguments.k)
        about = {package: version(package) for package in used}
        runs.add({"kind": "machine", **machine("cpu"), **about})
        measure(runs, arguments, names)
    print(report(read_results(arguments.out)))


if __name__ == "__main__":
    main()
