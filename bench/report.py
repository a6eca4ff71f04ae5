"""Print results as Markdown tables, or draw training steps as a bar chart.

    python -m bench.report FILE.jsonl
    python -m bench.report BEFORE.json AFTER.json
    python -m bench.report --plot OUT.svg [--shape A] FILE.jsonl

The file is what `bench.run` or `bench.train_step` wrote with `--out`, or a .json of `bench.gpu`, of
which two are set side by side; only training steps can be drawn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.timing import Result

Row = dict[str, object]
STEP = "training step"  # the kind of row that the chart shows
OURS, OTHERS = "#2f6fd0", "#a8adb5"


def machine(head: Row) -> str:
    """Return the machine and its ceilings in one line."""
    gemm = ", ".join(
        f"{name.removeprefix('gemm_gflops_')} {value:.0f}"
        for name, value in head.items()
        if name.startswith("gemm_gflops_") and isinstance(value, float)
    )
    return (
        f"{head.get('gpu', head['cpu'])}, {head['threads']} threads, {head['isa']}, "
        f"torch {head['torch']}; copy {head['copy_gbs']:.1f} GB/s, GEMM GFLOP/s: {gemm}."
    )


def table(head: Row, results: Sequence[Result]) -> str:
    """Return a Markdown table of the results, with the machine above it."""
    lines = [
        machine(head),
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


def gpu(record: dict[str, Any]) -> str:
    """Return a run of `bench.gpu` as Markdown: steps, results, targets, and what is missing."""
    head = record["machine"]
    about = (f"{name} {head[name]}" for name in ("driver", "nvcc", "commit") if name in head)
    lines = [machine(head) if "copy_gbs" in head else str(head), ", ".join(about) + ".", ""]
    for step in record["steps"]:
        state = {True: "pass", False: "FAIL", None: "not run"}[step["ok"]]
        lines.append(f"- {step['step']}: {state}, {step.get('seconds', 0):g} s: {step['why']}")
        lines += [f"  - {failure}" for failure in step.get("failures", [])]
    lines += [
        "",
        "| op | shape | dtype | ours, ms | best other, ms | which | times faster | of copy | "
        "of gather | targets |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["results"]:
        r = Result(**row)
        verdict = ("MISS: " + "; ".join(r.missed()) if r.missed() else "pass") if r.targets else ""
        gather = f"{r.of_gather:.0%}" if r.of_gather else ""
        lines.append(
            f"| `{r.op}` | {r.shape} | {r.dtype} | {r.ours_ms:.3f} | {r.torch_ms:.3f} | "
            f"{r.torch_name} | **{r.ratio:.2f}** | {r.of_floor:.0%} | {gather} | {verdict} |"
        )
    for row in record["results"]:
        if "rows" not in row["ratios"]:
            continue
        beside = ", ".join(
            f"{name} {ratio:.2f}"
            for name, ratio in row["ratios"].items()
            if name != row["torch_name"] and "linear +" not in name
        )
        lines.append(f"- {row['op']}, {row['shape']}: times of others over its own: {beside}")
    lines += [
        f"- peak memory of a step at {peak['of']}: {peak['peak'] / 1e9:.2f} GB"
        for peak in record.get("peaks", [])
    ]
    lines += ["", *(f"- failed: {line['failed']}: {line['why']}" for line in record["failed"])]
    lines += [f"- left out: {line['left_out']}: {line['why']}" for line in record["left_out"]]
    for kind, why in (("skipped", "no CUDA kernel"), ("dropped", "no time left")):
        if record[kind]:
            lines.append(f"- {kind}, {why}: {'; '.join(record[kind])}")
    return "\n".join(lines)


def beside(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return what two runs of `bench.gpu` have both measured as a Markdown table."""
    lines = [
        f"before: {machine(before['machine'])}",
        f"after: {machine(after['machine'])}",
        "",
        "| op | shape | dtype | before, ms | after, ms | times faster |",
        "|---|---|---|---|---|---|",
    ]
    old = {(r["op"], r["shape"], r["dtype"]): r["ours_ms"] for r in before["results"]}
    for r in after["results"]:
        was = old.get((r["op"], r["shape"], r["dtype"]))
        if was is not None:
            lines.append(
                f"| `{r['op']}` | {r['shape']} | {r['dtype']} | {was:.3f} | {r['ours_ms']:.3f} | "
                f"**{was / r['ours_ms']:.2f}** |"
            )
    return "\n".join(lines)


def tables(head: Row, rows: Sequence[Row]) -> str:
    """Return a Markdown table per kind of row of `train_step`, with the machine above them."""
    names = dict.fromkeys(str(row.get("implementation")) for row in rows)
    versions = [f"{name} {head[name]}" for name in names if name in head]
    parts = [" ".join([machine(head), *([", ".join(versions) + "."] if versions else [])])]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        same = [row for row in rows if row["kind"] == kind]
        columns = [c for c in dict.fromkeys(key for row in same for key in row) if c != "kind"]
        lines = [f"**{kind}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for row in same:
            cells = (row.get(column, "") for column in columns)
            texts = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
            lines.append(f"| {' | '.join(texts)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def plot(head: Row, rows: Sequence[Row], shape: str, out: Path) -> None:
    """Draw the median step time of every implementation at one shape, the fastest on top."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        sys.exit("bench.report: --plot needs matplotlib: pip install matplotlib")
    times: dict[str, list[float]] = {}
    for row in rows:
        if row.get("kind") == STEP and str(row["shape"]).startswith(f"{shape}:"):
            times.setdefault(str(row["implementation"]), []).append(float(str(row["median_ms"])))
            sizes = str(row["shape"]).removeprefix(f"{shape}: ")
    if not times:
        sys.exit(f"bench.report: expected training steps at shape {shape} in the file, got none")
    # An implementation that was timed in several groups counts once.
    ms = {name: statistics.median(t) for name, t in times.items()}
    names = sorted(ms, key=lambda name: ms[name])
    # 700 pixels wide in a browser, which takes 96 for an inch.
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(7.3, 1.1 + 0.32 * len(names)), layout=layout)
    axes = figure.add_subplot()
    colors = [OURS if name.startswith("fastsae") else OTHERS for name in names]
    bars = axes.barh(names, [ms[name] for name in names], color=colors, height=0.7)
    axes.bar_label(bars, [f"{ms[name]:,.0f} ms" for name in names], padding=4, fontsize=11)
    axes.invert_yaxis()
    axes.margins(x=0.15)  # room for the last label
    axes.tick_params(axis="y", length=0, labelsize=11)
    axes.tick_params(axis="x", labelsize=9.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(f"ms per training step ({sizes})", fontsize=10.5)
    title = f"One TopK training step, {head['threads']} CPU cores"
    axes.set_title(title, fontsize=12, loc="left", fontweight="bold")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, facecolor="white", dpi=160)


def main() -> int:
    """Parse arguments, read, print or draw."""
    parser = argparse.ArgumentParser(description="print results as tables or draw them")
    parser.add_argument("file", type=Path, help="what bench.run, train_step or gpu wrote")
    parser.add_argument("after", type=Path, nargs="?", help="a second file that gpu wrote")
    parser.add_argument("--plot", type=Path, metavar="OUT.svg", help="draw instead of printing")
    parser.add_argument("--shape", default="A", help="the shape to draw")
    arguments = parser.parse_args()
    if arguments.after:
        print(beside(*(json.loads(f.read_text()) for f in (arguments.file, arguments.after))))
        return 0
    if arguments.file.suffix == ".json":
        print(gpu(json.loads(arguments.file.read_text())))
        return 0
    head, *rows = map(json.loads, arguments.file.read_text().splitlines())
    if arguments.plot:
        plot(head, rows, arguments.shape, arguments.plot)
    elif all("kind" in row for row in rows):
        print(tables(head, rows))
    else:
        print(table(head, [Result(**row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
