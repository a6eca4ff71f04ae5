"""topk against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fastsae import ops, reference
from tests.ops.inputs import DTYPES, KINDS, SHAPES, matrix, same
from tests.properties import given, settings, st


@pytest.mark.parametrize("sorted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(device, isa, dtype, kind, sorted) -> None:
    for n, m, k in SHAPES:
        x = matrix(kind, n, m, dtype, device)
        got, want = ops.topk(x, k, sorted=sorted), reference.topk(x, k, sorted=sorted)
        assert same(got.values, want.values), (n, m, k)
        assert torch.equal(got.indices, want.indices), (n, m, k)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 300), st.data(), st.sampled_from(KINDS), st.booleans())
def test_any_shape(n, m, data, kind, sorted) -> None:
    k = data.draw(st.integers(1, m))
    x = matrix(kind, n, m, torch.float32)
    got, want = ops.topk(x, k, sorted=sorted), reference.topk(x, k, sorted=sorted)
    assert same(got.values, want.values)
    assert torch.equal(got.indices, want.indices)


def test_values_are_those_of_torch(device) -> None:
    x = torch.randn(50, 3000, device=device)
    got, want = ops.topk(x, 40, sorted=True), torch.topk(x, 40)
    assert torch.equal(got.values, want.values)
    assert torch.equal(got.indices.long(), want.indices)


def test_lowest_index_wins_a_tie(isa) -> None:
    x = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert ops.topk(x, 2).indices.tolist() == [[1, 2]]


def test_nan_is_largest_and_zeros_are_equal(isa) -> None:
    x = torch.tensor([[1.0, float("inf"), float("nan"), 0.5], [-0.0, 0.0, -1.0, -0.0]])
    assert ops.topk(x, 1).indices.tolist() == [[2], [0]]
    assert ops.topk(x, 2).indices.tolist() == [[1, 2], [0, 1]]


def test_rows_that_defeat_the_first_bound(isa) -> None:
    # Every group maximum is low and everything after the first block is higher: the candidate
    # buffer overflows again and again.
    x = torch.arange(100_000, dtype=torch.float32).repeat(2, 1)
    x[1] = x[1].flip(0)
    for k in (1, 32, 5000):
        assert torch.equal(ops.topk(x, k).indices, reference.topk(x, k).indices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_are_skipped_by_their_maxima(isa, kind, dtype) -> None:
    for m, k in ((4096, 16), (9001, 30), (20_003, 64)):
        x = matrix(kind, 3, m, dtype)
        x[1, 5::997], x[2, 7::101] = float("inf"), float("-inf")
        x[2, 11::1009] = float("nan")
        got, want = ops.topk(x, k), reference.topk(x, k)
        assert same(got.values, want.values), (m, k)
        assert torch.equal(got.indices, want.indices), (m, k)


# Rows that one block holds, streams, or shares with others; odd widths; k at each bound between
# kernels; rows that overflow the candidates.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n", "m", "k"),
    [
        (9, 16_390, 64),
        (9, 33_003, 100),
        (2, 33_001, 65),
        (1, 70_000, 40),
        (2, 140_001, 200),
        (1, 150_000, 512),
        (1, 40_000, 513),
        (3, 131_073, 1),
    ],
)
def test_long_rows(device, dtype, n, m, k) -> None:
    for kind in ("normal", "ties", "equal", "ascending"):
        x = matrix(kind, n, m, dtype, device)
        x[0, m // 2] = float("nan")
        for sorted in (False, True):
            got, want = ops.topk(x, k, sorted=sorted), reference.topk(x, k, sorted=sorted)
            assert same(got.values, want.values), kind
            assert torch.equal(got.indices, want.indices), kind


def test_rows_at_any_address(device) -> None:
    base = torch.randn(3 * 9001 + 8, device=device).bfloat16()
    for start in range(8):
        x = base[start : start + 3 * 9001].view(3, 9001)
        got, want = ops.topk(x, 20), reference.topk(x, 20)
        assert same(got.values, want.values)
        assert torch.equal(got.indices, want.indices)


# A vector is passed over by the largest of its numbers: one that is alone in it has to be seen
# wherever it stands, and NaN beside it, behind the first tile too.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_place_of_a_vector(device, dtype) -> None:
    m, k = 20_000, 24
    for kind in ("normal", "negative"):
        x = matrix(kind, 9, m, torch.float32)
        x[:, 0] = 40.0
        for r in range(8):
            places = 8 * (torch.randperm(m // 8)[: 2 * k] if r % 2 else torch.arange(2 * k)) + r
            x[r, places] = 50.0 + torch.arange(2 * k)
            x[r, places[::3]] = float("nan")
        x[8] = float("nan")
        x = x.to(dtype).to(device)
        for sorted in (False, True):
            got, want = ops.topk(x, k, sorted=sorted), reference.topk(x, k, sorted=sorted)
            assert same(got.values, want.values)
            assert torch.equal(got.indices, want.indices)


# Zeros of both signs keep their sign, though they are equal.
def test_signs_of_zeros(device) -> None:
    x = -torch.rand(9, 9001, device=device) - 0.5
    x[:, ::300] = 0.0
    x[:, ::600] = -0.0
    for sorted in (False, True):
        got = ops.topk(x, 20, sorted=sorted)
        assert torch.equal(got.values.signbit(), x.gather(1, got.indices.long()).signbit())
        assert torch.equal(got.indices, reference.topk(x, 20, sorted=sorted).indices)


def test_leading_dimensions_and_strides(device) -> None:
    x = torch.randn(4, 3, 50, device=device)
    got = ops.topk(x, 5)
    assert got.values.shape == (4, 3, 5)
    assert torch.equal(got.indices, reference.topk(x, 5).indices)
    strided = torch.randn(50, 12, device=device).t()
    assert torch.equal(ops.topk(strided, 5).indices, reference.topk(strided, 5).indices)
    vector = torch.randn(9, device=device)
    assert torch.equal(ops.topk(vector, 2).indices, reference.topk(vector, 2).indices)


def test_empty(device) -> None:
    values, indices = ops.topk(torch.empty(0, 8, device=device), 3)
    assert values.shape == indices.shape == (0, 3)


def test_thread_count_does_not_matter() -> None:
    x = torch.randn(200, 3000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.topk(x, 17))
    torch.set_num_threads(before)
    assert all(torch.equal(r.indices, results[0].indices) for r in results)


def test_gradient() -> None:
    x = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.topk(x, 6).values, x)
    a, b = torch.randn(5, 40, requires_grad=True), None
    b = a.detach().clone().requires_grad_()
    weight = torch.randn(5, 7)
    (ops.topk(a, 7, sorted=True).values * weight).sum().backward()
    (torch.topk(b, 7).values * weight).sum().backward()
    assert_close(a.grad, b.grad, rtol=0, atol=0)


def test_opcheck() -> None:
    for k, sorted in ((1, False), (5, True)):
        x = torch.randn(6, 20, requires_grad=True)
        torch.library.opcheck(torch.ops.fastsae.topk.default, (x, k, sorted))


def test_compiles() -> None:
    def f(x):
        return ops.topk(x * 2, 4).values.sum(1)

    x = torch.randn(6, 30)
    assert_close(torch.compile(f, fullgraph=True)(x), f(x))


@pytest.mark.parametrize("k", [0, -1, 9])
def test_k_out_of_range(k) -> None:
    with pytest.raises(ValueError, match=rf"topk: expected 1 <= k <= d_sae = 8, got k = {k}"):
        ops.topk(torch.randn(2, 8), k)
    with pytest.raises(RuntimeError, match=r"topk: expected 1 <= k <= d_sae = 8, got k ="):
        torch.ops.fastsae.topk(torch.randn(2, 8), k, False)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"topk: expected x to be a Tensor, got list"):
        ops.topk([1.0], 1)
    with pytest.raises(TypeError, match=r"topk: expected x to be float32.*got torch.int64"):
        ops.topk(torch.ones(2, 2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"topk: expected x to be \[\.\.\., d_sae\], got \[\]"):
        ops.topk(torch.tensor(1.0), 1)
    with pytest.raises(TypeError, match=r"topk: expected k to be an int, got float"):
        ops.topk(torch.randn(2, 8), 2.0)
    with pytest.raises(RuntimeError, match=r"expected x to have 2 dimensions, got \[2, 3, 4\]"):
        torch.ops.fastsae.topk(torch.randn(2, 3, 4), 1, False)
