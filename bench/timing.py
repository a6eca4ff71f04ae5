"""Paired timing: two or more ways of the same work, taken in turn, compared by their medians.

Machines are shared and drift, so absolute times mean little; a ratio of medians of interleaved runs
holds. The answer is checked before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Work = Callable[[], object]


@dataclass
class Case:
    """One op at one shape: ours, the plain-torch ways, what must agree, and the physical floor."""

    op: str
    shape: str
    ours: Work
    torch: dict[str, Work]
    """Name -> the same work in plain torch; the fastest of them counts."""
    check: Callable[[], None]
    """Raises where the answers differ."""
    bytes: float = 0.0
    """Bytes that have to move between memory and the processor."""
    flops: float = 0.0
    dtype: torch.dtype = torch.float32


@dataclass
class Result:
    """Medians and spreads (max - min) of one case, in ms."""

    op: str
    shape: str
    dtype: str
    ours_ms: float
    torch_ms: float
    torch_name: str
    ratio: float
    floor_ms: float
    of_floor: float
    spread_ms: float
    repeats: int
    device: str = field(default="cpu")


def _once(work: Work, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def medians(works: dict[str, Work], device: str, seconds: float) -> dict[str, list[float]]:
    """Time every work in turn until `seconds` have passed, at least 5 times each; ms."""
    for work in works.values():
        _once(work, device)
    times: dict[str, list[float]] = {name: [] for name in works}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < 5 or time.perf_counter() - start < seconds:
        for name, work in works.items():
            # Each finds the caches as it left them itself, not as another way of the work did:
            # after a large matrix product a gather needs several runs to get its rows back.
            warm = time.perf_counter() + 0.02
            if times[name] == [] or times[name][-1] < 100:
                _once(work, device)
                while time.perf_counter() < warm:
                    _once(work, device)
            times[name].append(_once(work, device))
        if len(next(iter(times.values()))) >= 200:
            break
    return times


def run(case: Case, ceilings: dict[str, float], device: str, seconds: float) -> Result:
    """Check and time one case against the ceilings `copy_gbs` and `gemm_gflops_<dtype>`."""
    case.check()
    times = medians({"ours": case.ours, **case.torch}, device, seconds)
    middle = {name: statistics.median(t) for name, t in times.items()}
    best = min(case.torch, key=lambda name: middle[name])
    dtype = str(case.dtype).removeprefix("torch.")
    floor = max(
        case.bytes / ceilings["copy_gbs"] / 1e6,
        case.flops / ceilings.get(f"gemm_gflops_{dtype}", float("inf")) / 1e6,
    )
    ours = middle["ours"]
    return Result(
        case.op,
        case.shape,
        dtype,
        ours,
        middle[best],
        best,
        middle[best] / ours,
        floor,
        floor / ours,
        max(times["ours"]) - min(times["ours"]),
        len(times["ours"]),
        device,
    )


def ceilings(device: str) -> dict[str, float]:
    """Measure what this machine can do at best: copy bandwidth and GEMM rates of torch."""
    source = torch.randn(1 << 25, device=device)
    target = torch.empty_like(source)
    best = min(medians({"copy": lambda: target.copy_(source)}, device, 1.0)["copy"])
    found = {"copy_gbs": 2 * 4 * source.numel() / best / 1e6}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(1024, 768, device=device).to(dtype)
        b = torch.randn(768, 24576, device=device).to(dtype)
        out = torch.empty(1024, 24576, device=device, dtype=dtype)

        def gemm(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        best = min(medians({"gemm": gemm}, device, 2.0)["gemm"])
        name = f"gemm_gflops_{str(dtype).removeprefix('torch.')}"
        found[name] = 2 * 1024 * 768 * 24576 / best / 1e6
    return found
