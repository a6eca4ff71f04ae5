"""Run the benchmarks on the CPU: `python -m bench.run [--only topk] [--seconds 2] [--out F]`.

Writes one JSON line per result, the first with the machine and its ceilings, and prints the table.
For a GPU there is `bench.gpu`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from pathlib import Path

import torch

from bench import report, timing
from bench.ops import all_cases
from bench.ops.inputs import SHAPES
from fastsae import __version__, _host


def machine(device: str) -> dict[str, object]:
    """Return the facts that the numbers depend on."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    found: dict[str, object] = {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "isa": _host.isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastsae": __version__,
        "device": device,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def main() -> int:
    """Parse arguments, measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run ops whose name contains this")
    parser.add_argument("--seconds", type=float, default=2.0, help="time per case")
    parser.add_argument("--out", type=Path, help="write JSON lines here")
    arguments = parser.parse_args()
    head = {**machine("cpu"), **timing.ceilings("cpu")}
    lines = [json.dumps(head)]
    results = []
    for name, shape in SHAPES.items():
        for case in all_cases(name, shape, "cpu"):
            if arguments.only not in case.op:
                continue
            result = timing.run(case, head, "cpu", arguments.seconds)  # type: ignore[arg-type]
            results.append(result)
            lines.append(json.dumps(dataclasses.asdict(result)))
            print(f"{result.op:26} {result.shape:38} {result.ratio:6.2f}x", file=sys.stderr)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join(lines) + "\n")
    print(report.table(head, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
