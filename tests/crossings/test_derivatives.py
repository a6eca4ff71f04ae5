"""Derivatives of every kind, against a dense twin and finite differences, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close

from fastsae import SparseActs, ops
from tests.crossings.differentiable import Case, D, F, K, N, cases, largest_of_rows

CASES = cases()
every_op = pytest.mark.parametrize("case", CASES, ids=str)


def arguments(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.inputs)))


def loss(function):
    """A scalar whose second derivative is not constant."""
    return lambda *inputs: (function(*inputs) + 0.3).sin().sum()


def tangents(case: Case) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn_like(t) for t in case.inputs)


@every_op
def test_is_the_dense_function(case) -> None:
    assert_close(case.op(*case.inputs), case.dense(*case.inputs))


@every_op
def test_finite_differences(case) -> None:
    # A value of 0 is inactive, whatever is near it: that step cannot be differentiated.
    fixed = case.name.startswith(("sparse_decode-", "sparse_decode_error-"))
    inputs = tuple(
        t.clone().requires_grad_(not (fixed and i == 0)) for i, t in enumerate(case.inputs)
    )
    forward = {"check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(case.op, inputs, check_batched_grad=True, **forward)
    assert gradgradcheck(case.op, inputs, check_batched_grad=True, check_fwd_over_rev=True)


@every_op
def test_forward_mode(case) -> None:
    moved = tangents(case)
    want = torch.func.jvp(case.dense, case.inputs, moved)
    assert_close(torch.func.jvp(case.op, case.inputs, moved), want)
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, case.inputs, moved)
        assert_close(tuple(forward_ad.unpack_dual(case.op(*duals))), want)


@every_op
def test_forward_mode_in_one_argument(case) -> None:
    for i in arguments(case):
        got, want = (
            torch.func.jvp(
                lambda t, f=f, i=i: f(*case.inputs[:i], t, *case.inputs[i + 1 :]),
                (case.inputs[i],),
                (torch.ones_like(case.inputs[i]),),
            )
            for f in (case.op, case.dense)
        )
        assert_close(got, want)


@every_op
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian"])
def test_transforms(case, transform) -> None:
    f = getattr(torch.func, transform)
    over = loss if transform in ("grad", "hessian") else (lambda function: function)
    got, want = (f(over(g), argnums=arguments(case))(*case.inputs) for g in (case.op, case.dense))
    assert_close(got, want)


@every_op
def test_forward_over_forward(case) -> None:
    def second(function):
        first = lambda *t: torch.func.jvp(loss(function), t, moved)[1]  # noqa: E731
        return torch.func.jvp(first, case.inputs, moved)[1]

    moved = tangents(case)
    assert_close(second(case.op), second(case.dense))


@every_op
def test_third_derivative(case) -> None:
    def third(function):
        first = torch.func.grad(loss(function))
        second = torch.func.grad(lambda *t: first(*t).sin().sum(), argnums=arguments(case))
        return torch.func.jvp(second, case.inputs, moved)[1]

    moved = tangents(case)
    assert_close(third(case.op), third(case.dense))


@every_op
def test_double_backward(case) -> None:
    def second(function):
        inputs = [t.clone().requires_grad_() for t in case.inputs]
        first = torch.autograd.grad(loss(function)(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    assert_close(second(case.op), second(case.dense))


@every_op
def test_samples_of_vmap(case) -> None:
    """All arguments batched, as in an ensemble: values, and gradients of each member."""
    shift = 1e-3 * torch.randn(3, dtype=torch.float64)
    batch = tuple(torch.stack([t * (1 + s) for s in shift]) for t in case.inputs)
    f, g = loss(case.op), torch.func.grad(loss(case.op), argnums=arguments(case))
    want = torch.stack([f(*(t[i] for t in batch)) for i in range(3)])
    assert_close(torch.vmap(f)(*batch), want)
    dense = torch.func.grad(loss(case.dense), argnums=arguments(case))
    assert_close(torch.vmap(g)(*batch), torch.vmap(dense)(*batch))


@every_op
def test_one_batched_argument(case) -> None:
    for i in arguments(case):
        in_dims = tuple(1 if j == i else None for j in arguments(case))
        batch = list(case.inputs)
        batch[i] = torch.stack([batch[i], batch[i] * 1.001], 1)
        got, want = (torch.vmap(f, in_dims)(*batch) for f in (case.op, case.dense))
        assert_close(got, want)
        got, want = (
            torch.vmap(torch.func.grad(loss(f), argnums=arguments(case)), in_dims)(*batch)
            for f in (case.op, case.dense)
        )
        assert_close(got, want)


def test_gradients_of_each_token() -> None:
    encoder = CASES[4].inputs

    def reconstruction_error(x, W, b, c):
        acts = SparseActs(*ops.encode_topk(x[None], W, b, K, b_dec=c), None, F)
        return (ops.sparse_decode(acts, W, c) - x).square().sum()

    def dense(x, W, b, c):
        pre = (x - c) @ W.t() + b
        return ((pre * largest_of_rows(pre.detach()) * (pre > 0)) @ W + c - x).square().sum()

    got, want = (
        torch.vmap(torch.func.grad(f, argnums=(0, 1, 2, 3)), (0, None, None, None))(*encoder)
        for f in (reconstruction_error, dense)
    )
    assert got[1].shape == (N, F, D)
    assert_close(got, want)


@pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith("encode")], ids=str)
def test_second_derivative_where_the_first_is_zero(case) -> None:
    """A gradient of exactly 0 does not make an entry inactive."""
    goal = case.op(*case.inputs)

    def f(function):
        return torch.func.hessian(lambda x: (function(x, *case.inputs[1:]) - goal).square().sum())

    want = f(case.dense)(case.inputs[0])
    assert want.abs().sum() > 1
    assert_close(f(case.op)(case.inputs[0]), want)


@pytest.mark.parametrize("name", ["batch_topk", "encode_batch_topk"])
def test_a_threshold_is_a_constant(name) -> None:
    x, W, b, _ = (t.clone().requires_grad_() for t in CASES[4].inputs)
    found = ops.batch_topk(x, 2) if name == "batch_topk" else ops.encode_batch_topk(x, W, b, 2)
    assert found.acts.values.requires_grad
    assert not found.threshold.requires_grad


@every_op
@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian"])
def test_transforms_compile(case, transform) -> None:
    torch._dynamo.reset()
    if transform == "hessian" and case.name not in ("topk", "encode_topk", "sparse_decode-fixed"):
        pytest.skip("slow, and the same for all")

    def of(function):
        if transform == "jvp":
            return lambda *t: torch.func.jvp(function, t, moved)[1]
        return getattr(torch.func, transform)(loss(function), argnums=arguments(case))

    moved = tangents(case)
    compiled = torch.compile(of(case.op), fullgraph=True, backend="aot_eager")
    assert_close(compiled(*case.inputs), of(case.dense)(*case.inputs))


@pytest.mark.filterwarnings("ignore")
def test_compiled_autograd() -> None:
    x, W, *_ = CASES[4].inputs
    W = W.clone().requires_grad_()

    def f():
        acts = SparseActs(*ops.encode_topk(x, W, None, K), None, F)
        return ops.sparse_decode(acts, W).sin().sum()

    (want,) = torch.autograd.grad(f(), W)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        f().backward()
    assert_close(W.grad, want)


def test_no_derivative_of_an_update() -> None:
    sizes = ((F, D), (F, D), (F,), (D,))
    state = [ops.StepTensors(*(torch.rand(s) for s in sizes)) for _ in range(3)]
    x, g = torch.randn(N, D), torch.randn(N, D)
    found = ops.encode_topk(x, state[0].W_enc, None, K)
    acts = SparseActs(*found, None, F)

    def step(x):
        ops.sparse_adam_step_(*state, acts, acts.values, x, g, lr=1e-3, step=1)
        return x

    with pytest.raises(RuntimeError, match=r"sparse_adam_step_: expected no forward-mode tangent"):
        torch.func.jvp(step, (x,), (x,))
    with pytest.raises(RuntimeError, match=r"sparse_adam_step_: expected no vmap.*got 2 samples"):
        torch.vmap(step)(torch.stack([x, x]))


def test_reverse_over_forward() -> None:
    """A penalty on the Jacobian: the gradient of a jvp."""
    torch.manual_seed(0)
    x, v = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    W, b = torch.randn(20, 6).double(), torch.randn(20).double()

    def sparse(x, W):
        top = ops.encode_topk(x, W, b, 3)
        return ops.sparse_decode(SparseActs(*top, None, 20), W)

    def dense(x, W):
        z = x @ W.t() + b
        values, indices = z.topk(3)
        return torch.zeros_like(z).scatter(1, indices, values.relu()) @ W

    def penalty(f):
        return lambda x, W: torch.func.jvp(lambda y: f(y, W), (x,), (v,))[1].sin().sum()

    got = torch.func.grad(penalty(sparse), (0, 1))(x, W)
    want = torch.func.grad(penalty(dense), (0, 1))(x, W)
    assert want[1].abs().max() > 0
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e)
