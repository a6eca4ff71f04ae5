"""The sparse-dense kernels executed on the host, against the CPU ops: shapes, skew, repeats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fastsae import SparseActs
from fastsae.types import accumulator_dtype
from tests.conftest import EMULATED
from tests.ops.inputs import DTYPES, acts
from tests.properties import given, settings, st

pytestmark = pytest.mark.skipif(
    EMULATED is None, reason="built without FASTSAE_EMULATION=ON (make test turns it on)"
)
cpu, cuda = torch.ops.fastsae, torch.ops.fastsae_emulated

LAYOUTS = ("fixed", "variable")
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# d: the first that are read 16 bytes at a time in every dtype; each number of packs per lane.
WIDTHS = (1, 5, 8, 40, 131, 136, 520, 768, 1032, 1100)


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def off_by_one(t: Tensor) -> Tensor:
    """The same numbers, contiguous, but not at a multiple of 16 bytes."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype)
    view = room[1:].view(t.shape)
    view.copy_(t)
    return view


def close(got: Tensor, want: Tensor, terms: int) -> None:
    tol = TOLERANCE[want.dtype] * max(terms, 1) ** 0.5
    assert_close(got, want, rtol=tol, atol=tol, equal_nan=True)


def lists(a: SparseActs) -> tuple[Tensor, Tensor, Tensor | None]:
    return a.values, a.indices, a.offsets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_at_every_width(dtype, layout) -> None:
    for d in WIDTHS:
        a = acts(3, 50, 11, dtype, layout)
        W, b, grad = (numbers(*s, dtype=dtype) for s in ((50, d), (d,), (3, d)))
        for place in (lambda t: t, off_by_one):
            for bias in (None, b):
                got = cuda.sparse_decode(*lists(a), place(W), bias)
                close(got, cpu.sparse_decode(*lists(a), W, bias), 11)
            got = cuda.sparse_decode_values_grad(place(grad), *lists(a), place(W))
            close(got, cpu.sparse_decode_values_grad(grad, *lists(a), W), d)


def check_error(a: SparseActs, W: Tensor, bias: Tensor | None, target: Tensor, place) -> None:
    """Each result against those before it, so that what is rounded is the same in both."""
    acc = accumulator_dtype(W.dtype)
    out, error, squared, products = cuda.sparse_decode_error(
        *lists(a), place(W), bias, place(target)
    )
    assert torch.equal(out, cuda.sparse_decode(*lists(a), place(W), bias))
    assert torch.equal(error, out.to(acc) - target.to(acc))
    close(squared, error.square().sum(1), W.shape[1])
    wide, rounded = a.values.to(acc), error.to(W.dtype)
    entries = (wide, a.indices, a.offsets)
    want = cuda.sparse_decode_values_grad(rounded, *entries, W)
    close(products, want, W.shape[1])
    if place(W) is W:
        assert torch.equal(products, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_error_at_every_width(dtype, layout) -> None:
    for d in (*WIDTHS, 4500):  # more strips than warps
        a = acts(3, 50, 11, dtype, layout)
        W, b, target = (numbers(*s, dtype=dtype) for s in ((50, d), (d,), (3, d)))
        for place in (lambda t: t, off_by_one):
            for bias in (None, b):
                check_error(a, W, bias, target, place)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(0, 300),
    st.sampled_from(LAYOUTS),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_decode_error_of_any_shape(n, d_sae, k, d, layout, dtype, wide_values) -> None:
    a = acts(n, d_sae, min(k, d_sae), dtype, layout)
    if wide_values and dtype in (torch.bfloat16, torch.float16):
        a = a.to(torch.float32)
    W, target = numbers(d_sae, d, dtype=dtype), numbers(n, d, dtype=dtype)
    check_error(a, W, None, target, lambda t: t)


def test_decode_error_of_what_is_not_there() -> None:
    a = acts(4, 20, 6, torch.float32, "fixed")
    W, target = torch.randn(20, 16), torch.randn(4, 16)
    bad = a.indices.clone()
    bad[0, 0], bad[1, 3], bad[3, 5] = -1, 20, 2**31 - 1
    silent = torch.where(bad == a.indices, a.values, 0)
    got = cuda.sparse_decode_error(a.values, bad, None, W, None, target)
    want = cpu.sparse_decode_error(silent, a.indices, None, W, None, target)
    for one, other in zip(got, want, strict=True):
        close(one, other, 6 * 16)
    # Rows of nothing but padding, of no columns, and no rows at all.
    none, no_index = torch.zeros(7), torch.zeros(7, dtype=torch.int32)
    got = cuda.sparse_decode_error(none, no_index, torch.zeros(5).int(), W, None, target)
    assert torch.equal(got[1], -target)
    assert not got[3].any()
    got = cuda.sparse_decode_error(none, no_index, torch.zeros(1).int(), W, None, target[:0])
    assert [*map(list, (t.shape for t in got))] == [[0, 16], [0, 16], [0], [7]]
    assert not got[3].any()
    got = cuda.sparse_decode_error(a.values, a.indices, None, W[:, :0], None, target[:, :0])
    assert got[2].tolist() == [0.0] * 4
    assert not got[3].any()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 300),
    st.sampled_from(LAYOUTS),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_decode_of_any_shape(n, d_sae, k, d, layout, dtype, wide_values) -> None:
    a = acts(n, d_sae, min(k, d_sae), dtype, layout)
    if wide_values and dtype in (torch.bfloat16, torch.float16):
        a = a.to(torch.float32)
    W, grad = numbers(d_sae, d, dtype=dtype), numbers(n, d, dtype=dtype)
    got = cuda.sparse_decode(*lists(a), W, None)
    close(got, cpu.sparse_decode(*lists(a), W, None), k)
    got = cuda.sparse_decode_values_grad(grad, *lists(a), W)
    want = cpu.sparse_decode_values_grad(grad, *lists(a), W)
    assert got.dtype == want.dtype == a.values.dtype
    tol = TOLERANCE[dtype] * d**0.5
    assert_close(got, want, rtol=tol, atol=tol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_inactive_entry_reads_nothing(dtype) -> None:
    W = numbers(5, 24, dtype=dtype)
    W[2] = float("nan")
    values = torch.tensor([[1.0, 0.0, 2.0], [-0.0, 0.0, 0.0]], dtype=dtype)
    indices = torch.tensor([[1, 2, 3], [2, 2, 2]], dtype=torch.int32)
    got = cuda.sparse_decode(values, indices, None, W, None)
    assert torch.equal(got[0].double(), (W[1].double() + 2 * W[3].double()).to(dtype).double())
    assert not got[1].any()
    grad = cuda.sparse_decode_values_grad(torch.ones(2, 24, dtype=dtype), values, indices, None, W)
    assert not grad[values == 0].any()


def test_nan_and_infinity_stay_in_their_row() -> None:
    a = acts(4, 30, 5, torch.float32, "fixed")
    a.values[1, 2], a.values[2, 0] = float("nan"), float("inf")
    W = torch.randn(30, 40)
    close(cuda.sparse_decode(*lists(a), W, None), cpu.sparse_decode(*lists(a), W, None), 5)


def test_entries_out_of_range_take_no_part() -> None:
    a = acts(4, 20, 6, torch.float32, "fixed")
    W, grad = torch.randn(20, 16), torch.randn(4, 16)
    bad = a.indices.clone()
    bad[0, 0], bad[1, 3], bad[3, 5] = -1, 20, 2**31 - 1
    silent = torch.where(bad == a.indices, a.values, 0)
    got = cuda.sparse_decode(a.values, bad, None, W, None)
    close(got, cpu.sparse_decode(silent, a.indices, None, W, None), 6)
    got = cuda.sparse_decode_values_grad(grad, a.values, bad, None, W)
    close(got, cpu.sparse_decode_values_grad(grad, silent, a.indices, None, W), 16)


def test_rows_of_very_different_length() -> None:
    counts = torch.tensor([0, 700, 1, 0, 33, 32, 0])
    offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    cap = int(offsets[-1]) + 9
    indices = torch.randint(0, 40, (cap,), dtype=torch.int32)
    values = torch.randn(cap)
    W, b, grad = torch.randn(40, 72), torch.randn(72), torch.randn(7, 72)
    a = (values, indices, offsets)
    close(cuda.sparse_decode(*a, W, b), cpu.sparse_decode(*a, W, b), 700)
    got = cuda.sparse_decode_values_grad(grad, *a, W)
    close(got, cpu.sparse_decode_values_grad(grad, *a, W), 72)
    assert not got[-9:].any()


def test_decode_of_nothing() -> None:
    W = torch.randn(7, 4)
    none, no_index = torch.zeros(0), torch.zeros(0, dtype=torch.int32)
    b = torch.randn(4)
    offsets = torch.zeros(3, dtype=torch.int32)
    assert torch.equal(cuda.sparse_decode(none, no_index, offsets, W, b), b.expand(2, 4))
    assert torch.equal(
        cuda.sparse_decode(none.view(2, 0), no_index.view(2, 0), None, W, b), b.expand(2, 4)
    )
    narrow = cuda.sparse_decode(torch.ones(2, 1), torch.zeros(2, 1).int(), None, W[:, :0], None)
    assert narrow.shape == (2, 0)
    grad = cuda.sparse_decode_values_grad(torch.randn(2, 4), none, no_index, offsets, W)
    assert grad.shape == (0,)
    padding = torch.ones(3), torch.zeros(3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    grad = cuda.sparse_decode_values_grad(torch.zeros(0, 4), *padding, W)
    assert grad.tolist() == [0.0] * 3


def test_decode_repeats_bit_for_bit() -> None:
    a = acts(40, 300, 20, torch.float32, "variable")
    W, grad = torch.randn(300, 200), torch.randn(40, 200)
    one, two = (
        (
            cuda.sparse_decode(*lists(a), W, None),
            cuda.sparse_decode_values_grad(grad, *lists(a), W),
            *cuda.sparse_decode_error(*lists(a), W, None, grad),
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_decode_takes_the_arguments_of_the_cpu() -> None:
    a = acts(4, 20, 3, torch.float32, "fixed")
    W = torch.randn(20, 5)
    calls = (
        (a.values, a.indices, None, W[0], None),
        (a.values, a.indices, None, W, torch.randn(4)),
        (a.values, a.indices, None, W, torch.randn(5).double()),
        (a.values.double(), a.indices, None, W, None),
        (a.values, a.indices.long(), None, W, None),
        (a.values, a.indices[:2], None, W, None),
        (a.values, a.indices, torch.zeros(5).int(), W, None),
        (a.values.flatten(), a.indices.flatten(), torch.zeros(5), W, None),
        (a.values.int(), a.indices, None, W.int(), None),
    )
    for call in calls:
        messages = []
        for module in (cpu, cuda):
            with pytest.raises(RuntimeError, match="sparse_decode: expected") as error:
                module.sparse_decode(*call)
            messages.append(str(error.value).split(", sparse_decode: ")[1])
        assert messages[0] == messages[1]
    grad = torch.randn(4, 5)
    for bad in (grad[:3], grad.double()):
        with pytest.raises(RuntimeError, match="sparse_decode_values_grad: expected grad to"):
            cuda.sparse_decode_values_grad(bad, *lists(a), W)
        for module in (cpu, cuda):
            with pytest.raises(RuntimeError, match="sparse_decode_error: expected target to"):
                module.sparse_decode_error(*lists(a), W, None, bad)
    for bias in (torch.randn(4), torch.randn(5).double()):
        for module in (cpu, cuda):
            with pytest.raises(RuntimeError, match="sparse_decode_error: expected b_dec to"):
                module.sparse_decode_error(*lists(a), W, bias, grad)


def same_lists(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for name, a, b in zip(("offsets", "rows", "slots"), got, want, strict=True):
        assert torch.equal(a, b), name


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 60),
    st.sampled_from((1, 2, 31, 255, 256, 1023, 1024, 5000, 70_000)),
    st.integers(0, 40),
    st.sampled_from(LAYOUTS),
    st.sampled_from(DTYPES),
)
def test_transpose_of_any_shape(n, d_sae, k, layout, dtype) -> None:
    a = acts(n, min(d_sae, 300), min(k, d_sae, 300), dtype, layout)
    spread = torch.randint(0, d_sae, a.indices.shape, dtype=torch.int32)
    same_lists(
        cuda.group_by_latent(a.values, spread, a.offsets, d_sae),
        cpu.group_by_latent(a.values, spread, a.offsets, d_sae),
    )


@pytest.mark.parametrize("kind", ["spread", "one latent", "two latents", "hot", "sorted"])
@pytest.mark.parametrize("d_sae", [7, 3000, 1_200_000])
def test_transpose_of_many_entries(kind, d_sae) -> None:
    n, k = 1100, 32  # more tiles than blocks of the emulated grid
    indices = torch.randint(0, d_sae, (n, k), dtype=torch.int32)
    if kind == "one latent":
        indices.fill_(d_sae - 1)
    elif kind == "two latents":
        indices = indices % 2 * (d_sae - 1)
    elif kind == "hot":
        indices[:, :16] = 3
    elif kind == "sorted":
        indices = indices.flatten().sort().values.view(n, k)
    values = torch.randn(n, k)
    values[torch.rand(n, k) < 0.3] = 0
    got = cuda.group_by_latent(values, indices.int(), None, d_sae)
    same_lists(got, cpu.group_by_latent(values, indices.int(), None, d_sae))
    same_lists(cuda.group_by_latent(values, indices.int(), None, d_sae), got)


def test_transpose_of_nothing() -> None:
    none, no_index = torch.zeros(0), torch.zeros(0, dtype=torch.int32)
    for offsets in (torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)):
        for d_sae in (0, 1, 9):
            got = cuda.group_by_latent(none, no_index, offsets, d_sae)
            same_lists(got, cpu.group_by_latent(none, no_index, offsets, d_sae))
    zeros = torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.int32)
    same_lists(cuda.group_by_latent(*zeros, None, 4), cpu.group_by_latent(*zeros, None, 4))
    a = acts(3, 9, 4, torch.float32, "variable")
    a.values[0] = float("nan")
    same_lists(cuda.group_by_latent(*lists(a), 9), cpu.group_by_latent(*lists(a), 9))


def test_transpose_leaves_out_what_is_out_of_range() -> None:
    a = acts(4, 20, 6, torch.float32, "fixed")
    bad = a.indices.clone()
    bad[0, 0], bad[1, 3], bad[3, 5] = -1, 20, 2**31 - 1
    silent = torch.where(bad == a.indices, a.values, 0)
    same_lists(
        cuda.group_by_latent(a.values, bad, None, 20),
        cpu.group_by_latent(silent, a.indices, None, 20),
    )
    with pytest.raises(RuntimeError, match="group_by_latent: expected d_sae >= 0, got -1"):
        cuda.group_by_latent(*lists(a), -1)
    with pytest.raises(RuntimeError, match="group_by_latent: expected values to be float32"):
        cuda.group_by_latent(a.indices, a.indices, None, 20)


def skewed(n: int, d_sae: int, k: int, kind: str) -> tuple[Tensor, Tensor]:
    """Values and indices [n, k] of which one latent, or some, have very long lists."""
    indices = torch.randint(0, d_sae, (n, k), dtype=torch.int32)
    if kind == "one latent":
        indices.fill_(d_sae // 2)
    elif kind == "one in every token":
        indices[:, 0] = 1
    elif kind == "three":
        indices %= 3
    return torch.randn(n, k), indices


def weight_grad(module, values, transposed, x):
    return module.sparse_weight_grad(values, *transposed, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_grad_at_every_width(dtype, layout) -> None:
    for d in (*WIDTHS, 0):
        a = acts(9, 50, 11, dtype, layout)
        transposed = cpu.group_by_latent(*lists(a), 50)
        x = numbers(9, d, dtype=dtype)
        for place in (lambda t: t, off_by_one):
            got = weight_grad(cuda, a.values, transposed, place(x))
            for one, other in zip(got, weight_grad(cpu, a.values, transposed, x), strict=True):
                close(one, other, 9)


# Lists that end at, just before and just behind a segment; d of one and of several strips.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["one latent", "one in every token", "three"])
@pytest.mark.parametrize("n", [255, 256, 257, 1025])
def test_weight_grad_of_long_lists(n, kind, dtype) -> None:
    for d in (24, 33, 1032):
        values, indices = skewed(n, 40, 2, kind)
        values = values.to(dtype)
        transposed = cpu.group_by_latent(values, indices, None, 40)
        x = numbers(n, d, dtype=dtype)
        got = weight_grad(cuda, values, transposed, x)
        for one, other in zip(got, weight_grad(cpu, values, transposed, x), strict=True):
            close(one, other, 2 * n)
        again = weight_grad(cuda, values, transposed, x)
        assert torch.equal(got[0], again[0])
        assert torch.equal(got[1], again[1])


def test_a_sum_depends_on_nothing_but_its_list() -> None:
    n, d = 700, 40
    x = torch.randn(n, d)
    values = torch.randn(n, 2)
    indices = torch.stack([torch.zeros(n), torch.arange(n) % 5 + 1], 1).int()
    alone = torch.where(indices == 0, values, 0)
    results = [
        weight_grad(cuda, v, cuda.group_by_latent(v, 9 - indices, None, 10), x)[0][9]
        for v in (values, alone)
    ]
    assert torch.equal(*results)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 200),
    st.sampled_from(LAYOUTS),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_weight_grad_of_any_shape(n, d_sae, k, d, layout, dtype, wide_values) -> None:
    a = acts(n, d_sae, min(k, d_sae), dtype, layout)
    if wide_values and dtype in (torch.bfloat16, torch.float16):
        a = a.to(torch.float32)
    x = numbers(n, d, dtype=dtype)
    transposed = cpu.group_by_latent(*lists(a), d_sae)
    got = weight_grad(cuda, a.values, transposed, x)
    for one, other in zip(got, weight_grad(cpu, a.values, transposed, x), strict=True):
        close(one, other, n)


def test_weight_grad_reads_nothing_out_of_range() -> None:
    a = acts(30, 20, 6, torch.float32, "fixed")
    offsets, rows, slots = cpu.group_by_latent(*lists(a), 20)
    x = torch.randn(30, 8)
    weight, bias = cuda.sparse_weight_grad(a.values, offsets, rows + 1000, slots - 1000, x)
    assert not weight.any()
    assert not bias.any()
    cuda.sparse_weight_grad(a.values, offsets * 1000, rows, slots, x)
    cuda.sparse_weight_grad(a.values, -offsets, rows, slots, x)
    calls = (
        (a.values, offsets, rows, slots, x[0]),
        (a.values, offsets, rows[1:], slots, x),
        (a.values, offsets.long(), rows, slots, x),
        (a.values.double(), offsets, rows, slots, x),
    )
    for call in calls:
        messages = []
        for module in (cpu, cuda):
            with pytest.raises(RuntimeError, match="sparse_weight_grad: expected") as error:
                module.sparse_weight_grad(*call)
            messages.append(str(error.value).split(", sparse_weight_grad: ")[1])
        assert messages[0] == messages[1]
