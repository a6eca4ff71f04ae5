"""python -m tests.faults [--kills N] [--mutations N]: the long run, in a process that may fork."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.faults.damage import damage
from tests.faults.kills import kills
from tests.faults.workloads import ALL, Harvest, quiet


def main() -> int:
    """Run, print one line of JSON per part, and return 1 if anything was wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=300, help="of each workload (300)")
    parser.add_argument("--mutations", type=int, default=3000, help="of files (3000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="workload")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # no thread may exist where a process forks
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        Harvest().work(Path(folder) / "store")  # imports once what every fork would
    bad = False
    for workload in ALL if arguments.kills else ():
        if arguments.only and workload.name != arguments.only:
            continue
        started = time.perf_counter()
        wrong = kills(workload(), arguments.kills, arguments.seed)
        bad |= bool(wrong)
        record = {"kills": workload.name, "count": arguments.kills, "wrong": wrong}
        print(
            json.dumps({**record, "seconds": round(time.perf_counter() - started, 1)}), flush=True
        )
    if arguments.mutations and not arguments.only:
        started = time.perf_counter()
        outcomes, wrong = damage(arguments.mutations, arguments.seed)
        bad |= bool(wrong)
        record = {"mutations": sum(outcomes.values()), "outcomes": outcomes, "wrong": wrong}
        print(
            json.dumps({**record, "seconds": round(time.perf_counter() - started, 1)}), flush=True
        )
    return bad


if __name__ == "__main__":
    sys.exit(main())
