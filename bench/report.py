"""Print results as a table: `python -m bench.report FILE.jsonl`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.timing import Result


def table(head: dict[str, object], results: Sequence[Result]) -> str:
    """Return a Markdown table of the results, with the machine above it."""
    gemm = ", ".join(
        f"{name.removeprefix('gemm_gflops_')} {value:.0f}"
        for name, value in head.items()
        if name.startswith("gemm_gflops_") and isinstance(value, float)
    )
    lines = [
        f"{head.get('gpu', head['cpu'])}, {head['threads']} threads, {head['isa']}, "
        f"torch {head['torch']}; copy {head['copy_gbs']:.1f} GB/s, GEMM GFLOP/s: {gemm}.",
        "",
        "| op | shape | dtype | ours, ms | torch, ms | fastest torch way | times faster | "
        "floor, ms | of the floor's rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r.op}` | {r.shape} | {r.dtype} | {r.ours_ms:.2f} | {r.torch_ms:.2f} | "
        f"{r.torch_name} | **{r.ratio:.2f}** | {r.floor_ms:.2f} | {r.of_floor:.0%} |"
        for r in results
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    first, *rest = Path(sys.argv[1]).read_text().splitlines()
    print(table(json.loads(first), [Result(**json.loads(line)) for line in rest]))
