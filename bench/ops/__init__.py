"""The cases of every op."""

from __future__ import annotations

from collections.abc import Iterator

from bench.ops import bench_adam, bench_decode, bench_encode, bench_select, bench_step
from bench.ops.inputs import Shape
from bench.timing import Case

# Whole steps first, then what takes most of their time.
MODULES = (bench_step, bench_adam, bench_encode, bench_decode, bench_select)


def all_cases(name: str, shape: Shape, device: str, gpu: bool = False) -> Iterator[Case]:
    """Yield every case at one shape; `gpu` adds what only a GPU is compared with."""
    for module in MODULES:
        yield from module.cases(name, shape, device, gpu)
