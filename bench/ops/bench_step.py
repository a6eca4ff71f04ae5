"""A whole training step of TopK and BatchTopK, against the same step in plain PyTorch."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

import fastsae
from bench.ops.inputs import Shape, describe, peer
from bench.peers import Way, build, check, compiled, start
from bench.timing import Case, Work
from fastsae import TrainConfig, Trainer, _library
from fastsae.nn.objective import set_cuda_decode_error
from fastsae.train.captured_step import WARM_UP


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
        targets = {}
        if dtype == torch.bfloat16 and not batch:
            if peer("sparsify", "SparseCoder"):
                ways["eai-sparsify"], targets["eai-sparsify"] = build("eai-sparsify", s).step, 4.0
            if name == "A":
                ways["torch.compile"] = compiled(s).step
                targets["torch.compile"] = 3.5
        yield Case(
            f"training step ({'BatchTopK' if batch else 'TopK'})",
            describe(name, shape),
            ours.step,
            ways,
            same,
            flops=2.0 * n * d * m,
            dtype=dtype,
            targets=targets,
        )
    yield _captured(name, shape, device)
    yield _all_on(name, shape, device)
    if name == "B":
        yield _fed(name, shape, device)


def _trainer(shape: Shape, data: Tensor, device: str, steps: int, **settings: Any) -> Trainer:
    n, d, m, k = shape
    torch.manual_seed(0)
    sae = fastsae.TopKSAE(d, m, k, device=device)
    config = TrainConfig(
        lr=1e-4,
        batch_size=n,
        steps=steps,
        compute_dtype="bfloat16",
        calibration_rows=0,
        weight_init="random",  # on the device
        dead_after_tokens=10**12,
        log_every=steps,
        progress=False,
        **settings,
    )
    return Trainer(sae, data, config)


def _prepared(shape: Shape, x: Tensor, device: str, **settings: Any) -> Trainer:
    trainer = _trainer(shape, x, device, 1 << 30, **settings)
    trainer.prepare(x)
    return trainer


def peak_bytes(shape: Shape) -> int:
    """Return the most memory that a GPU has in use during steps of a TopK SAE in bfloat16."""
    gc.collect()
    torch.cuda.empty_cache()
    x = torch.randn(shape[0], shape[1], device="cuda")
    before = torch.cuda.memory_allocated() - x.nbytes
    trainer = _prepared(shape, x, "cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        trainer.step(x)
    return torch.cuda.max_memory_allocated() - before


def _captured(name: str, shape: Shape, device: str) -> Case:
    """A step that is replayed as one graph, against the same step as Python starts it."""
    x = torch.randn(shape[0], shape[1], device=device)

    def losses(captured: bool) -> list[float]:
        trainer = _prepared(shape, x, device, capture=captured)
        # The graph is recorded in the fourth step.
        return [float(trainer.step(x).loss) for _ in range(6)]

    def same() -> None:
        assert losses(True) == losses(False)

    plain, captured = (_prepared(shape, x, device, capture=c) for c in (False, True))
    return Case(
        "training step (captured)",
        describe(name, shape),
        lambda: captured.step(x),
        {"not captured": lambda: plain.step(x)},
        same,
        flops=2.0 * shape[0] * shape[1] * shape[2],
        dtype=torch.bfloat16,
    )


@contextmanager
def _ways_on(device: str) -> Iterator[None]:
    """Turn on every way of the kernels that is off by default."""
    if device != "cuda":
        yield
        return
    encode, adam = _library.set_cuda_encode("hopper"), _library.set_cuda_adam("staged")
    decode_error = set_cuda_decode_error(True)
    try:
        yield
    finally:
        _library.set_cuda_encode(encode)
        _library.set_cuda_adam(adam)
        set_cuda_decode_error(decode_error)


def _all_on(name: str, shape: Shape, device: str) -> Case:
    """A step with all that has to be asked for, against the default one: capture, both copies in
    bfloat16 and averages in it, and the ways of the kernels."""
    x = torch.randn(shape[0], shape[1], device=device)
    settings: dict[str, Any] = {"adam_dtype": "bfloat16", "decode_dtype": "bfloat16"}
    if device == "cuda":
        settings |= {"capture": True, "weight_copies": True}

    def losses(given: dict[str, Any]) -> Tensor:
        trainer = _prepared(shape, x, device, **given)  # the graph is recorded in the fourth step
        return torch.stack([trainer.step(x).loss for _ in range(6)])

    def same() -> None:
        with _ways_on(device):
            got = losses(settings)
        assert_close(got, losses({}), rtol=2e-2, atol=0)

    plain, fast = (_prepared(shape, x, device, **given) for given in ({}, settings))
    with _ways_on(device):
        for _ in range(WARM_UP + 1):  # what is recorded stays as it is
            fast.step(x)
    return Case(
        "training step (all on)",
        describe(name, shape),
        lambda: fast.step(x),
        {"default": lambda: plain.step(x)},
        same,
        flops=2.0 * shape[0] * shape[1] * shape[2],
        dtype=torch.bfloat16,
        targets={"default": {"A": 2.2, "B": 1.4}.get(name, 1.0)},
    )


def _fed(name: str, shape: Shape, device: str) -> Case:
    """Steps of a run on rows in the memory of the CPU, against those on rows that the GPU has."""
    here = torch.randn(8 * shape[0], shape[1])
    there = here.to(device)

    def run(data: Tensor) -> Iterator[Tensor]:
        """Do another 8 steps each time, and yield the last loss."""
        trainer = _trainer(shape, data, device, 1 << 30)
        with trainer.opened():
            batches = trainer._prepared()
            while True:
                for x, _ in itertools.islice(batches, 8):
                    out = trainer._step(x)
                yield out.loss

    def same() -> None:
        assert next(run(here)) == next(run(there))

    ours, theirs = run(here), run(there)
    return Case(
        "training run (from memory)",
        describe(name, shape),
        lambda: next(ours),
        {"from the GPU": lambda: next(theirs)},
        same,
        dtype=torch.bfloat16,
        targets={"from the GPU": 0.9},
    )
