"""Decoders that read bfloat16 rows among float32 numbers: values, gradients, bad input."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fastsae import SparseActs, ops, reference
from fastsae.ops import _dense
from tests.conftest import EMULATED, emulated
from tests.ops.inputs import acts

LAYOUTS = ("fixed", "variable")
# Widths: a single column, rows that start anywhere, rows of which only the floats start at
# multiples of 16 bytes, whole vectors and the rest of one.
SHAPES = ((1, 1, 1, 1), (3, 9, 2, 5), (5, 40, 4, 20), (6, 70, 9, 64), (11, 300, 20, 132))
SHAPES += ((4, 50, 7, 520), (3, 30, 5, 787))
TOLERANCE = 2e-6


def numbers(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(device)


def inputs(n, d_sae, k, d, layout, device):
    """A code, W_dec, a copy that is of another matrix, b_dec and a target."""
    a = acts(n, d_sae, k, torch.float32, layout, device)
    W, copy = (numbers(d_sae, d, device=device) for _ in range(2))
    return a, W, copy.bfloat16(), numbers(d, device=device), numbers(n, d, device=device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_float64(device, isa, layout) -> None:
    for n, d_sae, k, d in SHAPES:
        a, W, copy, b, x = inputs(n, d_sae, k, d, layout, device)
        wide, rows = a.to(torch.float64), copy.double()
        tolerance = TOLERANCE * k**0.5
        for bias in (None, b):
            other = None if bias is None else bias.double()
            got = ops.sparse_decode(a, W, bias, bf16_W_dec=copy)
            assert got.dtype == torch.float32
            want = reference.sparse_decode(wide, rows, other)
            assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
            found = ops.sparse_decode_error(a, W, bias, x, bf16_W_dec=copy)
            assert torch.equal(found.reconstruction, got)
            assert torch.equal(found.error, got - x)
            assert_close(found.squared, found.error.square().sum(1), rtol=1e-5, atol=1e-5)
            of_error = reference.sparse_decode_values_grad(found.error.double(), wide, rows)
            tolerance_of_dot = TOLERANCE * d**0.5 * 10
            assert_close(
                found.products.double(), of_error, rtol=tolerance_of_dot, atol=tolerance_of_dot
            )
        got = ops.sparse_decode_values_grad(x, a, W, bf16_W_dec=copy)
        assert got.dtype == torch.float32
        want = reference.sparse_decode_values_grad(x.double(), wide, rows)
        assert_close(got.double(), want, rtol=TOLERANCE * d**0.5, atol=TOLERANCE * d**0.5)


def test_rows_at_any_address(device) -> None:
    """Copies and floats that do not start at multiples of 16 bytes, and a part of wider rows."""
    for d in (8, 20, 40, 132):
        a, W, copy, b, x = inputs(6, 40, 5, d, "fixed", device)
        want = ops.sparse_decode_error(a, W, b, x, bf16_W_dec=copy)
        shifted, wider = (
            copy.new_empty(copy.numel() + 1)[1:].view_as(copy),
            copy.new_empty(40, 2 * d),
        )
        moved = x.new_empty(x.numel() + 1)[1:].view_as(x)
        shifted.copy_(copy), wider[:, :d].copy_(copy), moved.copy_(x)
        for rows in (shifted, wider[:, :d]):
            assert not rows.is_contiguous() or rows.data_ptr() % 16
            got = ops.sparse_decode_error(a, W, b, moved, bf16_W_dec=rows)
            for name in want._fields:
                assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-4)


def test_threads_do_not_matter(isa) -> None:
    a, W, copy, b, x = inputs(70, 300, 20, 131, "fixed", "cpu")
    before, found = torch.get_num_threads(), []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append(ops.sparse_decode_error(a, W, b, x, bf16_W_dec=copy))
    torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("inactive_grad", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_the_decoder(device, layout, inactive_grad) -> None:
    for n, d_sae, k, d in SHAPES:
        a, W, copy, b, x = inputs(n, d_sae, k, d, layout, device)
        leaves = [t.clone().requires_grad_() for t in (a.values, W, b)]
        rows = copy.clone().requires_grad_()
        code = SparseActs(leaves[0], a.indices, a.offsets, d_sae)
        out = ops.sparse_decode(code, *leaves[1:], inactive_grad=inactive_grad, bf16_W_dec=rows)
        got = torch.autograd.grad(out, [*leaves, rows], x, allow_unused=True)
        assert got[3] is None
        dense = a.to(torch.float64).to_dense()
        every = torch.ones_like(a.values) if inactive_grad else a.values
        listed = SparseActs(every, a.indices, a.offsets, d_sae).to(torch.float64)
        want = (
            reference.sparse_decode_values_grad(x.double(), listed, copy.double()),
            dense.t() @ x.double(),
            x.double().sum(0),
        )
        tolerance = TOLERANCE * max(d, n) ** 0.5 * 2
        for name, mine, theirs in zip(("values", "W_dec", "b_dec"), got, want, strict=False):
            assert mine.dtype == torch.float32
            assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_the_error(device, layout) -> None:
    a, W, copy, b, x = inputs(6, 70, 9, 64, layout, device)
    weights = [numbers(6, 64, device=device), numbers(6, 64, device=device)]
    weights.append(numbers(6, device=device))
    for used in ((2,), (0,), (1,), (0, 1, 2)):
        found = []
        for module, dtype in ((ops, torch.float32), (reference, torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in (a.values, W, b, x)]
            code = SparseActs(leaves[0], a.indices, a.offsets, 70)
            out = module.sparse_decode_error(code, *leaves[1:], bf16_W_dec=copy)
            loss = sum((out[i] * weights[i].to(dtype)).sum() for i in used)
            found.append(torch.autograd.grad(loss, leaves, allow_unused=True))
        for name, mine, theirs in zip(("values", "W_dec", "b_dec", "target"), *found, strict=True):
            if theirs is None:
                assert (name, mine) == ("target", None)
                continue
            if name == "values":
                theirs = torch.where(a.values != 0, theirs, 0)
            assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4, msg=f"{used} {name}")


def test_gradients_of_the_products(device) -> None:
    a, W, copy, _, x = inputs(6, 70, 9, 64, "variable", device)
    out = []
    for module, dtype in ((ops, torch.float32), (reference, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, W)]
        got = module.sparse_decode_values_grad(leaves[0], a.to(dtype), leaves[1], bf16_W_dec=copy)
        weight = torch.arange(got.numel(), device=device).to(dtype) / got.numel()
        out.append(torch.autograd.grad(got, leaves, weight))
    for name, mine, theirs in zip(("grad", "W_dec"), *out, strict=True):
        assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.skipif(EMULATED is None, reason="built without FASTSAE_EMULATION=ON")
def test_the_kernels_of_cuda_give_bits_of_the_same_rows_in_float32() -> None:
    """A sum is made in the order of its entries, whatever its rows are stored in."""
    a, W, copy, b, _ = inputs(11, 300, 20, 132, "fixed", "cpu")
    with emulated("sparse_decode"):
        got = ops.sparse_decode(a, W, b, bf16_W_dec=copy)
        assert torch.equal(got, ops.sparse_decode(a, copy.float(), b))


def test_an_inactive_entry_reads_nothing(device) -> None:
    W, copy = numbers(4, 3, device=device), numbers(4, 3, device=device).bfloat16()
    W[:], copy[2] = float("nan"), float("nan")
    values = torch.tensor([[1.0, 0.0]], device=device, requires_grad=True)
    indices = torch.tensor([[1, 2]], dtype=torch.int32, device=device)
    out = ops.sparse_decode(SparseActs(values, indices, None, 4), W, bf16_W_dec=copy)
    assert torch.equal(out, copy[1:2].float())
    out.sum().backward()
    assert values.grad.tolist() == [[pytest.approx(copy[1].float().sum().item()), 0.0]]


@pytest.mark.parametrize("full", [False, True])
def test_codes_that_are_hardly_sparse(full, monkeypatch) -> None:
    """A matmul of what the copy holds takes the place of the gather."""
    monkeypatch.setattr(_dense, "LEAST", 1)
    monkeypatch.setattr(_dense, "LEAST_WIDTH", 1)
    n, d_sae, d = 30, 40, 24
    _, W, copy, b, x = inputs(n, d_sae, 1, d, "fixed", "cpu")
    z = numbers(n, d_sae)
    a = SparseActs.full(z) if full else SparseActs.from_dense(torch.where(z > 0, z, 0))
    asked, matmul = [], _dense.matmul

    def watched(*arguments, **options):
        asked.append(arguments)
        return matmul(*arguments, **options)

    monkeypatch.setattr(_dense, "matmul", watched)
    got = ops.sparse_decode(a, W, b, bf16_W_dec=copy)
    grad = ops.sparse_decode_values_grad(x, a, W, bf16_W_dec=copy)
    assert len(asked) == 2
    wide = a.to(torch.float64)
    want = reference.sparse_decode(wide, copy.double(), b.double())
    assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    want = reference.sparse_decode_values_grad(x.double(), wide, copy.double())
    assert_close(grad.double(), want, rtol=1e-5, atol=1e-5)


def test_compiles() -> None:
    a, W, copy, b, x = inputs(6, 40, 5, 24, "fixed", "cpu")

    def loss(values, W, b):
        code = SparseActs(values, a.indices, None, 40)
        squared = ops.sparse_decode_error(code, W, b, x, bf16_W_dec=copy).squared
        return squared.sum() + ops.sparse_decode(code, W, b, bf16_W_dec=copy).sum()

    found = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (a.values, W, b)]
        found.append(torch.autograd.grad(run(*leaves), leaves))
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


def test_first_derivatives_alone() -> None:
    a, W, copy, b, x = inputs(6, 40, 5, 24, "fixed", "cpu")
    values, W = a.values.requires_grad_(), W.requires_grad_()
    a = SparseActs(values, a.indices, None, 40)
    for inactive in (False, True):
        out = ops.sparse_decode(a, W, b, inactive_grad=inactive, bf16_W_dec=copy)
        with pytest.raises(RuntimeError, match="sparse_decode: expected a first derivative in rev"):
            torch.autograd.grad(out.sum(), values, create_graph=True)
    squared = ops.sparse_decode_error(a, W, b, x, bf16_W_dec=copy).squared
    with pytest.raises(RuntimeError, match="sparse_decode_error: expected a first derivative in"):
        torch.autograd.grad(squared.sum(), values, create_graph=True)
    products = ops.sparse_decode_values_grad(x, a, W, bf16_W_dec=copy)
    with pytest.raises(RuntimeError, match="sparse_decode_values_grad: expected a first derivat"):
        torch.autograd.grad(products.sum(), W, create_graph=True)

    def of_values(v):
        return ops.sparse_decode(SparseActs(v, a.indices, None, 40), W, b, bf16_W_dec=copy).sum()

    with pytest.raises(RuntimeError, match="sparse_decode: expected a first derivative in revers"):
        torch.func.jvp(of_values, (values,), (torch.ones_like(values),))


def test_wrong_copies() -> None:
    a, W, copy, b, x = inputs(6, 40, 5, 24, "fixed", "cpu")
    calls = (
        lambda W, R: ops.sparse_decode(a.to(W.dtype), W, b.to(W.dtype), bf16_W_dec=R),
        lambda W, R: ops.sparse_decode_values_grad(x.to(W.dtype), a.to(W.dtype), W, bf16_W_dec=R),
        lambda W, R: ops.sparse_decode_error(
            a.to(W.dtype), W, b.to(W.dtype), x.to(W.dtype), bf16_W_dec=R
        ),
    )
    names = ("sparse_decode", "sparse_decode_values_grad", "sparse_decode_error")
    for name, call in zip(names, calls, strict=True):
        with pytest.raises(
            TypeError, match=f"{name}: expected W_dec to be float32 with bf16_W_dec"
        ):
            call(W.double(), copy)
        with pytest.raises(
            TypeError, match=f"{name}: expected bf16_W_dec to be bfloat16, got torc"
        ):
            call(W, copy.half())
        with pytest.raises(ValueError, match=rf"{name}: expected bf16_W_dec to be .* = \[40, 24\]"):
            call(W, copy[:-1])
        with pytest.raises(TypeError, match=f"{name}: expected bf16_W_dec to be a Tensor, got lis"):
            call(W, [1.0])


@pytest.mark.parametrize("name", ["fastsae", "fastsae_emulated"])
def test_the_kernels_check_for_themselves(name) -> None:
    if name == "fastsae_emulated" and EMULATED is None:
        pytest.skip("built without FASTSAE_EMULATION=ON")
    native = getattr(torch.ops, name)
    a, W, copy, b, x = inputs(6, 40, 5, 24, "fixed", "cpu")
    entries = (a.values, a.indices, None)
    for W_dec, rows, expected in (
        (W.double(), copy, "expected W_dec to be float32 with bf16_W_dec"),
        (W, copy.half(), "expected bf16_W_dec to be bfloat16"),
        (W, copy[:-1], r"expected bf16_W_dec to be \[40, 24\] like W_dec, got \[39, 24\]"),
        (W, copy[0], r"expected bf16_W_dec to be \[40, 24\] like W_dec, got \[24\]"),
    ):
        wide = [t.to(W_dec.dtype) for t in (a.values, b, x)]
        entries = (wide[0], a.indices, None, W_dec)
        for call in (
            lambda e=entries, w=wide, r=rows: native.sparse_decode(*e, w[1], r),
            lambda e=entries, w=wide, r=rows: native.sparse_decode_values_grad(w[2], *e, r),
            lambda e=entries, w=wide, r=rows: native.sparse_decode_error(*e, w[1], w[2], r),
        ):
            with pytest.raises(RuntimeError, match=expected):
                call()
