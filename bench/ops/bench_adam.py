"""sparse_adam_step_ against dense gradients and torch's fused Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.testing import assert_close

from bench.ops.inputs import Shape, acts, describe, weights
from bench.timing import Case, Work
from fastsae import _library, ops
from fastsae.types import StepTensors


def cases(name: str, shape: Shape, device: str, gpu: bool = False) -> Iterator[Case]:
    """Yield the case, on a GPU; the floor is one read and one write of parameters and averages.

    For the CPU there is the whole step, in `bench.train_step`.
    """
    if not gpu:
        return
    n, d, m, _ = shape
    x, W, b = weights(shape, torch.float32, device)
    a = acts(shape, torch.float32, device)
    indices = a.indices.long()
    error, grad_values = 1e-3 * torch.randn_like(x), 1e-3 * torch.randn_like(a.values)
    initial = (W, W, b, torch.zeros(d, device=device))
    parameters = StepTensors(*(t.clone() for t in initial))
    averages = [StepTensors(*(torch.zeros_like(p) for p in parameters)) for _ in range(2)]
    theirs = [p.clone().requires_grad_() for p in parameters]
    optimizer = torch.optim.Adam(theirs, lr=1e-3, fused=True)

    def step(dtype: torch.dtype | None = None) -> None:
        ops.sparse_adam_step_(
            parameters,
            *averages,
            a,
            grad_values,
            x,
            error,
            lr=1e-3,
            step=1,
            unit_norm=True,
            compute_dtype=dtype,
        )

    def staged(work: Callable[[], None]) -> Callable[[], None]:
        if device != "cuda":
            return work

        def run() -> None:
            before = _library.set_cuda_adam("staged")
            try:
                work()
            finally:
                _library.set_cuda_adam(before)

        return run

    def codes(v: Tensor) -> Tensor:
        return v.new_zeros(n, m).scatter(1, indices, v)

    @torch.no_grad()
    def dense_step() -> None:
        W_enc, W_dec, b_enc, b_dec = theirs
        gradients = codes(grad_values)
        W_enc.grad, b_enc.grad = gradients.t() @ (x - b_dec), gradients.sum(0)
        b_dec.grad = error.sum(0) - b_enc.grad @ W_enc
        g = codes(a.values).t() @ error
        W_dec.grad = g - (g * W_dec).sum(1, keepdim=True) * W_dec
        optimizer.step()
        W_dec /= W_dec.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def same(step: Callable[[], None] = step, far_share: float = 1e-3) -> None:
        for mine, other, start in zip(parameters, theirs, initial, strict=True):
            mine.copy_(start)
            other.copy_(start)
        for average in (*averages[0], *averages[1]):
            average.zero_()
        optimizer.state.clear()
        step()
        dense_step()
        for got, want in zip(parameters, theirs, strict=True):
            # Adam's first step depends only on the sign where a gradient is nearly 0.
            far = (got - want.detach()).abs() > 1e-5
            assert far.float().mean() < far_share
            assert_close(got, want.detach(), rtol=0, atol=3e-3)

    case = Case(
        "sparse_adam_step_",
        describe(name, shape),
        step,
        {"dense gradients + fused Adam": dense_step},
        same,
        bytes=4 * 6 * 2 * m * d,
    )
    yield case
    # The floor of these is the same: what is gathered comes from the second-level cache, or not.
    rounded = partial(step, torch.bfloat16)
    ways: dict[str, tuple[Callable[[], None], dict[str, Work]]] = {
        "bf16 rows": (rounded, {"float32 rows": step}),
        "staged": (staged(step), {"direct": step}),
        "staged, bf16 rows": (staged(rounded), {"direct": rounded}),
    }
    for way, (ours, parts) in ways.items():
        far_share = 1e-2 if "bf16" in way else 1e-3  # rounding changes signs of small gradients
        check = partial(same, ours, far_share)
        targets = {"copy": 0.65} if "bf16" in way else {}
        op = f"{case.op} ({way})"
        yield replace(case, op=op, ours=ours, check=check, parts=parts, targets=targets)
