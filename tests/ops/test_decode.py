"""sparse_decode, transpose and sparse_weight_grad: values, gradients, determinism, bad input."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import embedding_bag
from torch.testing import assert_close

from fastsae import SparseActs, ops, reference
from tests.ops.inputs import DTYPES, acts

LAYOUTS = ("fixed", "variable")
SHAPES = ((1, 1, 1, 1), (3, 9, 2, 5), (6, 70, 9, 64), (11, 300, 20, 131))
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_equals_float64(device, isa, dtype, layout) -> None:
    for n, d_sae, k, d in SHAPES:
        a = acts(n, d_sae, k, dtype, layout, device)
        W = torch.randn(d_sae, d, dtype=torch.float64).to(dtype).to(device)
        b = torch.randn(d, dtype=torch.float64).to(dtype).to(device)
        for bias in (None, b):
            got = ops.sparse_decode(a, W, bias)
            wide = None if bias is None else bias.double()
            want = reference.sparse_decode(a.to(torch.float64), W.double(), wide)
            tol = TOLERANCE[dtype] * k**0.5
            assert_close(got.double(), want, rtol=tol, atol=tol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_a_dense_reference(device, isa, dtype, layout) -> None:
    for n, d_sae, k, d in SHAPES:
        a = acts(n, d_sae, k, dtype, layout, device)
        W = torch.randn(d_sae, d, dtype=torch.float64).to(dtype).to(device)
        b = torch.zeros(d, dtype=dtype, device=device)
        grad = torch.randn(n, d, dtype=torch.float64).to(dtype).to(device)
        results = []
        for m, to in ((ops, dtype), (reference, torch.float64)):
            v = a.values.detach().to(to).requires_grad_()
            Wt, bt = (t.detach().to(to).requires_grad_() for t in (W, b))
            out = m.sparse_decode(SparseActs(v, a.indices, a.offsets, d_sae), Wt, bt)
            out.backward(grad.to(to))
            results.append((v.grad.double(), Wt.grad.double(), bt.grad.double()))
        tol = TOLERANCE[dtype] * max(k, d) ** 0.5
        active = a.values != 0
        for name, got, want in zip(("values", "W_dec", "b_dec"), *results, strict=True):
            if name == "values":
                assert not got[~active].any()
                want = torch.where(active, want, 0)
            assert_close(got, want, rtol=tol, atol=tol, msg=name)


def test_decode_is_embedding_bag() -> None:
    a = acts(20, 100, 6, torch.float32, "fixed")
    W = torch.randn(100, 33)
    want = embedding_bag(a.indices, W, per_sample_weights=a.values, mode="sum")
    assert_close(ops.sparse_decode(a, W), want)
    v = acts(20, 100, 6, torch.float32, "variable")
    size = int(v.offsets[-1])
    want = embedding_bag(
        v.indices[:size], W, v.offsets[:-1], per_sample_weights=v.values[:size], mode="sum"
    )
    assert_close(ops.sparse_decode(v, W), want)


def test_gradcheck() -> None:
    W = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 3, 8], [1, 3, 4]], dtype=torch.int32)
    values = (torch.rand(2, 3, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, W, b: ops.sparse_decode(SparseActs(v, indices, None, 9), W, b), (values, W, b)
    )
    offsets = torch.tensor([0, 0, 2, 5], dtype=torch.int32)
    flat = torch.tensor([1, 2, 0, 3, 8], dtype=torch.int32)
    values = (torch.rand(5, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, W, b: ops.sparse_decode(SparseActs(v, flat, offsets, 9), W, b), (values, W, b)
    )


def test_an_inactive_entry_reads_nothing() -> None:
    W = torch.randn(4, 3)
    W[2] = float("nan")
    a = SparseActs(
        torch.tensor([[1.0, 0.0]], requires_grad=True),
        torch.tensor([[1, 2]], dtype=torch.int32),
        None,
        4,
    )
    out = ops.sparse_decode(a, W)
    assert torch.equal(out, W[1:2])
    out.sum().backward()
    assert a.values.grad.tolist() == [[W[1].sum().item(), 0.0]]


def test_float32_values_of_a_16_bit_dictionary() -> None:
    a = acts(5, 40, 6, torch.float32, "fixed")
    W = torch.randn(40, 64).bfloat16()
    want = reference.sparse_decode(a.to(torch.float64), W.double())
    assert_close(ops.sparse_decode(a, W).double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_by_latent_equals_reference(device, dtype, layout) -> None:
    for n, d_sae, k, _ in SHAPES:
        a = acts(n, d_sae, k, dtype, layout, device)
        got, want = ops.group_by_latent(a), reference.group_by_latent(a)
        for name in got._fields:
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert got.counts().sum() == (a.values != 0).sum()
        assert torch.equal(got.counts() > 0, a.fired())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_grad_equals_dense_product(device, isa, dtype, layout) -> None:
    for n, d_sae, k, d in SHAPES:
        a = acts(n, d_sae, k, dtype, layout, device)
        x = torch.randn(n, d, dtype=torch.float64).to(dtype).to(device)
        weight, bias = ops.sparse_weight_grad(a.values, ops.group_by_latent(a), x)
        dense = a.to(torch.float64).to_dense()
        tol = TOLERANCE[dtype] * n**0.5
        assert_close(weight.double(), dense.t() @ x.double(), rtol=tol, atol=tol)
        assert_close(bias.double(), dense.sum(0), rtol=tol, atol=tol)


def test_thread_count_does_not_matter() -> None:
    a = acts(300, 500, 16, torch.float32, "fixed")
    W, grad = torch.randn(500, 96), torch.randn(300, 96)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = ops.sparse_decode(a, W)
        weight, bias = ops.sparse_weight_grad(a.values, ops.group_by_latent(a), grad)
        results.append(torch.cat([out, weight, bias.unsqueeze(1).expand(-1, 96)]))
    torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_a_latent_in_every_token() -> None:
    n = 5000
    a = SparseActs(torch.rand(n, 1) + 1, torch.zeros(n, 1, dtype=torch.int32), None, 3)
    x = torch.randn(n, 8)
    weight, _ = ops.sparse_weight_grad(a.values, ops.group_by_latent(a), x)
    assert_close(weight[0], (a.values.double() * x.double()).sum(0).float(), rtol=1e-4, atol=1e-3)
    assert not weight[1:].any()


def test_empty(device) -> None:
    W = torch.randn(7, 4, device=device)
    empty = SparseActs(
        torch.empty(0, 3, device=device),
        torch.empty(0, 3, dtype=torch.int32, device=device),
        None,
        7,
    )
    assert ops.sparse_decode(empty, W).shape == (0, 4)
    assert ops.group_by_latent(empty).offsets.tolist() == [0] * 8
    none = SparseActs(
        torch.empty(0, device=device),
        torch.empty(0, dtype=torch.int32, device=device),
        torch.zeros(3, dtype=torch.int32, device=device),
        7,
    )
    assert ops.sparse_decode(none, W).tolist() == [[0.0] * 4] * 2


def test_opcheck() -> None:
    o = torch.ops.fastsae
    for layout in LAYOUTS:
        a = acts(4, 20, 3, torch.float32, layout)
        values = a.values.clone().requires_grad_()
        W = torch.randn(20, 6, requires_grad=True)
        b = torch.randn(6, requires_grad=True)
        torch.library.opcheck(o.sparse_decode.default, (values, a.indices, a.offsets, W, b))
        grad = torch.randn(4, 6)
        grad.requires_grad_()
        torch.library.opcheck(
            o.sparse_decode_values_grad.default, (grad, a.values, a.indices, a.offsets, W)
        )
        torch.library.opcheck(o.group_by_latent.default, (a.values, a.indices, a.offsets, 20))
        torch.library.opcheck(o.sparse_weight_grad.default, (values, *ops.group_by_latent(a), grad))


def test_wrong_arguments() -> None:
    a = acts(4, 20, 3, torch.float32, "fixed")
    with pytest.raises(TypeError, match=r"expected acts to be SparseActs, got Tensor"):
        ops.sparse_decode(torch.randn(3), torch.randn(20, 5))
    with pytest.raises(
        ValueError, match=r"expected W_dec to be \[d_sae, d_out\] with d_sae = 20, got \[5, 20\]"
    ):
        ops.sparse_decode(a, torch.randn(5, 20))
    with pytest.raises(ValueError, match=r"expected b_dec to be \[d_out\] = \[5\], got \[4\]"):
        ops.sparse_decode(a, torch.randn(20, 5), torch.randn(4))
    with pytest.raises(TypeError, match=r"expected values to have the dtype of W_dec"):
        ops.sparse_decode(a, torch.randn(20, 5, dtype=torch.float64))
    for index in (-1, 20):
        a.indices[1, 1] = index
        with pytest.raises(RuntimeError, match=rf"expected 0 <= indices < d_sae = 20, got {index}"):
            ops.sparse_decode(a, torch.randn(20, 5))
        with pytest.raises(
            RuntimeError, match=r"group_by_latent: expected 0 <= indices < d_sae = 20"
        ):
            ops.group_by_latent(a)
    b = acts(4, 20, 3, torch.float32, "variable")
    b.offsets[2] = 1000
    with pytest.raises(RuntimeError, match=r"expected offsets to ascend from 0 to at most"):
        ops.sparse_decode(b, torch.randn(20, 5))
    lists = ops.group_by_latent(acts(4, 20, 3, torch.float32, "fixed"))
    with pytest.raises(RuntimeError, match=r"expected rows < n = 2 and slots < 12"):
        ops.sparse_weight_grad(torch.randn(4, 3), lists, torch.randn(2, 5))
