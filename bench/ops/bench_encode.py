"""encode_topk, encode_batch_topk and encode_threshold against a linear layer and a selection."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.testing import assert_close

from bench.ops.inputs import SHAPES, describe, weights
from bench.timing import Case
from fastsae import ops


def _topk(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(linear(x, W, b), k, sorted=False)
    return values.relu(), indices


def _train(encode: object, x: Tensor, W: Tensor, b: Tensor, k: int) -> None:
    values = encode(x, W, b, k)[0]  # type: ignore[operator]
    torch.autograd.grad(values.square().sum(), (W, b))


def cases(device: str) -> Iterator[Case]:
    """Yield the cases; the floor is the GEMM rate that torch reaches in the same run."""
    for name in SHAPES:
        n, d, m, k = SHAPES[name]
        flops = 2.0 * n * d * m
        for dtype in (torch.float32, torch.bfloat16):
            x, W, b = weights(name, dtype, device)

            def same(x: Tensor = x, W: Tensor = W, b: Tensor = b, k: int = k) -> None:
                got = ops.encode_topk(x, W, b, k).values.sort(1).values
                want = _topk(x, W, b, k)[0].sort(1).values
                tolerance = 1e-4 if x.dtype == torch.float32 else 3e-2
                assert_close(got, want, rtol=tolerance, atol=tolerance)

            yield Case(
                "encode_topk",
                describe(name),
                lambda x=x, W=W, b=b, k=k: ops.encode_topk(x, W, b, k),
                {"linear + topk": lambda x=x, W=W, b=b, k=k: _topk(x, W, b, k)},
                same,
                flops=flops,
                dtype=dtype,
            )
        x, W, b = weights(name, torch.float32, device)
        Wg, bg = W.clone().requires_grad_(), b.clone().requires_grad_()
        yield Case(
            "encode_topk + backward",
            describe(name),
            lambda x=x, W=Wg, b=bg, k=k: _train(ops.encode_topk, x, W, b, k),
            {"linear + topk": lambda x=x, W=Wg, b=bg, k=k: _train(_topk, x, W, b, k)},
            same,
            flops=flops,
        )
        budget = k * n

        def torch_batch(
            x: Tensor = x, W: Tensor = W, b: Tensor = b, budget: int = budget
        ) -> Tensor:
            return linear(x, W, b).relu().flatten().topk(budget, sorted=False).values

        def same_batch(
            x: Tensor = x, W: Tensor = W, b: Tensor = b, k: int = k, torch_batch=torch_batch
        ) -> None:
            got = ops.encode_batch_topk(x, W, b, k).acts.values.sort().values
            assert_close(got, torch_batch().sort().values, rtol=1e-4, atol=1e-4)

        yield Case(
            "encode_batch_topk",
            describe(name),
            lambda x=x, W=W, b=b, k=k: ops.encode_batch_topk(x, W, b, k),
            {"linear + relu + flatten + topk": torch_batch},
            same_batch,
            flops=flops,
        )
        theta = ops.encode_batch_topk(x, W, b, k).threshold

        def torch_threshold(
            x: Tensor = x, W: Tensor = W, b: Tensor = b, theta: Tensor = theta
        ) -> Tensor:
            pre = linear(x, W, b)
            return torch.where(pre > theta, pre, 0)

        def same_threshold(
            x: Tensor = x,
            W: Tensor = W,
            b: Tensor = b,
            theta: Tensor = theta,
            budget: int = budget,
            torch_threshold=torch_threshold,
        ) -> None:
            got = ops.encode_threshold(x, W, b, theta, 2 * budget).values.sum()
            assert_close(got, torch_threshold().sum(), rtol=1e-3, atol=1e-3)

        yield Case(
            "encode_threshold",
            describe(name),
            lambda x=x, W=W, b=b, t=theta, c=2 * budget: ops.encode_threshold(x, W, b, t, c),
            {"linear + where": torch_threshold},
            same_threshold,
            flops=flops,
        )
