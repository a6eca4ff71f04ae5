"""What limits a training step: memory, growth, and everything except the encoder's GEMM."""

from __future__ import annotations

import ctypes
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from bench import timing
from bench.ops.inputs import SHAPES, describe
from bench.peers import build, start, trainer
from bench.report import Row
from fastsae import ops

MEMORY_TOKENS = 4096
GROWTH_BASE, GROWTH_FACTORS = {"n": 512, "d": 256, "d_sae": 8192}, (1, 2, 4, 8)  # with k = 32
COPIED = 1 << 26  # float32 numbers, 256 MiB: far more than caches hold
SELECTED = (  # op, n, d_sae, k
    ("topk", 2048, 24576, 32),
    ("topk", 1024, 131072, 64),
    ("batch_topk", 1024, 24576, 32),
)


def proc_mib(file: str, field: str) -> float:
    """Return a field of a file such as /proc/meminfo in MiB."""
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def peak_mib(name: str, threads: int) -> float:
    """Return the peak memory that one step adds to this process, which does nothing else.

    Parameters, optimizer state and library buffers exist already: a step on 16 tokens made them.
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
    """Return the peaks of these ways beyond parameters and optimizer state."""
    rows: list[Row] = []
    for name in names:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            peak = pool.submit(peak_mib, name, torch.get_num_threads()).result()
        rows.append({"shape": f"A, n {MEMORY_TOKENS}", "implementation": name, "peak_mib": peak})
    return rows


def growth(seconds: float) -> list[Row]:
    """Return how fastsae's step grows with n, d and d_sae: exponents fitted to log times."""
    axes = {
        axis: [GROWTH_BASE | {axis: factor * GROWTH_BASE[axis]} for factor in GROWTH_FACTORS]
        for axis in GROWTH_BASE
    }
    sizes = {str(size): size for points in axes.values() for size in points}
    works = {
        name: build("fastsae", start(size["n"], size["d"], size["d_sae"], 32)).step
        for name, size in sizes.items()
    }
    times = timing.medians(works, "cpu", seconds)
    rows: list[Row] = []
    for axis, points in axes.items():
        ms = [statistics.median(times[str(point)]) for point in points]
        logs = [math.log(f) for f in GROWTH_FACTORS], [math.log(t) for t in ms]
        row: Row = {f"x{f}_ms": t for f, t in zip(GROWTH_FACTORS, ms, strict=True)}
        rows.append({"axis": axis, **row, "exponent": statistics.linear_regression(*logs).slope})
    return rows


def rest(shape: str, seconds: float) -> Row:
    """Return the fused float32 step without the encoder, against its memory floor.

    The rest is the step minus `encode_topk` of the same weights. Its floor is, at the bandwidth of
    a copy timed alternately with it: parameters and both averages of both matrices, read and
    written; the decoder rows that the batch gathers, each once; x, reconstruction and error.
    """
    n, d, d_sae, k = SHAPES[shape]
    s = start(n, d, d_sae, k)
    run = trainer(s, "fused", "float32")
    sae = run.sae

    @torch.no_grad()
    def encode() -> ops.TopK:
        return ops.encode_topk(s.x, sae.W_enc_rows, sae.b_enc, k, b_dec=sae.b_dec)

    source, target = torch.randn(COPIED), torch.empty(COPIED)
    works: dict[str, timing.Work] = {
        "step": lambda: run.step(s.x),
        "encode": encode,
        "copy": lambda: target.copy_(source),
    }
    times = timing.medians(works, "cpu", seconds)
    ms = {name: statistics.median(t) for name, t in times.items()}
    gathered = encode().indices.unique().numel()
    moved = 24 * 2 * d * d_sae + 4 * d * gathered + 3 * 4 * n * d
    copy_gbs = 2 * 4 * COPIED / ms["copy"] / 1e6
    rest_ms, floor_ms = ms["step"] - ms["encode"], moved / copy_gbs / 1e6
    return {
        "shape": describe(shape),
        "repeats": len(times["step"]),
        "step_ms": ms["step"],
        "encode_ms": ms["encode"],
        "encode_gflops": 2 * n * d * d_sae / ms["encode"] / 1e6,
        "rest_ms": rest_ms,
        "floor_bytes": moved,
        "copy_gbs": copy_gbs,
        "floor_ms": floor_ms,
        "rest / floor": rest_ms / floor_ms,
    }


def topk_limit(seconds: float) -> list[Row]:
    """Compare selection with a pure read of the same matrix, and with torch.

    No selection can be faster than the read, so the ratio to torch cannot pass the last column.
    """
    return [_selection(*case, seconds / len(SELECTED)) for case in SELECTED]


def _selection(op: str, n: int, d_sae: int, k: int, seconds: float) -> Row:
    x = torch.randn(n, d_sae, generator=torch.Generator().manual_seed(0))
    works: dict[str, timing.Work] = {"sum": x.sum, "max": x.max}
    if op == "topk":
        assert torch.equal(ops.topk(x, k, sorted=True).values, x.topk(k).values)
        works["ours"] = lambda: ops.topk(x, k)
        works["topk"] = lambda: x.topk(k)
        works["topk(sorted=False)"] = lambda: x.topk(k, sorted=False)
    else:
        got = ops.batch_topk(x, k)[0].values.sort(descending=True).values
        assert torch.equal(got, x.flatten().topk(k * n).values)
        works["ours"] = lambda: ops.batch_topk(x, k)
        works["flatten().topk"] = lambda: x.flatten().topk(k * n)
        works["flatten().topk(sorted=False)"] = lambda: x.flatten().topk(k * n, sorted=False)
    times = timing.medians(works, "cpu", seconds)
    ms = {name: statistics.median(t) for name, t in times.items()}
    best = min((name for name in works if "topk" in name), key=lambda name: ms[name])
    read_ms = min(ms["sum"], ms["max"])
    return {
        "op": op,
        "shape": f"[{n}, {d_sae}], k {k}",
        "repeats": len(times["ours"]),
        "ours_ms": ms["ours"],
        "torch_ms": ms[best],
        "torch way": best,
        "read_ms": read_ms,
        "ratio": ms[best] / ms["ours"],
        "ratio at the read limit": ms[best] / read_ms,
    }
