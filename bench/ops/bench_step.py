"""A whole training step of TopK and BatchTopK, against the same step in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.testing import assert_close

from bench.ops.inputs import Shape, describe, peer
from bench.peers import Way, build, check, start
from bench.timing import Case, Work


def cases(name: str, shape: Shape, device: str, gpu: bool = False) -> Iterator[Case]:
    """Yield the cases, on a GPU.

    The floor is the encoder's GEMM: everything else should be cheap in comparison. For the CPU
    there is `bench.train_step`, which includes other libraries.
    """
    if not gpu:
        return
    n, d, m, _ = shape
    s = start(*shape, device)
    bf16 = (" bf16", torch.bfloat16)
    for suffix, dtype, batch in ((*bf16, False), (*bf16, True), ("", torch.float32, False)):
        names = (f"fastsae{suffix}", f"dense torch{suffix}")

        def fresh(names: tuple[str, ...] = names, batch: bool = batch) -> list[Way]:
            return [build(name, s, batch) for name in names]

        def same(names: tuple[str, ...] = names, batch: bool = batch) -> None:
            ours, dense = fresh(names, batch)  # before their first step
            if batch:  # rounding decides between near ties
                assert_close(ours.forward()[1], dense.forward()[1], rtol=5e-2, atol=0)
            else:
                check({"fastsae": ours, names[1]: dense}, s)

        ours, dense = fresh()
        ways: dict[str, Work] = {"dense torch": dense.step}
        # On a GPU, its matmul runs in bfloat16.
        if dtype == torch.bfloat16 and not batch and peer("sparsify", "SparseCoder"):
            ways["eai-sparsify"] = build("eai-sparsify", s).step
        yield Case(
            f"training step ({'BatchTopK' if batch else 'TopK'})",
            describe(name, shape),
            ours.step,
            ways,
            same,
            flops=2.0 * n * d * m,
            dtype=dtype,
        )
