"""The kernels of sparse_adam_step_ executed on the host, against the CPU op."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.conftest import EMULATED
from tests.cuda_emulation.test_gather import LAYOUTS, off_by_one, skewed
from tests.ops.inputs import acts
from tests.properties import given, settings, st

pytestmark = pytest.mark.skipif(
    EMULATED is None, reason="built without FASTSAE_EMULATION=ON (make test turns it on)"
)
cpu, cuda = torch.ops.fastsae, torch.ops.fastsae_emulated


def state(d_sae: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Parameters and both averages, in the order of the operator."""
    W = torch.randn(d_sae, d, dtype=torch.float64)
    W_dec = W / W.norm(dim=1, keepdim=True).clamp(min=1e-9)
    W_dec[:1] = 0
    p = [torch.randn(d_sae, d), W_dec, torch.randn(d_sae), torch.randn(d)]
    m = [0.1 * torch.randn_like(t) for t in p]
    v = [0.01 * torch.rand_like(t) for t in p]
    return [t.to(dtype) for t in (*p, *m, *v)]


def by_rows(before: list[Tensor]) -> list[Tensor]:
    """The same with one average of squares for each row of both matrices."""
    return [*before[:8], before[10].clone(), before[10].flip(0), *before[10:]]


def batch(values: Tensor, indices: Tensor, offsets: Tensor | None, n: int, d: int) -> list:
    grad = torch.randn(values.shape, dtype=torch.float64).to(values.dtype)
    x, error = (torch.randn(n, d, dtype=torch.float64).to(values.dtype) for _ in range(2))
    return [values, grad, indices, offsets, x, error]


def extra_rows(d_sae: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    rows = torch.randperm(d_sae)[: d_sae // 3].int()
    shapes = ((len(rows), d), (len(rows), d), (len(rows),))
    return [rows, *(torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes)]


NONE = [None] * 4


def arguments(
    state: list[Tensor],
    entries: list,
    extra_grads=NONE,
    clip=math.inf,
    unit=True,
    bf16=False,
    more=(*NONE, None),
    centered=True,
) -> tuple:
    """The arguments of the operator; `more`: gradients of parameters, and of others their norm."""
    values, grad, indices, offsets, x, error = entries
    options = (1e-2, 0.9, 0.999, 1e-8, 3, clip, unit, centered, bf16)
    codes = (values, indices, offsets, error, grad, None, None, x)
    return *state, *codes, *extra_grads, *more, *options


def step(module, before: list[Tensor], *given, **named):
    after = [t.clone() for t in before]
    module.sparse_adam_step_(*arguments(after, *given, **named))
    return after


def assert_rounding_is_all(before, entries, extra_grads=NONE, clip=math.inf) -> None:
    """Rounding changes aligned rows that bfloat16 does not hold exactly, and nothing else."""
    before, entries = [t.clone() for t in before], [*entries]
    before[3].zero_()  # b_dec
    rounded = step(cuda, before, entries, extra_grads, clip, bf16=True)
    aligned = before[0].shape[1] % 8 == 0
    assert same(rounded, step(cuda, before, entries, extra_grads, clip)) is not aligned
    entries[4:] = [t.bfloat16().float() for t in entries[4:]]
    rounded = step(cuda, before, entries, extra_grads, clip, bf16=True)
    for one, other in zip(rounded, step(cuda, before, entries, extra_grads, clip), strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-6)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def assert_same_step(before, entries, extra_grads=NONE, clip=math.inf, unit=True) -> list[Tensor]:
    got, want = (step(module, before, entries, extra_grads, clip, unit) for module in (cuda, cpu))
    tol = 1e-12 if before[0].dtype == torch.float64 else 2e-5
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, rtol=tol, atol=tol, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}")
    return got


# Every number of packs per lane, blocks of 128 and of 512 threads, gradients in shared memory and
# in scratch.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 7, 24, 131, 260, 300, 512, 770, 1028, 2050, 4100, 8200])
def test_every_width(d, dtype) -> None:
    d_sae = 37 if d < 2000 else 18
    a = acts(9, d_sae, 4, dtype, "fixed")
    before, entries = state(d_sae, d, dtype), batch(a.values, a.indices, None, 9, d)
    extra_grads = extra_rows(d_sae, d, dtype)
    assert_same_step(before, entries, extra_grads)
    assert_same_step(before, entries, clip=0.5, unit=False)
    assert_same_step(by_rows(before), entries, extra_grads, clip=0.5)
    assert_same_step(by_rows(before), entries, unit=False)
    if dtype == torch.float32:
        assert_rounding_is_all(before, entries, extra_grads, clip=0.5)
        assert_rounding_is_all(by_rows(before), entries, extra_grads)


def test_more_groups_of_latents_than_blocks() -> None:
    # So wide that gradients are kept in scratch, for as many blocks as fit the device.
    d, d_sae = 4100, 150
    a = acts(3, d_sae, 30, torch.float64, "fixed")
    before, entries = state(d_sae, d, torch.float64), batch(a.values, a.indices, None, 3, d)
    assert_same_step(before, entries, clip=0.5)


@pytest.mark.parametrize("clip", [math.inf, 0.5])
@pytest.mark.parametrize("kind", ["one latent", "one in every token", "three"])
@pytest.mark.parametrize("n", [256, 257, 1030])
def test_long_lists(n, kind, clip) -> None:
    values, indices = skewed(n, 40, 2, kind)
    for d in (24, 33):
        before = state(40, d, torch.float32)
        entries = batch(values / n, indices, None, n, d)
        got = assert_same_step(before, entries, clip=clip)
        again = step(cuda, before, entries, clip=clip)
        assert same(got, again)
        assert_rounding_is_all(before, entries, clip=clip)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 30),
    st.integers(1, 80),
    st.integers(1, 60),
    st.integers(1, 90),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from((math.inf, 1e9, 0.1)),
)
def test_any_shape(n, d_sae, k, d, layout, extra, unit, mini, clip) -> None:
    a = acts(n, d_sae, min(k, d_sae), torch.float64, layout)
    entries = batch(a.values, a.indices, a.offsets, n, d)
    extra_grads = extra_rows(d_sae, d, torch.float64) if extra else NONE
    before = state(d_sae, d, torch.float64)
    before = by_rows(before) if mini else before
    assert_same_step(before, entries, extra_grads, clip, unit)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("clip", [math.inf, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_biases_and_of_others(dtype, clip, centered) -> None:
    a = acts(9, 37, 4, dtype, "fixed")
    before, entries = state(37, 24, dtype), batch(a.values, a.indices, None, 9, 24)
    given = [None, None, *(torch.randn(size, dtype=torch.float64).to(dtype) for size in (37, 24))]
    found, factors = [], []
    for module in (cuda, cpu):
        others = torch.tensor([30.0, 1.0], dtype=torch.float64)
        more = (*given, others)
        found.append(step(module, before, entries, clip=clip, more=more, centered=centered))
        factors.append(others)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert_close(*factors, rtol=1e-6, atol=0)
    assert math.isinf(clip) == (float(factors[0][1]) == 1)
    assert not same(found[0], step(cuda, before, entries, clip=clip))


def test_rows_that_are_not_aligned() -> None:
    a = acts(9, 20, 4, torch.float32, "variable")
    before = state(20, 32, torch.float32)
    entries = batch(a.values, a.indices, a.offsets, 9, 32)
    want = step(cuda, before, entries)
    for place in range(12):
        moved = [off_by_one(t) if i == place else t.clone() for i, t in enumerate(before)]
        cuda.sparse_adam_step_(*arguments(moved, entries))
        for one, other in zip(moved, want, strict=True):
            assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_nan_stays_in_its_latent() -> None:
    a = acts(9, 20, 4, torch.float32, "fixed")
    before, entries = state(20, 12, torch.float32), batch(a.values, a.indices, None, 9, 12)
    entries[1][2, 1] = float("nan")
    assert_same_step(before, entries)
    entries[1][2, 1] = 0.0
    entries[5][3] = float("inf")
    assert_same_step(before, entries)
    # The CPU does not clip by a norm that is not a number.
    assert_same_step(before, entries, clip=0.5)


def test_nothing_to_do() -> None:
    none, no_index = torch.zeros(0), torch.zeros(0, dtype=torch.int32)
    offsets = torch.zeros(1, dtype=torch.int32)
    for clip in (math.inf, 0.1):
        entries = batch(none.view(0, 2), no_index.view(0, 2), None, 0, 6)
        assert_same_step(state(10, 6, torch.float32), entries, clip=clip)
        assert_same_step(state(10, 6, torch.float32), batch(none, no_index, offsets, 0, 6))
        assert_same_step(state(0, 6, torch.float32), batch(none, no_index, offsets, 0, 6))
        assert_same_step(state(10, 0, torch.float32), entries[:4] + [none.view(0, 0)] * 2)
    extra_grads = [no_index, none.view(0, 6), none.view(0, 6), none]
    assert_same_step(state(10, 6, torch.float32), entries, extra_grads)


def test_latents_out_of_range_take_no_part() -> None:
    a = acts(9, 20, 4, torch.float32, "fixed")
    before, entries = state(20, 12, torch.float32), batch(a.values, a.indices, None, 9, 12)
    extra_grads = extra_rows(20, 12, torch.float32)
    bad = [extra_grads[0].clone(), *extra_grads[1:]]
    bad[0][0], bad[0][1] = -1, 20
    got = step(cuda, before, entries, bad)
    want = step(cuda, before, entries, [t[2:] for t in extra_grads])
    assert same(got, want)


def test_takes_the_arguments_of_the_cpu() -> None:
    a = acts(6, 20, 3, torch.float32, "fixed")
    before, entries = state(20, 5, torch.float32), batch(a.values, a.indices, None, 6, 5)
    extra_grads = extra_rows(20, 5, torch.float32)
    good = [*arguments(before, entries, extra_grads, clip=0.5)]
    changes = {
        0: before[0].bfloat16(),
        1: before[1].t(),
        5: before[5].double(),
        6: before[6][:3],
        12: entries[0].double(),
        13: entries[2].long(),
        15: entries[5].double(),
        16: entries[1][:2],
        19: entries[4][:5],
        20: extra_grads[0].long(),
        21: None,
        22: extra_grads[2][:1],
        23: extra_grads[3].double(),
        26: torch.ones(19),
        27: torch.ones(4),
        28: torch.ones(2),
        33: 0,
    }
    for place, value in changes.items():
        call = [value if i == place else t for i, t in enumerate(good)]
        messages = []
        for module in (cpu, cuda):
            with pytest.raises(RuntimeError, match="sparse_adam_step_: expected") as error:
                module.sparse_adam_step_(*call)
            messages.append(str(error.value).split(", sparse_adam_step_: ")[1])
        assert messages[0] == messages[1], place
