"""topk, batch_topk, threshold_select and feature_topk of a matrix of pre-activations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.ops.inputs import SHAPES, describe
from bench.timing import Case
from fastsae import ops


def _compiled_batch_topk(x: Tensor, budget: int) -> Tensor:
    return x.relu().flatten().topk(budget, sorted=False).values


def cases(device: str) -> Iterator[Case]:
    """Yield the cases; every way of torch keeps what ours keeps."""
    for name in SHAPES:
        n, _, m, k = SHAPES[name]
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(n, m, device=device).to(dtype)

            def same_values(x: Tensor = x, k: int = k) -> None:
                got, want = ops.topk(x, k, sorted=True).values, torch.topk(x, k).values
                assert torch.equal(got, want)

            yield Case(
                "topk",
                describe(name),
                lambda x=x, k=k: ops.topk(x, k),
                {
                    "torch.topk": lambda x=x, k=k: torch.topk(x, k),
                    "torch.topk(sorted=False)": lambda x=x, k=k: torch.topk(x, k, sorted=False),
                },
                same_values,
                bytes=x.element_size() * n * m,
                dtype=dtype,
            )
        x = torch.randn(n, m, device=device)
        budget = k * n

        def same_batch(x: Tensor = x, k: int = k, budget: int = budget) -> None:
            got, threshold = ops.batch_topk(x, k)
            want = x.flatten().topk(budget).values
            assert torch.equal(got.values.sort(descending=True).values, want)
            assert threshold == want[-1]

        yield Case(
            "batch_topk",
            describe(name),
            lambda x=x, k=k: ops.batch_topk(x, k),
            {
                "relu().flatten().topk": lambda x=x, b=budget: _compiled_batch_topk(x, b),
                "flatten().topk": lambda x=x, b=budget: x.flatten().topk(b, sorted=False),
            },
            same_batch,
            bytes=4 * n * m,
        )
        theta = ops.batch_topk(x, k).threshold

        def same_kept(x: Tensor = x, theta: Tensor = theta, budget: int = budget) -> None:
            got = ops.threshold_select(x, theta, 2 * budget).to_dense()
            assert torch.equal(got, torch.where(x > theta, x, 0))

        yield Case(
            "threshold_select",
            describe(name),
            lambda x=x, t=theta, b=budget: ops.threshold_select(x, t, 2 * b),
            {
                "nonzero(x > theta)": lambda x=x, t=theta: x[(x > t).nonzero(as_tuple=True)],
                "where(x > theta, x, 0)": lambda x=x, t=theta: torch.where(x > t, x, 0),
            },
            same_kept,
            bytes=4 * n * m,
        )
    yield from _feature_cases(device)


def _feature_cases(device: str) -> Iterator[Case]:
    for name in ("S", "A"):
        n, _, d_sae, k = SHAPES[name]
        x = torch.randn(n, d_sae, device=device)
        m = -(-k * n // d_sae)

        def same_columns(x: Tensor = x, m: int = m) -> None:
            acts = ops.feature_topk(x, m)
            dense = acts.to_dense()
            assert torch.equal(dense.topk(m, dim=0).values, x.relu().topk(m, dim=0).values)
            assert torch.equal(dense, torch.where(dense > 0, x, 0))
            assert (dense > 0).sum() == acts.offsets[-1]

        yield Case(
            "feature_topk",
            f"{describe(name)}, m {m}",
            lambda x=x, m=m: ops.feature_topk(x, m),
            {
                "relu().topk(dim=0)": lambda x=x, m=m: x.relu().topk(m, dim=0),
                "topk(dim=0, sorted=False)": lambda x=x, m=m: x.topk(m, dim=0, sorted=False),
                "t().contiguous().topk": lambda x=x, m=m: x.t().contiguous().topk(m, sorted=False),
            },
            same_columns,
            bytes=4 * n * d_sae,
        )
