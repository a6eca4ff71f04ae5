"""Ops in graphs: one graph for all batch sizes, compiled, exported and packaged."""

from __future__ import annotations

import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.testing import assert_close

from fastsae import SparseActs, ops
from tests.crossings.differentiable import largest, largest_of_rows

F, D = 64, 16
torch.manual_seed(1)
W, B = torch.randn(F, D), torch.randn(F)
THETA, M = torch.linspace(0.1, 1.0, F), torch.arange(F, dtype=torch.int32) % 3


def room(n):
    """As a module does: a multiple of the rows, within bounds."""
    if torch.jit.is_tracing():
        return 4096
    return torch.sym_min(F * n, torch.sym_max(4096, 32 * n))


# Each returns something dense; the twin is made of dense torch ops.
def of_threshold(pre):
    return pre * (pre > THETA)


def of_columns(pre):
    order = pre.sort(0, descending=True).indices.sort(0).indices  # the place in its column
    return pre * ((order < M) & (pre > 0))


def rows(found):
    return SparseActs(*found, None, F).to_dense()


OPS = {
    "topk": (lambda z: rows(ops.topk(z, 4)), lambda z: z * largest_of_rows(z, 4)),
    "batch_topk": (
        lambda z: ops.batch_topk(z, 4).acts.to_dense(),
        lambda z: z * largest(z, 4 * len(z)),
    ),
    "batch_topk-fraction": (
        lambda z: ops.batch_topk(z, 2.5).acts.to_dense(),
        lambda z: z * largest(z, int(2.5 * len(z))),
    ),
    "threshold_select": (
        lambda z: ops.threshold_select(z, THETA, room(z.shape[0])).to_dense(),
        of_threshold,
    ),
    "feature_topk": (lambda z: ops.feature_topk(z, M).to_dense(), of_columns),
    "encode_topk": (
        lambda x: rows(ops.encode_topk(x, W, B, 4)),
        lambda x: (x @ W.t() + B).relu() * largest_of_rows(x @ W.t() + B, 4),
    ),
    "encode_batch_topk": (
        lambda x: ops.encode_batch_topk(x, W, B, 4).acts.to_dense(),
        lambda x: (x @ W.t() + B) * largest(x @ W.t() + B, 4 * len(x)),
    ),
    "encode_threshold": (
        lambda x: ops.encode_threshold(x, W, B, THETA, room(x.shape[0])).to_dense(),
        lambda x: of_threshold(x @ W.t() + B),
    ),
    "encode_feature_topk": (
        lambda x: ops.encode_feature_topk(x, W, B, M, x.shape[0] * F).to_dense(),
        lambda x: of_columns(x @ W.t() + B),
    ),
    "sparse_decode": (
        lambda x: ops.sparse_decode(SparseActs(*ops.encode_topk(x, W, B, 4), None, F), W),
        lambda x: ((x @ W.t() + B).relu() * largest_of_rows(x @ W.t() + B, 4)) @ W,
    ),
}
ROWWISE = ("topk", "encode_topk", "sparse_decode")
SHAPES = [pytest.param(name, id=name) for name in OPS]
SIZES = (40, 41, 3, 400)


def example(name: str, n: int) -> torch.Tensor:
    return torch.randn(
        n,
        F
        if name.split("-")[0] in ("topk", "batch_topk", "threshold_select", "feature_topk")
        else D,
    )


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", SHAPES)
def test_one_graph_serves_all_batch_sizes(name, dynamic) -> None:
    torch._dynamo.reset()
    op, dense = OPS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend=counter)
    for n in range(20, 34):
        x = example(name, n)
        assert_close(compiled(x), dense(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == (1 if dynamic else 2)


@pytest.mark.parametrize("name", SHAPES)
def test_a_marked_batch_size(name) -> None:
    torch._dynamo.reset()
    op, dense = OPS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, fullgraph=True, backend=counter)
    for n in SIZES:
        x = example(name, n)
        torch._dynamo.mark_dynamic(x, 0)
        assert_close(compiled(x), dense(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_of_a_marked_batch_size(name) -> None:
    torch._dynamo.reset()
    op, dense = OPS[name]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for n in SIZES:
        x, y = example(name, n).requires_grad_(), None
        y = x.detach().clone().requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x).sin().sum().backward()
        dense(y).sin().sum().backward()
        assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-4)


class Module(torch.nn.Module):
    """An op as what export takes."""

    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, x):
        return self.op(x)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_exported_with_a_dynamic_batch(name, strict) -> None:
    op, dense = OPS[name]
    n = Dim("n", min=2)
    program = export(Module(op), (example(name, 40),), dynamic_shapes=({0: n},), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for size in SIZES:
        x = example(name, size)
        assert_close(loaded(x), dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_packaged_and_run_at_another_batch_size(tmp_path) -> None:
    """What is exported at 40 rows is right at 4,000."""
    names = ("encode_batch_topk", "encode_threshold", "sparse_decode")

    def run(x):
        return tuple(OPS[name][0](x) for name in names)

    program = export(Module(run), (torch.randn(40, D),), dynamic_shapes=({0: Dim("n", min=2)},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/m.pt2")
    packaged = torch._inductor.aoti_load_package(path)
    x = torch.randn(4000, D)
    for got, name in zip(packaged(x), names, strict=True):
        assert_close(got, OPS[name][1](x), rtol=1e-4, atol=1e-4)


def test_sparse_acts_through_export() -> None:
    class Encode(torch.nn.Module):
        def forward(self, x):
            return SparseActs(*ops.encode_topk(x, W, B, 4), None, F), ops.encode_batch_topk(
                x, W, B, 4
            ).acts

    program = export(Encode(), (torch.randn(40, D),), dynamic_shapes=({0: Dim("n", min=2)},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    x = torch.randn(9, D)
    fixed, variable = torch.export.load(buffer).module()(x)
    assert fixed.offsets is None
    assert_close(fixed.to_dense(), OPS["encode_topk"][1](x))
    assert_close(variable.to_dense(), OPS["encode_batch_topk"][1](x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", [n for n in OPS if n not in ROWWISE])
def test_trace_is_refused_where_it_would_fix_a_number(name) -> None:
    with pytest.raises(RuntimeError, match=r"expected torch.export or .*, got torch.jit.trace"):
        torch.jit.trace(OPS[name][0], (example(name, 8),))


@pytest.mark.parametrize("budget", [3, 7])
def test_opcheck_of_numbers_that_follow_from_a_shape(budget) -> None:
    """With a schema of int, fake tensors of dynamic shape fail here."""
    z, x, theta = torch.randn(6, 20), torch.randn(6, D), torch.tensor(0.1)
    native, n = torch.ops.fastsae, z.shape[0]

    def check(op, make, *tensors):
        def f(*tensors):
            return op(*make(*tensors))

        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (6, 5):
            batch = [t[:rows] for t in tensors]
            assert_close(compiled(*batch), f(*batch))
        torch.library.opcheck(op.default, make(*tensors))

    lengths = torch.ones(20, dtype=torch.int32)
    check(native.batch_topk, lambda z: (z, budget * z.shape[0], None), z)
    check(native.threshold_select, lambda z: (z, theta, budget * z.shape[0]), z)
    check(native.feature_topk, lambda z: (z, lengths, 20 * z.shape[0]), z)
    check(
        native.encode_batch_topk,
        lambda x: (x, W, B, None, budget * x.shape[0], None, False, None),
        x,
    )
    check(native.latent_scores, lambda x: (x, W, B, None, False, budget * x.shape[0], False), x)
    check(native.encode_threshold, lambda x: (x, W, B, None, theta, budget * x.shape[0], False), x)
    check(
        native.encode_feature_topk,
        lambda x: (x, W, B, None, M, F * x.shape[0]),
        x,
    )
    assert n == 6
