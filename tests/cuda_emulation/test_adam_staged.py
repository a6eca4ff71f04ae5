"""The update that copies rows ahead of time, executed on the host: against the CPU op, and against
the kernels that load rows when they move them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fastsae import _library
from tests.conftest import EMULATED
from tests.cuda_emulation.test_adam_step import (
    NONE,
    arguments,
    assert_same_step,
    batch,
    by_rows,
    cuda,
    extra_rows,
    off_by_one,
    same,
    state,
    step,
)
from tests.cuda_emulation.test_gather import skewed
from tests.ops.inputs import acts

pytestmark = pytest.mark.skipif(
    EMULATED is None, reason="built without FASTSAE_EMULATION=ON (make test turns it on)"
)


@contextmanager
def way(name: str) -> Iterator[None]:
    before = _library.set_cuda_adam(name, EMULATED)
    yield
    _library.set_cuda_adam(before, EMULATED)


@pytest.fixture(autouse=True)
def staged() -> Iterator[None]:
    with way("staged"):
        yield


def rounded_averages(before: list[Tensor]) -> list[Tensor]:
    """The same state with both averages of both matrices in bfloat16."""
    return [t.bfloat16() if i >= 4 and t.ndim == 2 else t for i, t in enumerate(before)]


def in_both_ways(before: list[Tensor], *given, **named) -> list[Tensor]:
    """The step, which has to be that of the other kernels to the last bit."""
    got = step(cuda, before, *given, **named)
    with way("direct"):
        want = step(cuda, before, *given, **named)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"{i}: {(a.double() - b.double()).abs().max()}"
    return got


# A multiprocessor has room for 4 blocks of 128 threads up to d = 1536, of 256 up to 3157.
WIDTHS = [4, 8, 24, 132, 512, 1024, 1536]


@pytest.mark.parametrize("d", WIDTHS)
def test_blocks_of_128_threads_give_the_bits_of_the_direct_kernel(d) -> None:
    d_sae = 150 if d < 500 else 37  # more groups of 16 than blocks, and a group that is not full
    a = acts(9, d_sae, 4, torch.float32, "fixed")
    before, entries = state(d_sae, d, torch.float32), batch(a.values, a.indices, None, 9, d)
    extra_grads = extra_rows(d_sae, d, torch.float32)
    in_both_ways(before, entries)
    in_both_ways(before, entries, extra_grads, clip=0.5)
    in_both_ways(before, entries, extra_grads, unit=False)
    in_both_ways(before, entries, centered=False)
    in_both_ways(before, entries, extra_grads, bf16=True)
    assert_same_step(before, entries, extra_grads, clip=0.5)
    half = rounded_averages(before)
    in_both_ways(half, entries, extra_grads, clip=0.5)
    in_both_ways(half, entries, bf16=True)


@pytest.mark.parametrize("d", [1540, 2304, 3160, 4096])
def test_wider_rows_in_blocks_of_256_and_512_threads(d) -> None:
    a = acts(9, 37, 4, torch.float32, "fixed")
    before, entries = state(37, d, torch.float32), batch(a.values, a.indices, None, 9, d)
    extra_grads = extra_rows(37, d, torch.float32)
    assert_same_step(before, entries, extra_grads)
    assert_same_step(before, entries, clip=0.5, unit=False)
    for given in ({"bf16": True}, {"clip": 0.5}):
        got = step(cuda, before, entries, extra_grads, **given)
        with way("direct"):
            want = step(cuda, before, entries, extra_grads, **given)
        for one, other in zip(got, want, strict=True):
            assert_close(one, other, rtol=1e-5, atol=1e-6)
        # Sums of squares are all that is added in another order: averages and W_enc of a step that
        # does not clip are the same.
        if "bf16" in given:
            assert same([got[0], *got[4:5], got[6]], [want[0], *want[4:5], want[6]])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("d_in", "d_out"), [(16, 24), (264, 8), (512, 1024)])
def test_sides_that_are_unlike(d_in, d_out, bf16) -> None:
    m, n = 100, 12
    dec, enc = acts(n, m, 4, torch.float32, "variable"), acts(20, m, 2, torch.float32, "fixed")
    parameters = [torch.randn(s) for s in ((m, d_in), (m, d_out), (m,), (d_out,))]
    before = [*parameters, *(0.1 * torch.randn_like(p) for p in parameters)]
    before += [0.01 * torch.rand_like(p) for p in parameters]
    codes = (dec.values, dec.indices, dec.offsets, torch.randn(n, d_out))
    codes += (torch.randn(20, 2), enc.indices, enc.offsets, torch.randn(20, d_in))
    more = [torch.randn_like(p) for p in parameters]
    for whole in ((None,) * 4, (*more[:2], None, None), (None, *more[1:])):
        results = []
        for name in ("staged", "direct"):
            after = [t.clone() for t in before]
            options = (1e-2, 0.9, 0.999, 1e-8, 3, math.inf, True, False, bf16)
            with way(name):
                cuda.sparse_adam_step_(*after, *codes, *NONE, *whole, None, *options)
            results.append(after)
        assert same(*results)


@pytest.mark.parametrize("kind", ["one latent", "one in every token", "three"])
@pytest.mark.parametrize("n", [31, 33, 257, 1030])
def test_lists_longer_than_what_is_read_ahead(n, kind) -> None:
    values, indices = skewed(n, 40, 2, kind)
    before, entries = state(40, 24, torch.float32), batch(values / n, indices, None, n, 24)
    in_both_ways(before, entries)
    assert_same_step(before, entries, clip=0.5)


def test_latents_without_entries_and_steps_without_any() -> None:
    none, no_index = torch.zeros(0), torch.zeros(0, dtype=torch.int32)
    before = state(40, 24, torch.float32)
    in_both_ways(before, batch(none.view(0, 2), no_index.view(0, 2), None, 0, 24))
    in_both_ways(state(0, 24, torch.float32), batch(none, no_index, torch.zeros(1).int(), 0, 24))
    values = torch.randn(3, 1)
    indices = torch.tensor([[0], [39], [17]], dtype=torch.int32)
    in_both_ways(before, batch(values, indices, None, 3, 24))


def test_copies_of_the_matrices() -> None:
    a = acts(9, 37, 4, torch.float32, "fixed")
    before, entries = state(37, 24, torch.float32), batch(a.values, a.indices, None, 9, 24)
    after = [t.clone() for t in before]
    copies = [torch.zeros_like(W, dtype=torch.bfloat16) for W in before[:2]]
    cuda.sparse_adam_step_(*arguments(after, entries), None, None, *copies)
    assert same(copies, [W.bfloat16() for W in after[:2]])


def test_what_is_not_staged_is_done_as_before() -> None:
    for d, dtype in ((7, torch.float32), (24, torch.float64), (4100, torch.float32)):
        a = acts(9, 18, 4, dtype, "fixed")
        before, entries = state(18, d, dtype), batch(a.values, a.indices, None, 9, d)
        in_both_ways(before, entries)
        in_both_ways(by_rows(before), entries)
    a = acts(9, 18, 4, torch.float32, "fixed")
    before, entries = state(18, 24, torch.float32), batch(a.values, a.indices, None, 9, 24)
    for place in range(12):
        moved = [off_by_one(t) if i == place else t.clone() for i, t in enumerate(before)]
        cuda.sparse_adam_step_(*arguments(moved, entries))
        for one, other in zip(moved, step(cuda, before, entries), strict=True):
            assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_nan_stays_in_its_latent() -> None:
    a = acts(9, 20, 4, torch.float32, "fixed")
    before, entries = state(20, 12, torch.float32), batch(a.values, a.indices, None, 9, 12)
    entries[1][2, 1] = float("nan")
    assert_same_step(before, entries)


def test_the_switch() -> None:
    assert EMULATED is not None
    assert _library.set_cuda_adam("direct", EMULATED) == "staged"
    with pytest.raises(ValueError, match="way to be direct or staged, got 'ahead'"):
        _library.set_cuda_adam("ahead", EMULATED)
    assert _library.set_cuda_adam("staged", EMULATED) == "direct"


@pytest.mark.parametrize(("said", "way"), [("staged", "staged"), ("", "direct"), ("x", "direct")])
def test_the_environment(said, way) -> None:
    program = (
        "import sys; from pathlib import Path; from fastsae import _library; "
        "print(_library.set_cuda_adam('direct', Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(EMULATED)],
        env=os.environ | {"FASTSAE_CUDA_ADAM": said},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == way
    line = "expected FASTSAE_CUDA_ADAM to be direct or staged, got x; using direct"
    assert (line in done.stderr) == (said == "x")
