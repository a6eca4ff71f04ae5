"""sparse_decode_error: values, gradients with and without a second gather, bits, bad input."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fastsae import SparseActs, ops, reference
from fastsae.types import accumulator_dtype
from tests.ops.inputs import DTYPES, acts

LAYOUTS = ("fixed", "variable")
SHAPES = ((1, 1, 1, 1), (3, 9, 2, 5), (6, 70, 9, 64), (11, 300, 20, 131))
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NAMES = ("values", "W_dec", "b_dec", "target")


def numbers(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(device)


def leaves(a, d, dtype=torch.float64, device="cpu"):
    made = [a.values, *(numbers(*s, dtype=dtype, device=device) for s in ((a.d_sae, d), (d,)))]
    made.append(numbers(a.n, d, dtype=dtype, device=device))
    return [t.detach().clone().requires_grad_() for t in made]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_float64(device, isa, dtype, layout) -> None:
    for n, d_sae, k, d in SHAPES:
        a = acts(n, d_sae, k, dtype, layout, device)
        W, target = (numbers(*s, dtype=dtype, device=device) for s in ((d_sae, d), (n, d)))
        b = numbers(d, dtype=dtype, device=device)
        for bias in (None, b):
            got = ops.sparse_decode_error(a, W, bias, target)
            wide = None if bias is None else bias.double()
            want = reference.sparse_decode_error(
                a.to(torch.float64), W.double(), wide, target.double()
            )
            sums = accumulator_dtype(dtype)
            assert [t.dtype for t in got] == [dtype, sums, sums, sums]
            tolerance = TOLERANCE[dtype] * k**0.5
            for name in got._fields:
                more = 1 if name in ("reconstruction", "error") else d
                assert_close(
                    getattr(got, name).double(),
                    getattr(want, name),
                    rtol=tolerance * more**0.5,
                    atol=tolerance * more,
                    msg=name,
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_decoder_and_its_gradient_bit_for_bit(device, isa, dtype, layout) -> None:
    for n, d_sae, k, d in SHAPES:
        a = acts(n, d_sae, k, dtype, layout, device)
        W, target = (numbers(*s, dtype=dtype, device=device) for s in ((d_sae, d), (n, d)))
        b, sums = numbers(d, dtype=dtype, device=device), accumulator_dtype(dtype)
        got = ops.sparse_decode_error(a, W, b, target)
        assert torch.equal(got.reconstruction, ops.sparse_decode(a, W, b))
        assert torch.equal(got.error, got.reconstruction.to(sums) - target.to(sums))
        rounded = got.error.to(dtype)
        products = ops.sparse_decode_values_grad(rounded, a.to(sums), W)
        assert torch.equal(got.products, products)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_each_result(device, layout) -> None:
    a = acts(6, 40, 5, torch.float64, layout, device)
    inputs = leaves(a, 33, device=device)
    weights = [numbers(6, 33, device=device), numbers(6, 33, device=device)]
    weights.append(numbers(6, device=device))
    for used in ((2,), (0,), (1,), (0, 1, 2)):
        found = []
        for module in (ops, reference):
            v, W, b, t = inputs
            out = module.sparse_decode_error(SparseActs(v, a.indices, a.offsets, 40), W, b, t)
            loss = sum((out[i] * weights[i]).sum() for i in used)
            found.append(torch.autograd.grad(loss, inputs, allow_unused=True))
        got, want = found
        for name, mine, theirs in zip(NAMES, got, want, strict=True):
            if theirs is None:  # nothing but the reconstruction is used
                assert name == "target"
                assert mine is None
                continue
            if name == "values":
                theirs = torch.where(a.values != 0, theirs, 0)
            assert_close(mine, theirs, msg=f"{used} {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_squares_gathers_nothing(dtype, layout, monkeypatch) -> None:
    a = acts(7, 40, 5, dtype, layout)
    v, W, b, target = leaves(a, 24, dtype)
    a = SparseActs(v, a.indices, a.offsets, 40)
    found = ops.sparse_decode_error(a, W, b, target)
    want = ops.sparse_decode_values_grad((2 * found.error).to(dtype), a, W).detach()
    for name in ("sparse_decode_values_grad", "sparse_decode"):
        monkeypatch.setattr(torch.ops.fastsae, name, None)
    (got,) = torch.autograd.grad(found.squared.sum(), v)
    assert got.dtype == dtype
    assert_close(got, want, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


def test_gradcheck() -> None:
    indices = torch.tensor([[0, 3, 8], [1, 3, 4]], dtype=torch.int32)
    flat = torch.tensor([1, 2, 0, 3, 8], dtype=torch.int32)
    offsets = torch.tensor([0, 0, 2, 5], dtype=torch.int32)
    for places, starts, n in ((indices, None, 2), (flat, offsets, 3)):
        values = (torch.rand(places.shape, dtype=torch.float64) + 0.5).requires_grad_()
        inputs = (values, numbers(9, 4), numbers(4), numbers(n, 4))
        inputs = tuple(t.requires_grad_() for t in inputs)

        def run(v, W, b, t, places=places, starts=starts):
            return ops.sparse_decode_error(SparseActs(v, places, starts, 9), W, b, t)[:3]

        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


def test_an_inactive_entry_reads_nothing() -> None:
    W = torch.randn(4, 3)
    W[2] = float("nan")
    values = torch.tensor([[1.0, 0.0]], requires_grad=True)
    a = SparseActs(values, torch.tensor([[1, 2]], dtype=torch.int32), None, 4)
    target = torch.randn(1, 3)
    out = ops.sparse_decode_error(a, W, None, target)
    assert torch.equal(out.reconstruction, W[1:2])
    out.squared.sum().backward()
    assert_close(values.grad, torch.tensor([[2 * float((W[1] - target[0]) @ W[1]), 0.0]]))


def test_what_is_not_finite_stays_in_its_row(device) -> None:
    a = acts(4, 30, 5, torch.float32, "fixed", device)
    a.values[1, 2] = float("nan")
    W, target = (numbers(*s, dtype=torch.float32, device=device) for s in ((30, 40), (4, 40)))
    values = a.values.clone().requires_grad_()
    out = ops.sparse_decode_error(SparseActs(values, a.indices, None, 30), W, None, target)
    out.squared.sum().backward()
    assert out.squared.isfinite().tolist() == [True, False, True, True]
    assert values.grad[[0, 2, 3]].isfinite().all()


def test_thread_count_does_not_matter() -> None:
    a = acts(300, 500, 16, torch.float32, "fixed")
    W, target = torch.randn(500, 96), torch.randn(300, 96)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.sparse_decode_error(a, W, None, target))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


def test_empty(device) -> None:
    W = torch.randn(7, 4, device=device)
    index = {"dtype": torch.int32, "device": device}
    none = SparseActs(torch.empty(0, 3, device=device), torch.empty(0, 3, **index), None, 7)
    found = ops.sparse_decode_error(none, W, None, W[:0])
    assert [[*t.shape] for t in found] == [[0, 4], [0, 4], [0], [0, 3]]
    values = torch.zeros(5, device=device, requires_grad=True)
    padding = SparseActs(values, torch.zeros(5, **index), torch.zeros(3, **index), 7)
    found = ops.sparse_decode_error(padding, W, None, W[:2])
    assert torch.equal(found.error, -W[:2])
    found.squared.sum().backward()
    assert values.grad.tolist() == [0.0] * 5
    few = acts(3, 7, 2, torch.float32, "fixed", device)
    found = ops.sparse_decode_error(few, W[:, :0], None, W[:3, :0])
    assert found.squared.tolist() == [0.0] * 3
    assert not found.products.any()
    values = torch.empty(2, 0, device=device)
    found = ops.sparse_decode_error(
        SparseActs(values, torch.empty(2, 0, **index), None, 7), W, W[3], W[:2]
    )
    assert torch.equal(found.reconstruction, W[3].expand(2, 4))


def test_opcheck() -> None:
    for layout in LAYOUTS:
        a = acts(4, 20, 3, torch.float32, layout)
        v, W, b, target = leaves(a, 6, torch.float32)
        arguments = (v, a.indices, a.offsets, W, b, target)
        torch.library.opcheck(torch.ops.fastsae.sparse_decode_error.default, arguments)


def test_wrong_arguments() -> None:
    a = acts(4, 20, 3, torch.float32, "fixed")
    W, target = torch.randn(20, 5), torch.randn(4, 5)
    with pytest.raises(TypeError, match=r"expected acts to be SparseActs, got Tensor"):
        ops.sparse_decode_error(torch.randn(3), W, None, target)
    with pytest.raises(
        ValueError, match=r"expected target to be \[n, d_out\] = \[4, 5\], got \[3, 5\]"
    ):
        ops.sparse_decode_error(a, W, None, target[:3])
    with pytest.raises(TypeError, match=r"expected target to have the dtype of W_dec"):
        ops.sparse_decode_error(a, W, None, target.double())
    with pytest.raises(ValueError, match=r"expected b_dec to be \[d_out\] = \[5\], got \[4\]"):
        ops.sparse_decode_error(a, W, torch.randn(4), target)
    a.indices[1, 1] = 20
    with pytest.raises(RuntimeError, match=r"expected 0 <= indices < d_sae = 20, got 20"):
        ops.sparse_decode_error(a, W, None, target)
