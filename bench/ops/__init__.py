"""The cases of every op."""

from __future__ import annotations

from collections.abc import Iterator

from bench.ops import bench_adam, bench_decode, bench_encode, bench_select, bench_step
from bench.ops.inputs import Shape
from bench.timing import Case

MODULES = (bench_select, bench_decode, bench_encode, bench_adam, bench_step)


def all_cases(name: str, shape: Shape, device: str, gpu: bool = False) -> Iterator[Case]:
    """Yield every case at one shape; `gpu` adds what only a GPU is compared with."""
    for module in MODULES:
        yield from module.cases(name, shape, device, gpu)
