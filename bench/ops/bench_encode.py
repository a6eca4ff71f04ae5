"""The encode ops against a linear layer and a selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.testing import assert_close

from bench.ops.inputs import Shape, describe, peer, weights
from bench.timing import Case, Work
from fastsae import _library, ops

# The ways that CUDA's encoders have beside the default one, and other sizes of their blocks.
WAYS: dict[str, tuple[str, ...]] = {
    "blocks": ("blocks:4096x2048", "blocks:4096x4096"),
    "overlap": ("overlap:1024x2048", "overlap:2048x4096"),
    "hopper": (),
}


def _topk(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(linear(x, W, b), k, sorted=False)
    return values.relu(), indices


def _train(
    encode: Callable[..., Any], x: Tensor, W: Tensor, b: Tensor, k: int
) -> tuple[Tensor, ...]:
    values = encode(x, W, b, k)[0]
    return torch.autograd.grad(values.square().sum(), (W, b))


def cases(name: str, shape: Shape, device: str, gpu: bool = False) -> Iterator[Case]:
    """Yield the cases; the floor is the GEMM rate that torch reaches in the same run."""
    # On a GPU, the slow ones run last.
    for dtype in (torch.bfloat16, torch.float32) if gpu else (torch.float32, torch.bfloat16):
        x, W, b = weights(shape, dtype, device)
        topk = _topk_case(x, W, b, name, shape, gpu)
        yield topk
        if gpu and dtype == torch.bfloat16:
            yield from _other_ways(topk, device)
        if gpu or dtype == torch.float32:
            yield from _other_cases(x, W, b, name, shape, gpu)


def _tolerance(x: Tensor) -> float:
    return 1e-4 if x.dtype == torch.float32 else 3e-2


def _topk_case(x: Tensor, W: Tensor, b: Tensor, name: str, shape: Shape, gpu: bool) -> Case:
    k = shape[3]

    def same() -> None:
        got = ops.encode_topk(x, W, b, k).values.sort(1).values
        want = _topk(x, W, b, k)[0].sort(1).values
        assert_close(got, want, rtol=_tolerance(x), atol=_tolerance(x))

    ways: dict[str, Work] = {"linear + topk": lambda: _topk(x, W, b, k)}
    fused = peer("sparsify.fused_encoder", "fused_encoder") if gpu else None
    if fused:
        ways["eai-sparsify"] = lambda: fused(x, W, b, k, "topk")
    if gpu and name == "A":
        compiled = torch.compile(_topk)
        ways["torch.compile"] = lambda: compiled(x, W, b, k)
    return Case(
        "encode_topk",
        describe(name, shape),
        lambda: ops.encode_topk(x, W, b, k),
        ways,
        same,
        **_product(x, W, shape, gpu),
    )


@contextmanager
def _encoding(way: str, device: str) -> Iterator[None]:
    """Let CUDA's encoders meet their pre-activations in another way."""
    if device != "cuda":
        yield
        return
    before = _library.set_cuda_encode(way)
    try:
        yield
    finally:
        _library.set_cuda_encode(before)


def _other_ways(case: Case, device: str) -> Iterator[Case]:
    """Yield the same case for each way, timed beside the default one and the bare GEMM."""

    def in_way(way: str, work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with _encoding(way, device):
                return work()

        return run

    for way, sizes in WAYS.items():
        yield replace(
            case,
            op=f"{case.op} ({way})",
            ours=in_way(way, case.ours),
            torch=dict(case.torch),
            check=in_way(way, case.check),
            parts={
                **case.parts,
                "rows": case.ours,
                **{size: in_way(size, case.ours) for size in sizes},
            },
            targets={},
        )


def _product(x: Tensor, W: Tensor, shape: Shape, gpu: bool) -> dict[str, Any]:
    """Return what all these cases have in common: the GEMM."""
    n, d, m, _ = shape
    return {
        "flops": 2.0 * n * d * m,
        "dtype": x.dtype,
        "parts": {"linear": lambda: linear(x, W)} if gpu else {},
        "targets": {"linear": 0.93} if gpu else {},
    }


def _other_cases(
    x: Tensor, W: Tensor, b: Tensor, name: str, shape: Shape, gpu: bool
) -> Iterator[Case]:
    n, _, _, k = shape
    tolerance = _tolerance(x)
    product = _product(x, W, shape, gpu)
    leaves = [t.clone().requires_grad_() for t in (W, b)]

    def same_gradients() -> None:
        # For the latents that fastsae selects: rounding decides between near ties.
        acts = ops.encode_topk(x, W, b, k)
        codes = x.new_zeros(n, len(W), dtype=torch.float32)
        codes.scatter_(1, acts.indices.long(), 2 * acts.values.float())
        want = (codes.t() @ x.float(), codes.sum(0))
        for p, q in zip(_train(ops.encode_topk, x, *leaves, k), want, strict=True):
            assert (p.float() - q).norm() < 10 * tolerance * q.norm()

    yield Case(
        "encode_topk + backward",
        describe(name, shape),
        lambda: _train(ops.encode_topk, x, *leaves, k),
        {"linear + topk": lambda: _train(_topk, x, *leaves, k)},
        same_gradients,
        **(product | {"targets": {}}),
    )
    budget = k * n

    def torch_batch() -> Tensor:
        return linear(x, W, b).relu().flatten().topk(budget, sorted=False).values

    def same_batch() -> None:
        got = ops.encode_batch_topk(x, W, b, k).acts.values.sort().values
        assert_close(got, torch_batch().sort().values, rtol=tolerance, atol=tolerance)

    batch = Case(
        "encode_batch_topk",
        describe(name, shape),
        lambda: ops.encode_batch_topk(x, W, b, k),
        {"linear + relu + flatten + topk": torch_batch},
        same_batch,
        **product,
    )
    yield batch
    if gpu and x.dtype == torch.bfloat16:
        yield from _other_ways(batch, str(x.device.type))
    theta = ops.encode_batch_topk(x, W, b, k).threshold

    def torch_threshold() -> Tensor:
        pre = linear(x, W, b)
        return torch.where(pre > theta, pre, 0)

    def same_threshold() -> None:
        got = ops.encode_threshold(x, W, b, theta, 2 * budget).values.sum(dtype=torch.float32)
        want = torch_threshold().sum(dtype=torch.float32)
        assert_close(got, want, rtol=10 * tolerance, atol=10 * tolerance)

    yield Case(
        "encode_threshold",
        describe(name, shape),
        lambda: ops.encode_threshold(x, W, b, theta, 2 * budget),
        {"linear + where": torch_threshold},
        same_threshold,
        **product,
    )
    yield from _rules(x, W, b, name, shape, product, tolerance)


def _rules(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    name: str,
    shape: Shape,
    product: dict[str, Any],
    tolerance: float,
) -> Iterator[Case]:
    """Yield the cases of what selects otherwise than by value."""
    n, d, m, k = shape
    groups = math.gcd(m, 1 << (k.bit_length() - 1))
    grad, W_dec = torch.randn_like(x), torch.randn_like(W)

    def torch_groups() -> tuple[Tensor, Tensor]:
        values, place = linear(x, W, b).unflatten(1, (groups, -1)).max(2)
        return values.relu(), place + torch.arange(0, m, m // groups, device=x.device)

    def same_groups() -> None:
        got = ops.encode_group_max(x, W, b, groups)
        assert_close(got.values, torch_groups()[0], rtol=tolerance, atol=tolerance)

    def scored() -> Any:
        return ops.encode_gradient_topk(x, W, b, k, grad=grad, W_dec=W_dec)

    def torch_scored() -> Tensor:
        values, effect = linear(x, W, b).relu(), linear(grad, W_dec).abs()
        score = values * (1 + effect / effect.mean(1, keepdim=True))
        return values.gather(1, score.topk(k, sorted=False).indices)

    def same_scored() -> None:
        got, want = scored().values.sort(1).values, torch_scored().sort(1).values
        wrong = (got - want).abs() > tolerance * (1 + want.abs())
        assert wrong.float().mean() < 0.01  # rounding decides between near ties

    def torch_scores() -> tuple[Tensor, Tensor]:
        a = linear(x, W, b).relu()
        return torch.linalg.vector_norm(a, dim=0), a.flatten().topk(k * n, sorted=False).values

    def same_scores() -> None:
        got = ops.latent_scores(x, W, b, k)
        norm, kept = torch_scores()
        assert_close(got.scores, norm.float(), rtol=10 * tolerance, atol=10 * tolerance)
        assert_close(got.threshold, kept.min().float(), rtol=tolerance, atol=tolerance)

    for op, ours, torch_name, theirs, same, products in (
        (
            "encode_group_max",
            lambda: ops.encode_group_max(x, W, b, groups),
            "linear + max",
            torch_groups,
            same_groups,
            1,
        ),
        ("encode_gradient_topk", scored, "2 linear + topk", torch_scored, same_scored, 2),
        (
            "latent_scores",
            lambda: ops.latent_scores(x, W, b, k),
            "linear + norm + flatten + topk",
            torch_scores,
            same_scores,
            1,
        ),
    ):
        ways: dict[str, Work] = {torch_name: theirs}
        rest = product | {"flops": products * 2.0 * n * d * m, "targets": {}}
        yield Case(op, describe(name, shape), ours, ways, same, **rest)
