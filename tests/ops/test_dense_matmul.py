"""The library's own matmul equals torch's in float64, whatever the strides and threads."""

import pytest
import torch

from fastsae.ops._matmul import matmul, where_active

SIZES = [(1, 1, 1), (5, 3, 0), (0, 4, 7), (3, 0, 2), (12, 32, 8), (37, 65, 700), (200, 97, 1030)]
"""n, m, k: with and without whole tiles, panels and blocks of k."""


def layouts(rows, columns, dtype):
    """Return a matrix with unit steps along rows, along columns, inside a larger one, and none."""
    big = torch.randn(rows + 2, 2 * columns + 3, dtype=dtype)
    wide = big[1 : rows + 1, 2 : columns + 2]
    return wide.contiguous(), wide.t().contiguous().t(), wide, big[:rows, : 2 * columns : 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "k"), SIZES)
def test_product_equals_float64(isa, dtype, n, m, k) -> None:
    torch.manual_seed(0)
    unit = torch.finfo(dtype).eps
    for a in layouts(n, k, dtype):
        for b in layouts(k, m, dtype):
            exact = a.double() @ b.double()
            bound = 4 * unit * (k + 1) * (a.double().abs() @ b.double().abs()) + 1e-300
            out = matmul(a, b)
            assert out.dtype == dtype
            assert out.shape == (n, m)
            assert out.is_contiguous()
            assert ((out.double() - exact).abs() <= bound).all()


def test_what_is_done_to_an_element(isa) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(30, 600, dtype=torch.float64), torch.randn(600, 70, dtype=torch.float64)
    bias = torch.randn(70, dtype=torch.float64)
    where = torch.randn(30, 70, dtype=torch.float64)
    where[::3, ::2] = 0
    where[1, 1] = -0.0
    expected = torch.where(where != 0, torch.relu(a @ b + bias), 0)
    torch.testing.assert_close(matmul(a, b, bias, relu=True, where=where), expected)
    torch.testing.assert_close(matmul(a, b, relu=True), torch.relu(a @ b))
    torch.testing.assert_close(matmul(a, b, where=where), torch.where(where != 0, a @ b, 0))


def test_nan_stays_in_its_row_and_column(isa) -> None:
    a, b = torch.ones(20, 10), torch.ones(10, 40)
    a[3, 2] = torch.nan
    out = matmul(a, b, relu=True)
    assert out[3].isnan().all()
    assert (out[torch.arange(20) != 3] == 10).all()
    where = torch.ones(20, 40)
    where[:, 5] = torch.nan  # is not 0
    assert (matmul(torch.ones(20, 10), b, where=where) == 10).all()


def test_bits_do_not_depend_on_threads(isa) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(100, 1200), torch.randn(1200, 130)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 6):
            torch.set_num_threads(threads)
            found.append(matmul(a, b))
    finally:
        torch.set_num_threads(before)
    if isa != "scalar":  # there it is torch's
        assert all(torch.equal(out, found[0]) for out in found)


def test_where_active_is_torch_where() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.nan, torch.inf, 1e-45])
    grad = torch.tensor([torch.nan, torch.inf, 2.0, 3.0, 4.0, -torch.inf, 5.0])
    expected = torch.where(values != 0, grad, 0)
    with torch.no_grad():
        torch.testing.assert_close(where_active(values, grad), expected, equal_nan=True)
    torch.testing.assert_close(where_active(values, grad), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2), torch.ones(2, 2), None, None), "expected a to have 2 dimensions"),
        ((torch.ones(2, 3), torch.ones(2, 2), None, None), "expected b to have 3 rows"),
        ((torch.ones(2, 3), torch.ones(3, 2).double(), None, None), "b to have the dtype"),
        ((torch.ones(2, 3), torch.ones(3, 2), torch.ones(3), None), "bias to be [2]"),
        ((torch.ones(2, 3), torch.ones(3, 2), None, torch.ones(3, 2)), "where to be [2, 2]"),
        ((torch.ones(2, 3).half(), torch.ones(3, 2).half(), None, None), "float32 or float64"),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    with pytest.raises(RuntimeError) as error:
        torch.ops.fastsae.dense_matmul(*arguments, False)
    assert message in str(error.value)
