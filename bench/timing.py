"""Paired timing: several implementations of the same work run alternately; medians are compared.

Machines are shared and drift, so absolute times mean little, but ratios of medians of interleaved
runs are stable. The answer is checked before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# `Case.torch` shadows the module.
Dtype = torch.dtype
FLOAT32 = torch.float32
Work = Callable[[], object]


@dataclass
class Case:
    """One op at one shape: fastsae, plain-PyTorch alternatives, a check, and the physical floor."""

    op: str
    shape: str
    ours: Work
    torch: dict[str, Work]
    """Name -> the same work in plain PyTorch; the fastest of them counts."""
    check: Callable[[], None]
    """Raises where the answers differ."""
    bytes: float = 0.0
    """Bytes that have to move between memory and the processor."""
    flops: float = 0.0
    dtype: Dtype = FLOAT32
    gather_bytes: float = 0.0
    """Bytes if every gathered row comes from memory, each time."""
    parts: dict[str, Work] = field(default_factory=dict)
    """Work that is only part of the op, such as its GEMM: timed, but no competitor."""
    targets: dict[str, float] = field(default_factory=dict)
    """What fastsae should reach: times faster than an alternative or a part, or a share of `copy`
    (the floor) or `gather`."""


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
    of_gather: float = 0.0
    ratios: dict[str, float] = field(default_factory=dict)
    """Every alternative and part -> its time over fastsae's."""
    targets: dict[str, float] = field(default_factory=dict)

    def reached(self, target: str) -> float:
        """Return what a target is compared with."""
        shares = {"copy": self.of_floor, "gather": self.of_gather}
        return shares[target] if target in shares else self.ratios.get(target, 0.0)

    def missed(self) -> list[str]:
        """Return the targets that were not reached, in words."""
        return [
            f"{name} {self.reached(name):.2f} < {least:g}"
            for name, least in self.targets.items()
            if self.reached(name) < least
        ]


def _once(work: Work, device: str) -> float:
    if device == "cuda":
        return _once_on_gpu(work)
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _once_on_gpu(work: Work) -> float:
    """Return the time between two events; the GPU sleeps first, so that the host gets ahead."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def medians(works: dict[str, Work], device: str, seconds: float) -> dict[str, list[float]]:
    """Time all works alternately until `seconds` have passed, at least 5 times each; ms."""
    for work in works.values():
        _once(work, device)
    times: dict[str, list[float]] = {name: [] for name in works}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < 5 or time.perf_counter() - start < seconds:
        for name, work in works.items():
            # Each finds the caches as it left them itself, not as another implementation did:
            # after a large matmul, a gather needs several runs to get its rows back.
            warm = time.perf_counter() + (0.002 if device == "cuda" else 0.02)
            if times[name] == [] or times[name][-1] < 100:
                _once(work, device)
                while time.perf_counter() < warm:
                    _once(work, device)
            times[name].append(_once(work, device))
        if len(next(iter(times.values()))) >= 200:
            break
    return times


def kernels(work: Work, repeats: int = 5) -> dict[str, float]:
    """Return what the GPU does in one run of `work`: kernel -> us, the longest first."""
    work()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
    spent = {event.key: event.self_device_time_total / repeats for event in profile.key_averages()}
    return {
        name[:200]: round(us, 2)
        for name, us in sorted(spent.items(), key=lambda item: -item[1])
        if us > 0
    }


def run(case: Case, ceilings: dict[str, float], device: str, seconds: float) -> Result:
    """Check and time one case against the ceilings `copy_gbs` and `gemm_gflops_<dtype>`."""
    case.check()
    times = medians({"ours": case.ours, **case.torch, **case.parts}, device, seconds)
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
        case.gather_bytes / ceilings["copy_gbs"] / 1e6 / ours,
        {name: ms / ours for name, ms in middle.items() if name != "ours"},
        case.targets,
    )


def ceilings(device: str, scale: int = 1) -> dict[str, float]:
    """Measure what this machine can do at best: copy bandwidth and GEMM rates of torch."""
    gpu = device == "cuda"
    source = torch.randn((1 << (28 if gpu else 25)) // scale, device=device)
    target = torch.empty_like(source)
    best = min(medians({"copy": lambda: target.copy_(source)}, device, 1.0)["copy"])
    found = {"copy_gbs": 2 * 4 * source.numel() / best / 1e6}
    n, d, m = (
        max(1, size // scale) for size in ((8192, 4096, 16384) if gpu else (1024, 768, 24576))
    )
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for name, dtype in (kinds | ({"tf32": torch.float32} if gpu else {})).items():
        a, b = (torch.randn(s, device=device).to(dtype) for s in ((n, d), (d, m)))
        out = torch.empty(n, m, device=device, dtype=dtype)

        def gemm(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if name == "tf32" else before)
        best = min(medians({"gemm": gemm}, device, 1.0 if gpu else 2.0)["gemm"])
        torch.set_float32_matmul_precision(before)
        found[f"gemm_gflops_{name}"] = 2 * n * d * m / best / 1e6
    return found
