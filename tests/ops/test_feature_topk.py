"""feature_topk against the reference, and what a column-wise selection can get wrong."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fastsae import SparseActs, ops, reference
from tests.ops.inputs import DTYPES, KINDS, SHAPES, matrix
from tests.ops.test_batch_topk import assert_same_acts
from tests.properties import given, settings, st

# n, m: beside the wide ones, around a block of 64 columns, 8 rows filtered at once, the first 16
# groups of rows, and a piece of 2048 rows; the last one is tightened twice.
TALL = ((9, 64), (130, 63), (700, 65), (2048, 5), (2057, 66), (4500, 3))
OP = torch.ops.fastsae.feature_topk
# The reference takes most of the time, and inputs are the same at every instruction set.
ANSWERS: dict[tuple[object, ...], SparseActs] = {}


def lengths(n: int, d_sae: int, device: str = "cpu") -> torch.Tensor:
    """Numbers from 0 to above n, small ones more often, as int64."""
    m = (torch.rand(d_sae) ** 4 * (n + 2)).long()
    m[torch.rand(d_sae) < 0.2] = 0
    m[torch.rand(d_sae) < 0.1] = 3 * n
    return m.to(device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(device, isa, dtype, kind) -> None:
    for shape, (n, d_sae) in enumerate([*[s[:2] for s in SHAPES], *TALL]):
        x = matrix(kind, n, d_sae, dtype, device)
        for case, m in enumerate((0, 1, 7, n + 1, lengths(n, d_sae, device))):
            capacity = int(m.clamp(0, n).sum()) if isinstance(m, torch.Tensor) else None
            got = ops.feature_topk(x, m, capacity=capacity)
            key = (x.device, dtype, kind, shape, case)
            if key not in ANSWERS:
                ANSWERS[key] = reference.feature_topk(x, m)
            assert_same_acts(got, ANSWERS[key], (n, d_sae, m))


def tall(kind: str, n: int, d_sae: int, dtype: torch.dtype) -> torch.Tensor:
    """What lists of a column's largest entries, or groups of its rows, may get wrong."""
    row = torch.arange(n).unsqueeze(1)
    if kind == "clustered":  # the largest entries in neighbouring rows
        start = torch.randint(n, (d_sae,))
        x = torch.rand(n, d_sae) + 3 * ((row >= start) & (row < start + 40))
    elif kind == "periodic":  # all in the same group
        x = torch.rand(n, d_sae) + 3 * (row % 32 == 0)
    elif kind == "plateau":  # more are equal to the bound than a list has room for
        x = torch.rand(n, d_sae).clamp_min(0.8)
        x[:, ::2] = x[:, ::2].clamp_max(0.9)
    elif kind == "rare":  # fewer positive entries than are wanted
        x = torch.randn(n, d_sae) - 3
    else:
        return matrix(kind, n, d_sae, dtype)
    return x.to(dtype)


# n, d_sae: aligned rows and others, few columns and several blocks of them. The first two are wide
# enough for a bound from every second or fourth row.
LISTED = ((2600, 264), (1300, 301), (257, 40), (1000, 9))
TALL_KINDS = ("normal", "ties", "equal", "special", "clustered", "periodic", "plateau", "rare")


# What is special about a format shows in two of them.
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, kind) for kind in TALL_KINDS]
    + [(dtype, kind) for dtype in DTYPES[1:] for kind in ("ties", "special")],
    ids=str,
)
def test_many_rows(device, dtype, kind) -> None:
    for n, d_sae in LISTED:
        x = tall(kind, n, d_sae, dtype).to(device)
        some = torch.arange(d_sae) % 3  # what most columns ask for
        one, many = some.clone(), some.clone()
        one[[0, 2, d_sae // 2, d_sae - 1]] = torch.tensor([n // 2, n - 1, n, 40])
        many[d_sae // 3 :: 2] = 200
        for m in (1, 4, some, one, many):
            m = m.to(device) if isinstance(m, torch.Tensor) else m
            # The room that is asked for is the guess of how large m is.
            for capacity in {n * d_sae, 2 * d_sae} if m is some else (None,):
                want = reference.feature_topk(x, m, capacity=capacity)
                assert_same_acts(
                    ops.feature_topk(x, m, capacity=capacity), want, (n, d_sae, m, capacity)
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_start_anywhere(device, dtype) -> None:
    n, d_sae = 300, 48
    x = torch.randn(n * d_sae + 1).to(dtype).to(device)[1:].view(n, d_sae)
    assert_same_acts(ops.feature_topk(x, 3), reference.feature_topk(x, 3))


@pytest.mark.parametrize("n", [255, 256, 257, 519, 1024, 1025])
def test_any_number_of_rows(device, n) -> None:
    x = torch.randn(n, 36, device=device)
    for m in (1, 5, 30):
        assert_same_acts(ops.feature_topk(x, m), reference.feature_topk(x, m), (n, m))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 150), st.integers(0, 12), st.sampled_from(KINDS))
def test_any_shape(n, d_sae, m, kind) -> None:
    x = matrix(kind, n, d_sae, torch.float32)
    assert_same_acts(ops.feature_topk(x, m), reference.feature_topk(x, m))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("m", [1, 3, 40, 127, 129, 2000])
def test_sorted_rows(isa, order, m) -> None:
    # Ascending rows pass every bound there is; descending ones are settled by the first piece.
    x = torch.arange(1.0, 5001).unsqueeze(1).expand(5000, 3)
    x = x if order == 1 else x.flip(0)
    assert_same_acts(ops.feature_topk(x, m), reference.feature_topk(x, m))


def test_columns_choose_for_themselves() -> None:
    x = torch.tensor([[3.0, -1.0, 5.0], [4.0, 2.0, 6.0], [1.0, -2.0, 7.0]])
    assert ops.feature_topk(x, 2).to_dense().tolist() == [[3, 0, 0], [4, 2, 6], [0, 0, 7]]
    m = torch.tensor([1, 3, 0])
    assert ops.feature_topk(x, m).to_dense().tolist() == [[0, 0, 0], [4, 2, 0], [0, 0, 0]]


def test_room_and_padding() -> None:
    x = torch.tensor([[1.0, -1.0], [-1.0, 2.0], [3.0, 4.0]])
    acts = ops.feature_topk(x, 2)
    assert acts.values.tolist() == [1, 2, 3, 4]
    acts = ops.feature_topk(x, torch.tensor([1, 5]))
    assert acts.offsets.tolist() == [0, 0, 1, 3]
    assert acts.values.tolist() == [2, 3, 4, 0]  # 1 + min(5, n) places
    assert acts.indices.tolist() == [1, 0, 1, 0]
    assert ops.feature_topk(x, torch.tensor([1, 5]), capacity=5).values.shape == (5,)
    assert ops.feature_topk(x, 1, capacity=99).values.shape == (6,)


def test_ties_go_to_the_lowest_row() -> None:
    x = torch.ones(3000, 2)
    x[0, 1] = 0.5
    acts = ops.feature_topk(x, 2)
    assert acts.rows().tolist() == [0, 1, 1, 2]
    assert acts.indices.tolist() == [0, 0, 1, 1]


def test_nan_is_never_kept_and_takes_no_place() -> None:
    x = torch.rand(6, 4) + 0.1
    clean = ops.feature_topk(x[1:], 2).to_dense()
    x[0] = float("nan")
    got = ops.feature_topk(x, 2).to_dense()
    assert torch.equal(got[1:], clean)
    assert not got[0].any()


def test_infinity_is_the_largest(isa) -> None:
    x = torch.rand(2500, 3)
    x[[5, 2400]] = float("inf")
    assert ops.feature_topk(x, 2).rows().tolist() == [5] * 3 + [2400] * 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype(dtype) -> None:
    x = torch.randn(300, 5)  # more rows than int8 counts
    m = torch.tensor([0, 1, 2, 100, 127], dtype=dtype)
    assert_same_acts(ops.feature_topk(x, m), reference.feature_topk(x, m.long()))
    huge = torch.full((5,), torch.iinfo(dtype).max, dtype=dtype)
    assert_same_acts(ops.feature_topk(x, huge), reference.feature_topk(x, huge.long()))


@pytest.mark.parametrize("shape", [(16,), (2, 3, 16), (2, 3, 4, 16)])
def test_leading_dimensions_are_rows(shape) -> None:
    x = torch.randn(shape)
    acts = ops.feature_topk(x, 2)
    assert acts.n == x.numel() // 16
    assert_same_acts(acts, reference.feature_topk(x.reshape(-1, 16), 2))


def test_strided_input() -> None:
    x = torch.randn(20, 70).t()
    assert_same_acts(ops.feature_topk(x, 3), reference.feature_topk(x.contiguous(), 3))


@pytest.mark.parametrize("shape", [(0, 7), (5, 0), (0, 0), (2, 0, 7), (2, 3, 0)])
@pytest.mark.parametrize("tensor", [False, True])
def test_empty(shape, tensor) -> None:
    x = torch.empty(shape, requires_grad=True)
    m = torch.full((shape[-1],), 2) if tensor else 2
    acts = ops.feature_topk(x, m)
    assert acts.values.shape == acts.indices.shape == (0,)
    assert acts.offsets.tolist() == [0] * (acts.n + 1)
    assert acts.d_sae == shape[-1]
    acts.values.sum().backward()
    assert x.grad.shape == x.shape


def test_bitwise_the_same_for_every_number_of_threads() -> None:
    x = matrix("ties", 2300, 517, torch.float32)
    m = lengths(2300, 517)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ops.feature_topk(x, m))
    finally:
        torch.set_num_threads(before)
    for acts in found[1:]:
        assert_same_acts(acts, found[0])


def test_gradients() -> None:
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    m = torch.tensor([0, 1, 2, 5, 9])
    assert torch.autograd.gradcheck(lambda x: ops.feature_topk(x, 2).values, x)
    assert torch.autograd.gradcheck(lambda x: ops.feature_topk(x, m).values, x)
    y = torch.randn(2, 6, 9, requires_grad=True)
    ops.feature_topk(y, 3).to_dense().square().sum().backward()
    kept = ops.feature_topk(y.detach(), 3).to_dense()
    assert_close(y.grad.view(12, 9), 2 * kept)


def test_opcheck() -> None:
    x = torch.randn(12, 20, requires_grad=True)
    m = torch.arange(20, dtype=torch.int32) % 5
    torch.library.opcheck(OP.default, (x, m, 41))
    torch.library.opcheck(OP.default, (x, m, 1000))


def test_compiles() -> None:
    m = torch.arange(30) % 4

    def f(x):
        one = ops.feature_topk(x * 2, 3)
        some = ops.feature_topk(x, m, capacity=50)
        return one.values.sum() + some.values.square().sum() + ops.feature_topk(x, m).values.sum()

    x, y = (torch.randn(9, 30, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    got = torch.compile(f, fullgraph=True)(x)
    want = f(y)
    assert_close(got, want)
    got.backward()
    want.backward()
    assert_close(x.grad, y.grad)


def test_compiled_room_follows_from_shapes_alone() -> None:
    m = torch.tensor([1, 0, 2])
    f = torch.compile(lambda x, m: ops.feature_topk(x, m).values, fullgraph=True)
    assert f(torch.randn(4, 3), m).shape == (12,)


def test_wrong_arguments() -> None:
    x = torch.randn(4, 3)
    m = torch.tensor([1, 2, 9])
    for value in (1.5, None, [1, 2, 3]):
        name = type(value).__name__
        with pytest.raises(TypeError, match=rf"m to be an int or an integer Tensor, got {name}"):
            ops.feature_topk(x, value)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match=rf"m to be an integer Tensor, got {dtype}"):
            ops.feature_topk(x, m.to(dtype))
    with pytest.raises(
        TypeError, match=r"feature_topk: expected x to be float32, .* got torch.int"
    ):
        ops.feature_topk(x.int(), 2)
    with pytest.raises(
        ValueError, match=r"feature_topk: expected x to be \[..., d_sae\], got \[\]"
    ):
        ops.feature_topk(torch.tensor(1.0), 2)
    for shape in ((), (4,), (1, 3)):
        with pytest.raises(ValueError, match=r"expected m to be \[d_sae\] = \[3\], got \["):
            ops.feature_topk(x, torch.ones(shape, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"expected m on the device of x, cpu, got meta"):
        ops.feature_topk(x, m.to("meta"))
    with pytest.raises(ValueError, match=r"feature_topk: expected m >= 0, got -1"):
        ops.feature_topk(x, -1)
    with pytest.raises(ValueError, match=r"feature_topk: expected m >= 0, got -7"):
        ops.feature_topk(x, torch.tensor([1, -7, 2]))
    with pytest.raises(
        ValueError, match=r"feature_topk: expected capacity >= 0, got capacity = -1"
    ):
        ops.feature_topk(x, m, capacity=-1)
    with pytest.raises(
        ValueError, match=r"capacity >= the sum of min\(m, n\) = 7, got capacity = 6"
    ):
        ops.feature_topk(x, m, capacity=6)
    with pytest.raises(
        ValueError, match=r"capacity >= the sum of min\(m, n\) = 12, got capacity = 6"
    ):
        ops.feature_topk(x, 9, capacity=6)


def test_wrong_arguments_of_the_kernel() -> None:
    x, m = torch.randn(4, 3), torch.tensor([1, 2, 9], dtype=torch.int32)
    for arguments, message in (
        ((x[0], m, 9), r"expected x to have 2 dimensions, got \[3\]"),
        ((x.int(), m, 9), r"expected x to be float32, float64, bfloat16 or float16"),
        ((x, m[:2], 9), r"expected m to be \[3\], got \[2\]"),
        ((x, m.long(), 9), r"expected m to be int32"),
        ((x, m - 3, 9), r"expected m >= 0, got -2"),
        ((x, m, -1), r"expected capacity >= 0, got -1"),
        ((x, m, 6), r"expected capacity >= the sum of min\(m, n\) = 7, got 6"),
    ):
        with pytest.raises(RuntimeError, match=r"feature_topk: " + message):
            OP(*arguments)


def test_fallback_keeps_the_largest_where_the_room_is_too_small() -> None:
    # What devices without a kernel do: they cannot look into m.
    x = torch.tensor([[1.0, 5.0], [3.0, 4.0]])
    assert reference.feature_topk(x, 2, capacity=2).to_dense().tolist() == [[0, 5], [0, 4]]
    assert reference.feature_topk(x, torch.tensor([-3, 1])).to_dense().tolist() == [[0, 5], [0, 0]]
