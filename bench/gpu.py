"""Test and measure everything on a GPU within minutes: `make gpu`, which builds first.

Runs the tests, then every op against its alternatives, then compute-sanitizer. Each step runs in
its own process: one that fails, hangs or poisons the GPU is reported, and the rest still runs. What
does not fit into the time is dropped and listed. Writes
bench/results/<gpu>-<date>-<time>-<commit>.json and prints a table; exits with 1 if a step failed or
a target was missed. `--only step,adam` runs these benches alone, to see what a change does.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import report, timing
from bench.ops import MODULES, bench_step
from bench.ops.inputs import CUDA_SHAPES, Shape
from bench.run import machine
from bench.timing import Case, Result
from fastsae import _host, _library

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 525.0
# Seconds after the start at which tests and benches end; the sanitizers get the rest.
TESTS_END, BENCHES_END = 230.0, 450.0
SECONDS = 0.5  # for a case
SILENCE = 120.0  # a bench that reports nothing for this long has hung
POISONED = 3  # exit code: no kernel of this process can run any longer

Line = dict[str, Any]


def has_cuda_kernel(case_op: str) -> bool:
    """Return whether a case ("encode_topk + backward") has a CUDA kernel, or is not an op."""
    return case_op.startswith("training") or _library.has_kernel(case_op.split()[0], "cuda")


def groups(shapes: dict[str, Shape], only: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """Return (shape, module) in the order they run: all modules at one shape after another.

    Args:
        shapes: by name.
        only: modules, as in "step"; all if there are none.
    """
    modules = {module.__name__.rpartition("bench_")[2]: module for module in MODULES}
    if unknown := {*only} - {*modules}:
        raise SystemExit(f"bench.gpu: expected only of {', '.join(modules)}, got {unknown.pop()}")
    wanted = [module for part, module in modules.items() if not only or part in only]
    return [(name, module) for name in shapes for module in wanted]


def measure(
    shapes: dict[str, Shape],
    device: str,
    ceilings: dict[str, float],
    until: float,
    start: int = 0,
    seconds: float = SECONDS,
    only: Sequence[str] = (),
) -> Iterator[Line]:
    """Yield a line before and after every case, and for every case that cannot run."""
    for i, (name, module) in enumerate(groups(shapes, only)[start:], start):
        label = f"{module.__name__.rpartition('.')[2]} at {name}"
        yield {"group": i, "begun": label}
        if time.time() > until:
            yield {"dropped": label}
            continue
        try:
            if module is bench_step and device == "cuda":
                yield from _peak(name, shapes[name])
            for case in module.cases(name, shapes[name], device, True):
                what = f"{case.op}, {case.shape}, {str(case.dtype).removeprefix('torch.')}"
                if device == "cuda" and not has_cuda_kernel(case.op):
                    yield {"skipped": what}
                    continue
                if time.time() > until:
                    yield {"dropped": what}
                    continue
                yield {"group": i, "begun": what}
                try:
                    yield from drop_broken_ways(case, what, i)
                    result = timing.run(case, ceilings, device, seconds)
                    yield {"result": dataclasses.asdict(result)}
                    if device == "cuda":
                        yield {"kernels": timing.kernels(case.ours), "of": what}
                except Exception as e:
                    yield {"failed": what, "why": _short(e)}
                    _stop_if_poisoned(device)
        except Exception as e:
            yield {"failed": label, "why": _short(e)}
            _stop_if_poisoned(device)
        if device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _peak(name: str, shape: Shape) -> Iterator[Line]:
    try:
        yield {"peak": bench_step.peak_bytes(shape), "of": name}
    except Exception as e:
        yield {"failed": f"peak memory at {name}", "why": _short(e)}
        _stop_if_poisoned("cuda")


def drop_broken_ways(case: Case, what: str, group: int) -> Iterator[Line]:
    """Try the alternatives and leave out those that fail: they may not fit into memory."""
    for works in (case.torch, case.parts):
        for name in list(works):
            yield {"group": group, "begun": f"{what}: {name}"}
            try:
                works[name]()
            except Exception as e:
                del works[name]
                case.targets = {t: least for t, least in case.targets.items() if t != name}
                yield {"left_out": f"{what}: {name}", "why": _short(e)}


def _short(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip()}"[:500]


def _stop_if_poisoned(device: str) -> None:
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        sys.exit(POISONED)


def measure_into(
    file: Path, start: int, until: float, seconds: float, only: Sequence[str] = ()
) -> None:
    """Append the lines of `measure` to a file; this is the process that runs the benchmarks."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    with file.open("a", buffering=1) as out:
        ceilings = next((line["ceilings"] for line in lines if "ceilings" in line), None)
        if ceilings is None:
            ceilings = timing.ceilings("cuda")
            out.write(json.dumps({"ceilings": ceilings}) + "\n")
        for line in measure(CUDA_SHAPES, "cuda", ceilings, until, start, seconds, only):
            out.write(json.dumps(line) + "\n")


def run_benches(
    file: Path, until: float, seconds: float = SECONDS, only: Sequence[str] = ()
) -> list[Line]:
    """Run the process of the benchmarks, and again after the group that it died in."""
    start, lines = 0, []
    while start < len(groups(CUDA_SHAPES, only)):
        command = [sys.executable, "-X", "faulthandler", "-m", "bench.gpu", "--measure", str(file)]
        command += ["--start", str(start), "--until", str(until), "--seconds", str(seconds)]
        command += ["--only", ",".join(only)] if only else []
        log = file.with_suffix(".log")
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
            code = _wait(process, file, until + 20)
        lines = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )
        if code == 0:
            break
        last = next((line for line in reversed(lines) if "begun" in line), None)
        why = "hung" if code is None else f"ended with {code}"
        at = last["begun"] if last else "the ceilings"
        tail = " ".join(log.read_text()[-1000:].split())
        with file.open("a") as out:
            lines.append({"failed": at, "why": f"process {why}: {tail}"})
            out.write(json.dumps(lines[-1]) + "\n")
        if last is None:
            break
        start = last["group"] + 1
    return lines


def _wait(process: subprocess.Popen[bytes], file: Path, end: float) -> int | None:
    """Return the exit code, or None after killing a process that hangs or takes too long."""
    heard, size = time.time(), -1
    while True:
        try:
            return process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            now = file.stat().st_size if file.exists() else 0
            if now != size:
                heard, size = time.time(), now
            if time.time() > min(end, heard + SILENCE):
                process.kill()
                process.wait()
                return None


def run_step(name: str, command: list[str], seconds: float, env: dict[str, str]) -> Line:
    """Run a command and return how it went; its full output is in build/gpu_<name>.log."""
    began = time.time()
    if seconds < 5:
        return {"step": name, "ok": False, "why": "dropped: no time left"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        said, ok = done.stdout + done.stderr, done.returncode == 0
    except subprocess.TimeoutExpired as e:
        raw = e.stdout or b""
        said = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
        said, ok = f"{said}\nstopped after {seconds:.0f} s", False
    log = ROOT / "build" / f"gpu_{name}.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text(said)
    lines = [line for line in said.splitlines() if line.strip()]
    failed = [line for line in lines if re.match(r"FAILED|ERROR|wrong:|========= .*rror", line)]
    return {
        "step": name,
        "ok": ok,
        "seconds": round(time.time() - began, 1),
        "why": lines[-1].strip() if lines else "",
        "failures": failed[:50],
    }


def sanitize(tool: str, seconds: float) -> Line:
    """Run the table of calls under a tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if program is None:
        return {"step": tool, "ok": None, "why": "compute-sanitizer is not installed"}
    command = [program, "--tool", tool, "--error-exitcode", "9"]
    if tool != "initcheck":  # which has to see what torch's kernels write
        command += ["--kernel-name", "kns=fastsae"]
    command += [sys.executable, "-m", "tests.cuda_emulation.run_calls", "--device", "cuda"]
    # Without torch's cache, every tensor is an allocation of exactly its size.
    return run_step(tool, command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def head() -> Line:
    """Return the facts that the numbers depend on."""
    now = datetime.datetime.now()
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        **machine("cuda"),
        "driver": _said(*driver),
        "nvcc": _host.build_info()["cuda"],
        "commit": _said("git", "rev-parse", "HEAD"),
        "date": now.date().isoformat(),
        "time": f"{now:%H%M}",
    }


def write(record: Line, folder: Path) -> Path:
    """Write the record under the GPU's name, the time and the commit, all or nothing."""
    gpu = re.sub(r"[^a-z0-9]+", "-", str(record["machine"]["gpu"]).lower()).strip("-")
    about = record["machine"]
    file = folder / f"{gpu}-{about['date']}-{about['time']}-{about['commit'][:7]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(file)
    return file


def collect(lines: list[Line], steps: list[Line], machine: Line) -> Line:
    """Return the record of a run."""
    ceilings: Line = next((line["ceilings"] for line in lines if "ceilings" in line), {})
    return {
        "machine": {**machine, **ceilings},
        "steps": steps,
        "results": [line["result"] for line in lines if "result" in line],
        "peaks": [line for line in lines if "peak" in line],
        "kernels": {line["of"]: line["kernels"] for line in lines if "kernels" in line},
        "failed": [line for line in lines if "failed" in line],
        "left_out": [line for line in lines if "left_out" in line],
        "skipped": [line["skipped"] for line in lines if "skipped" in line],
        "dropped": [line["dropped"] for line in lines if "dropped" in line],
    }


def is_good(record: Line) -> bool:
    """Return whether every step succeeded and every target was reached."""
    missed = [Result(**row).missed() for row in record["results"]]
    steps = all(step["ok"] is not False for step in record["steps"])
    return steps and not any(missed) and not record["failed"] and bool(record["results"])


def main() -> int:
    """Parse arguments; measure, or run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--started", type=float, default=time.time(), help="when the build began")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each case")
    parser.add_argument(
        "--only", default="", help="benches to run, as in step,adam, without tests and sanitizers"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    only = a.only.split(",") if a.only else []
    groups(CUDA_SHAPES, only)
    if a.measure:
        measure_into(a.measure, a.start, a.until, a.seconds, only)
        return 0
    if not torch.cuda.is_available():
        sys.exit("make gpu: expected a GPU that torch can use, got none")
    about, scale, lines = head(), a.budget / BUDGET, ROOT / "build/gpu_lines.jsonl"
    lines.unlink(missing_ok=True)
    lines.parent.mkdir(exist_ok=True)
    # A pytest plugin on the machine may fail on warnings that we turn into errors.
    tests = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:benchmark"]
    tests += ["-k", "cuda", "tests/ops", "tests/train/test_resume_classes.py"]
    tests += ["tests/train/test_captured_cuda.py"]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", "8"]
    until, steps = a.started + TESTS_END * scale, []
    if not only:
        on_gpu = {"FASTSAE_TEST_DEVICES": "cuda"}
        steps.append(run_step("tests", tests, until - time.time(), on_gpu))
    found = run_benches(lines, a.started + BENCHES_END * scale, a.seconds, only)
    write(collect(found, steps, about), ROOT / "bench/results")
    for tool in () if only else ("memcheck", "racecheck", "initcheck"):
        steps.append(sanitize(tool, a.started + a.budget - time.time()))
    record = collect(found, steps, about)
    file = write(record, ROOT / "bench/results")
    print(report.gpu(record))
    print(f"\nwritten to {file}, {time.time() - a.started:.0f} s in all")
    return 0 if is_good(record) else 1


if __name__ == "__main__":
    sys.exit(main())
