"""Time one whole TopK training step on the CPU against plain torch and other libraries.

    python -m bench.train_step [--shape A S W] [--seconds 20] [--out F.jsonl] [--memory] [--growth]

A step is encode, decode, loss, backward, optimizer and normalisation of the decoder, as users of
each library run it; `bench.peers` says how each is called and where it differs by design. Before
anything is timed, reconstruction and loss of every way are compared with fastsae's for the same
weights and batch. A library that cannot be imported is left out, with one line that says so; to
have them all: pip install eai-sparsify dictionary-learning sae-lens
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch

from bench import timing
from bench.ops.inputs import SHAPES, describe
from bench.peers import WAYS, Start, Way, build, missing, start
from bench.run import machine

Row = dict[str, object]
PEERS = ("eai-sparsify", "dictionary-learning", "sae-lens")
BASES = ("fastsae", "fastsae bf16")  # what the others are compared with
MEMORY_TOKENS = 4096
GROWTH_BASE, GROWTH_FACTORS = {"n": 256, "d": 128, "d_sae": 4096}, (1, 2, 4, 8)  # with k = 32


def proc_mib(file: str, field: str) -> float:
    """Return a field of a file such as /proc/meminfo in MiB."""
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def groups(names: list[str], shape: str) -> list[list[str]]:
    """Split the ways so that those timed in turn fit in memory together, each with the bases."""
    n, d, d_sae, _ = SHAPES[shape]
    held = 4 * 3 * 2 * d * d_sae / 2**20  # parameters and two moments
    passing = 4 * (2 * d + 6 * n) * d_sae / 2**20  # one step's gradients and dense latents
    room = (0.7 * proc_mib("/proc/meminfo", "MemAvailable") - passing) / held
    bases = [name for name in BASES if name in names]
    others = [name for name in names if name not in bases]
    size = max(1, int(room) - len(bases))
    return [bases + others[i : i + size] for i in range(0, len(others), size)]


def check(ways: dict[str, Way], s: Start) -> None:
    """Raise where a reconstruction or a loss differs from fastsae's before the first step.

    Tokens whose k-th and next latent nearly tie are skipped: rounding decides which one is kept.
    bfloat16 makes many more ties, so there only the loss is compared.
    """
    top = ((s.x - s.b_dec) @ s.W.t() + s.b_enc).topk(s.k + 1).values
    clear = top[:, -2] - top[:, -1] > 1e-4
    expected, fvu = (answer.detach() for answer in ways["fastsae"].forward())
    squared = (s.x - expected).square().sum()
    losses = {"fvu": squared / (s.x - s.x.mean(0)).square().sum(), "mse": squared / len(s.x)}
    for name, way in ways.items():
        guess, loss = (expected, fvu) if name == "fastsae" else way.forward()
        exact = "bf16" not in name
        rtol = 1e-3 if exact else 2e-2
        try:
            if exact:
                torch.testing.assert_close(guess[clear], expected[clear], rtol=rtol, atol=1e-4)
            torch.testing.assert_close(loss, losses[way.loss], rtol=rtol, atol=0)
        except AssertionError as e:
            raise AssertionError(f"{name} differs from fastsae: {e}") from e


def time_group(shape: str, group: list[str], seconds: float, copy_gbs: float) -> list[Row]:
    """Check ways at one shape and time them in turn.

    The floor is torch's product for the encoder, timed in the same turns, and the traffic of Adam:
    p, m and v of both matrices read and written.
    """
    s = start(*SHAPES[shape])
    ways = {name: build(name, s) for name in group}
    check(ways, s)
    z = torch.empty(len(s.x), len(s.W))
    works = {name: way.step for name, way in ways.items()}
    works["product"] = lambda: torch.mm(s.x, s.W.t(), out=z)
    times = timing.medians(works, "cpu", seconds)
    middle = {name: statistics.median(t) for name, t in times.items()}
    floor_ms = middle["product"] + 24 * 2 * s.W.numel() / copy_gbs / 1e6
    rows: list[Row] = []
    for name in group:
        t, ms = times[name], middle[name]
        row: Row = {"shape": describe(shape), "implementation": name, "repeats": len(t)}
        row |= {"median_ms": ms, "min_ms": min(t), "max_ms": max(t)}
        row |= {f"{base} / this": middle[base] / ms for base in BASES if base in ways}
        rows.append({**row, "floor_ms": floor_ms, "floor / this": floor_ms / ms})
    return rows


def peak_mib(name: str, threads: int) -> float:
    """Return what one step adds to the memory of this process, which does nothing else.

    Parameters, optimizer state and what libraries keep are there: a step on 16 tokens made them.
    """
    torch.set_num_threads(threads)
    s = start(MEMORY_TOKENS, *SHAPES["A"][1:])
    way = build(name, s)
    x, s.x = s.x, s.x[:16]
    way.step()
    s.x = x
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = proc_mib("/proc/self/status", "VmRSS")
    way.step()
    return proc_mib("/proc/self/status", "VmHWM") - before


def memory(names: list[str]) -> list[Row]:
    """Return the peaks of fastsae and plain torch beyond parameters and optimizer state."""
    rows: list[Row] = []
    for name in names:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            peak = pool.submit(peak_mib, name, torch.get_num_threads()).result()
        rows.append({"shape": f"A, n {MEMORY_TOKENS}", "implementation": name, "peak_mib": peak})
    return rows


def growth(seconds: float) -> list[Row]:
    """Return how fastsae's step grows with n, d and d_sae: exponents fitted to log times."""
    base = tuple(GROWTH_BASE.values())
    axes = {
        axis: [(*base[:i], f * base[i], *base[i + 1 :]) for f in GROWTH_FACTORS]
        for i, axis in enumerate(GROWTH_BASE)
    }
    sizes = {str(size): size for points in axes.values() for size in points}
    works = {name: build("fastsae", start(*size, 32)).step for name, size in sizes.items()}
    times = timing.medians(works, "cpu", seconds)
    rows: list[Row] = []
    for axis, points in axes.items():
        ms = [statistics.median(times[str(point)]) for point in points]
        logs = [math.log(f) for f in GROWTH_FACTORS], [math.log(t) for t in ms]
        row: Row = {f"x{f}_ms": t for f, t in zip(GROWTH_FACTORS, ms, strict=True)}
        rows.append({"axis": axis, **row, "exponent": statistics.linear_regression(*logs).slope})
    return rows


def table(rows: list[Row]) -> str:
    """Return rows as Markdown; the columns are all their keys, in order."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        texts = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> int:
    """Parse arguments, measure, write, print."""
    parser = argparse.ArgumentParser(description="time whole training steps")
    parser.add_argument("--shape", nargs="*", default=["A", "S", "W"], choices=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=20.0, help="per group of ways")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write JSON lines here")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of a step")
    parser.add_argument("--growth", action="store_true", help="also how a step grows")
    arguments = parser.parse_args()
    reasons = {name: missing(name) for name in WAYS}
    for name in filter(reasons.get, WAYS):
        print(f"left out: {name} ({reasons[name]})", file=sys.stderr)
    names = [name for name in WAYS if not reasons[name]]
    torch.set_num_threads(arguments.threads)
    peers = {name: version(name) for name in names if name in PEERS}
    head: Row = {**machine("cpu"), **peers, **timing.ceilings("cpu")}
    copy_gbs = float(head["copy_gbs"])  # type: ignore[arg-type]
    parts: list[list[Row]] = [[]]
    for shape in arguments.shape:
        for group in groups(names, shape):
            parts[0] += time_group(shape, group, arguments.seconds, copy_gbs)
            gc.collect()  # trainers and their modules point at each other
    if arguments.memory:
        parts.append(memory([n for n in names if n.startswith("fastsae") or n == "dense torch"]))
    if arguments.growth:
        parts.append(growth(arguments.seconds))
    if arguments.out:
        lines = [json.dumps(row) for row in (head, *(row for part in parts for row in part))]
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join(lines) + "\n")
    print(json.dumps(head), *map(table, filter(None, parts)), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
