"""Time one whole TopK training step on the CPU against plain torch and other libraries.

    python -m bench.train_step [--shape A S W] [--seconds 20] [--out F.jsonl]
                               [--memory] [--growth] [--rest]

A step is encode, decode, loss, backward, optimizer and normalization of the decoder, as users of
each library run it; `bench.peers` says how each is called and where it differs by design. Before
anything is timed, reconstruction and loss of every implementation are compared with fastsae's for
the same weights and batch. A library that cannot be imported is skipped with a message; to install
them all: pip install eai-sparsify dictionary-learning sae-lens

`--shape` without a value skips the steps and runs only the parts of `bench.step_limits`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from bench import report, step_limits, timing
from bench.ops.inputs import SHAPES, describe
from bench.peers import WAYS, build, check, import_error, start
from bench.report import Row
from bench.run import machine
from bench.step_limits import proc_mib
from fastsae import _library

PEERS = ("eai-sparsify", "dictionary-learning", "sae-lens")
BASES = ("fastsae", "fastsae bf16")  # what the others are compared with


def missing(name: str) -> str:
    """Return why an implementation cannot run here, or an empty string."""
    need = WAYS[name][2]
    if name == "fastsae bf16" and not _library.has_bf16():
        return "this processor has no bfloat16 instructions, so it would be fastsae"
    return import_error(need)


def groups(names: list[str], shape: str) -> list[list[str]]:
    """Split implementations into groups that fit in memory together, each with the bases."""
    n, d, d_sae, _ = SHAPES[shape]
    held = 4 * 3 * 2 * d * d_sae / 2**20  # parameters and two moments
    passing = 4 * (2 * d + 6 * n) * d_sae / 2**20  # one step's gradients and dense latents
    room = (0.7 * proc_mib("/proc/meminfo", "MemAvailable") - passing) / held
    bases = [name for name in BASES if name in names]
    others = [name for name in names if name not in bases]
    size = max(1, int(room) - len(bases))
    return [bases + others[i : i + size] for i in range(0, len(others), size)]


def time_group(shape: str, group: list[str], seconds: float, copy_gbs: float) -> list[Row]:
    """Check implementations at one shape and time them alternately.

    The floor is torch's GEMM for the encoder, timed alternately with them, and the traffic of Adam:
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


def main() -> int:
    """Parse arguments, measure, write, print."""
    parser = argparse.ArgumentParser(description="time whole training steps")
    parser.add_argument("--shape", nargs="*", default=["A", "S", "W"], choices=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=20.0, help="per group of ways")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write JSON lines here")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of a step")
    parser.add_argument("--growth", action="store_true", help="also how a step grows")
    parser.add_argument("--rest", action="store_true", help="also all but the encoder, and topk")
    arguments = parser.parse_args()
    reasons = {name: missing(name) for name in WAYS}
    for name in filter(reasons.get, WAYS):
        print(f"left out: {name} ({reasons[name]})", file=sys.stderr)
    names = [name for name in WAYS if not reasons[name]]
    torch.set_num_threads(arguments.threads)
    peers = {name: version(name) for name in names if name in PEERS}
    head: Row = {**machine("cpu"), **peers, **timing.ceilings("cpu")}
    copy_gbs = float(head["copy_gbs"])  # type: ignore[arg-type]
    parts: dict[str, list[Row]] = {report.STEP: []}
    for shape in arguments.shape:
        for group in groups(names, shape):
            parts[report.STEP] += time_group(shape, group, arguments.seconds, copy_gbs)
            gc.collect()  # trainers and their modules point at each other
    if arguments.memory:
        checked = [name for name in names if name.startswith("fastsae") or name == "dense torch"]
        parts["peak memory of a step"] = step_limits.memory(checked)
    if arguments.growth:
        parts["growth of a step"] = step_limits.growth(arguments.seconds)
        gc.collect()
    if arguments.rest:
        parts["rest of a step"] = [step_limits.rest("A", arguments.seconds)]
        parts["topk limit"] = step_limits.topk_limit(arguments.seconds)
    rows = [{"kind": kind, **row} for kind, part in parts.items() for row in part]
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in (head, *rows)))
    print(report.tables(head, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
