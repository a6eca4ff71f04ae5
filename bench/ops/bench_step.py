"""A whole TopK training step against the same step in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.ops.inputs import Shape, describe
from bench.peers import Way, build, check, start
from bench.timing import Case


def cases(name: str, shape: Shape, device: str, gpu: bool = False) -> Iterator[Case]:
    """Yield the cases, on a GPU.

    The floor is the product of the encoder: everything else is to cost little beside it. For the
    CPU there is `bench.train_step`, with other libraries.
    """
    if not gpu:
        return
    n, d, m, _ = shape
    s = start(*shape, device)
    for suffix, dtype in (("", torch.float32), (" bf16", torch.bfloat16)):
        names = (f"fastsae{suffix}", f"dense torch{suffix}")

        def fresh(names: tuple[str, ...] = names) -> list[Way]:
            return [build(name, s) for name in names]

        def same(names: tuple[str, ...] = names) -> None:
            ours, dense = fresh(names)  # before their first step
            check({"fastsae": ours, names[1]: dense}, s)

        ours, dense = fresh()
        yield Case(
            "training step",
            describe(name, shape),
            ours.step,
            {"dense torch": dense.step},
            same,
            flops=2.0 * n * d * m,
            dtype=dtype,
        )
