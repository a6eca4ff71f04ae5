"""batch_topk and threshold_select against the reference, and the cases others get wrong."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fastsae import ops, reference
from fastsae.types import accumulator_dtype
from tests.ops.inputs import DTYPES, KINDS, SHAPES, matrix, same
from tests.properties import given, settings, st


def assert_same_acts(got, want, where=None) -> None:
    """Assert the same entries; on a GPU, which does not count before, padding may follow them."""
    assert torch.equal(got.offsets, want.offsets), where
    size = len(want.values) if got.values.is_cuda else max(len(got.values), len(want.values))
    assert torch.equal(got.indices[:size], want.indices), where
    assert same(got.values[:size], want.values), where
    assert not got.values[size:].any(), where
    assert got.d_sae == want.d_sae


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(device, isa, dtype, kind) -> None:
    for n, m, k in SHAPES:
        x = matrix(kind, n, m, dtype, device)
        for mean in (0, k / 3, k):
            got, want = ops.batch_topk(x, mean), reference.batch_topk(x, mean)
            assert_same_acts(got.acts, want.acts, (n, m, mean))
            assert torch.equal(got.threshold, want.threshold)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_equals_reference(device, isa, dtype, kind) -> None:
    acc = accumulator_dtype(dtype)
    for n, m, k in SHAPES:
        x = matrix(kind, n, m, dtype, device)
        for theta in (torch.tensor(0.5, dtype=acc), torch.randn(m, dtype=acc)):
            theta = theta.to(device)
            for capacity in (0, 3, n * k, n * m):
                got = ops.threshold_select(x, theta, capacity)
                assert_same_acts(
                    got, reference.threshold_select(x, theta, capacity), (n, m, capacity)
                )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6), st.integers(1, 200), st.floats(0, 8), st.sampled_from(KINDS))
def test_any_shape(n, m, k, kind) -> None:
    x = matrix(kind, n, m, torch.float32)
    got, want = ops.batch_topk(x, k), reference.batch_topk(x, k)
    assert_same_acts(got.acts, want.acts)
    assert torch.equal(got.threshold, want.threshold)


@pytest.mark.parametrize("kind", ["normal", "ties", "ascending", "skewed", "few"])
def test_large_enough_to_sample_a_bound(device, isa, kind) -> None:
    # From 262,144 entries on the first bound is an estimate; it must never show in the result.
    n, m = 96, 20_000
    if kind == "skewed":  # the rows that are sampled are nothing like the others
        x = torch.randn(n, m) * torch.where(torch.arange(n) % 2 == 0, 1e3, 1e-3).unsqueeze(1)
    elif kind == "few":
        x = -torch.rand(n, m)
        x[7, 11:50] = 1.0
    else:
        x = matrix(kind, n, m, torch.float32)
    x = x.to(device)
    for k in (0.02, 3, 40):
        want = reference.batch_topk(x, k)
        for threshold_guess in (
            None,
            want.threshold,
            want.threshold * 2,
            torch.tensor(-1.0, device=device),
        ):
            got = ops.batch_topk(x, k, threshold_guess=threshold_guess)
            assert_same_acts(got.acts, want.acts, k)
            assert torch.equal(got.threshold, want.threshold)


def dense(x, k):
    return ops.batch_topk(torch.tensor(x), k).acts.to_dense().tolist()


def test_positive_entries_of_each_row() -> None:
    x = [[3.0, -1.0, 5.0, -2.0], [-6.0, 4.0, -8.0, 7.0]]
    assert dense(x, 2) == [[3.0, 0.0, 5.0, 0.0], [0.0, 4.0, 0.0, 7.0]]


def test_one_row_may_take_the_whole_budget() -> None:
    x = [[5.0, 6.0, 7.0, 8.0], [0.1, 0.2, 0.3, 0.4]]
    assert dense(x, 2) == [[5.0, 6.0, 7.0, 8.0], [0.0, 0.0, 0.0, 0.0]]


def test_fractional_k_rounds_the_budget_down() -> None:
    # int(1.5 * 2) = 3 of the four positive entries.
    x = [[3.0, -1.0, 5.0, -2.0], [-6.0, 4.0, -8.0, 7.0]]
    assert dense(x, 1.5) == [[0.0, 0.0, 5.0, 0.0], [0.0, 4.0, 0.0, 7.0]]


def test_fewer_positives_than_the_budget() -> None:
    acts, threshold = ops.batch_topk(torch.tensor([[-1.0, 2.0], [-3.0, -4.0]]), 2)
    assert acts.to_dense().tolist() == [[0.0, 2.0], [0.0, 0.0]]
    assert acts.row_counts().tolist() == [1, 0]
    assert threshold == 2.0


def test_ties_never_exceed_the_budget() -> None:
    acts, _ = ops.batch_topk(torch.ones(3, 4), 1)
    assert acts.to_dense().tolist() == [[1.0, 1.0, 1.0, 0.0], [0.0] * 4, [0.0] * 4]


@pytest.mark.parametrize("shape", [(2, 3, 16), (2, 3, 4, 16)])
def test_leading_dimensions_share_one_budget(shape) -> None:
    x = torch.randn(shape)
    acts, _ = ops.batch_topk(x, 2)
    rows = x.numel() // 16
    assert acts.n == rows
    assert acts.row_counts().sum() == 2 * rows
    assert_same_acts(acts, reference.batch_topk(x.reshape(-1, 16), 2).acts)


def test_nothing_kept_gives_an_infinite_threshold() -> None:
    for x, k in ((-torch.ones(2, 3), 1), (torch.ones(2, 3), 0), (torch.ones(0, 3), 2)):
        acts, threshold = ops.batch_topk(x, k)
        assert threshold == float("inf")
        assert acts.to_dense().abs().sum() == 0


def test_a_nan_row_takes_no_place() -> None:
    x = torch.rand(3, 8) + 0.1
    clean = ops.batch_topk(x[1:], 3).acts.to_dense()
    x[0] = float("nan")
    got = ops.batch_topk(x, 2).acts.to_dense()
    assert torch.equal(got[1:], clean)
    assert not got[0].any()


def test_threshold_is_strict() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]])
    assert ops.threshold_select(x, torch.tensor(2.0), 3).to_dense().tolist() == [[0.0, 0.0, 3.0]]


def test_gradients() -> None:
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.batch_topk(x, 2.5).acts.values, x)
    theta = torch.tensor(0.1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.threshold_select(x, theta, 20).values, x)
    y = torch.randn(4, 9, requires_grad=True)
    ops.batch_topk(y, 2).acts.to_dense().square().sum().backward()
    kept = ops.batch_topk(y.detach(), 2).acts.to_dense()
    assert_close(y.grad, 2 * kept)


def test_opcheck() -> None:
    x = torch.randn(6, 20, requires_grad=True)
    torch.library.opcheck(torch.ops.fastsae.batch_topk.default, (x, 13, None))
    theta = torch.tensor(0.3)
    torch.library.opcheck(torch.ops.fastsae.threshold_select.default, (x, theta, 11))


def test_compiles() -> None:
    def f(x):
        acts, threshold = ops.batch_topk(x * 2, 2.5)
        kept = ops.threshold_select(x, threshold, 40)
        return acts.values.sum() + threshold + kept.values.sum()

    x = torch.randn(6, 30)
    assert_close(torch.compile(f, fullgraph=True)(x), f(x))


def test_wrong_arguments() -> None:
    x = torch.randn(2, 8)
    for k in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"batch_topk: expected a finite k >= 0, got k = "):
            ops.batch_topk(x, k)
    with pytest.raises(ValueError, match=r"threshold to be \[\] or \[d_sae\] = \[8\], got \[7\]"):
        ops.threshold_select(x, torch.zeros(7), 4)
    with pytest.raises(
        ValueError, match=r"threshold_select: expected capacity >= 0, got capacity = -1"
    ):
        ops.threshold_select(x, torch.tensor(0.0), -1)
    with pytest.raises(TypeError, match=r"expected threshold to be a Tensor, got float"):
        ops.threshold_select(x, 0.5, 4)


def test_no_latents_at_all(device) -> None:
    x = torch.empty(4, 0, device=device)
    acts, threshold = ops.batch_topk(x, 3)
    assert (acts.shape, acts.values.numel(), threshold.item()) == ((4, 0), 0, float("inf"))
    kept = ops.threshold_select(x, torch.zeros((), device=device), 5)
    assert (kept.shape, kept.values.numel()) == ((4, 0), 0)
