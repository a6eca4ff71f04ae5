"""topk, batch_topk, threshold_select and feature_topk of a matrix of pre-activations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench import cub
from bench.ops.inputs import Shape, describe, peer
from bench.timing import Case, Work
from fastsae import ops


def _one_read(x: Tensor) -> Tensor:
    """Read the matrix as fast as torch does, 16-bit numbers in pairs."""
    return (x if x.element_size() == 4 else x.view(torch.int32)).amax()


def _flat_topk(x: Tensor, budget: int) -> Tensor:
    return x.relu().flatten().topk(budget, sorted=False).values


def cases(name: str, shape: Shape, device: str, gpu: bool = False) -> Iterator[Case]:
    """Yield the cases; every alternative in torch keeps what fastsae keeps."""
    n, _, m, _ = shape
    for dtype in (torch.float32, torch.bfloat16):
        yield _topk_case(torch.randn(n, m, device=device).to(dtype), name, shape, gpu)
    for dtype in (torch.float32, torch.bfloat16) if gpu else (torch.float32,):
        yield from _matrix_cases(torch.randn(n, m, device=device).to(dtype), name, shape, gpu)


def _topk_case(x: Tensor, name: str, shape: Shape, gpu: bool) -> Case:
    k = shape[3]

    def same_values() -> None:
        assert torch.equal(ops.topk(x, k, sorted=True).values, torch.topk(x, k).values)

    ways: dict[str, Work] = {
        "torch.topk": lambda: torch.topk(x, k),
        "torch.topk(sorted=False)": lambda: torch.topk(x, k, sorted=False),
    }
    flashinfer = peer("flashinfer", "top_k") if gpu else None
    if flashinfer:
        ways["flashinfer.top_k"] = lambda: flashinfer(x, k)
    return Case(
        "topk",
        describe(name, shape),
        lambda: ops.topk(x, k),
        ways,
        same_values,
        bytes=x.element_size() * x.numel(),
        dtype=x.dtype,
        parts={} if gpu else {"one read": lambda: _one_read(x)},
        targets={"copy": 0.8, "torch.topk": 6.0} if gpu else {},
    )


def _matrix_cases(x: Tensor, name: str, shape: Shape, gpu: bool) -> Iterator[Case]:
    n, _, d_sae, k = shape
    budget, size = k * n, x.element_size() * x.numel()

    def same_batch() -> None:
        got, threshold = ops.batch_topk(x, k)
        want = x.flatten().topk(budget).values
        assert torch.equal(got.values.sort(descending=True).values, want)
        assert threshold == want[-1]

    ways: dict[str, Work] = {
        "flatten().topk": lambda: x.flatten().topk(budget, sorted=False),
        "relu().flatten().topk": lambda: _flat_topk(x, budget),
    }
    if gpu and cub.available():
        ways["cub::DeviceTopK"] = lambda: cub.topk(x, budget)
    if gpu and name == "A":
        compiled = torch.compile(_flat_topk)
        ways["torch.compile"] = lambda: compiled(x, budget)
    yield Case(
        "batch_topk",
        describe(name, shape),
        lambda: ops.batch_topk(x, k),
        ways,
        same_batch,
        bytes=size,
        dtype=x.dtype,
        parts={} if gpu else {"one read": lambda: _one_read(x)},
        targets={"copy": 0.6, "flatten().topk": 10.0} if gpu else {},
    )
    theta = ops.batch_topk(x, k).threshold

    def same_kept() -> None:
        got = ops.threshold_select(x, theta, 2 * budget).to_dense()
        assert torch.equal(got, torch.where(x > theta, x, 0))

    yield Case(
        "threshold_select",
        describe(name, shape),
        lambda: ops.threshold_select(x, theta, 2 * budget),
        {
            "nonzero(x > theta)": lambda: x[(x > theta).nonzero(as_tuple=True)],
            "where(x > theta, x, 0)": lambda: torch.where(x > theta, x, 0),
        },
        same_kept,
        bytes=size,
        dtype=x.dtype,
    )
    if name == "W":  # torch takes minutes
        return
    m = -(-k * n // d_sae)

    def same_columns() -> None:
        acts = ops.feature_topk(x, m)
        dense = acts.to_dense()
        assert torch.equal(dense.topk(m, dim=0).values, x.relu().topk(m, dim=0).values)
        assert torch.equal(dense, torch.where(dense > 0, x, 0))
        assert (dense > 0).sum() == acts.offsets[-1]

    yield Case(
        "feature_topk",
        f"{describe(name, shape)}, m {m}",
        lambda: ops.feature_topk(x, m),
        {
            "relu().topk(dim=0)": lambda: x.relu().topk(m, dim=0),
            "topk(dim=0, sorted=False)": lambda: x.topk(m, dim=0, sorted=False),
            "t().contiguous().topk": lambda: x.t().contiguous().topk(m, sorted=False),
        },
        same_columns,
        bytes=size,
        dtype=x.dtype,
    )
