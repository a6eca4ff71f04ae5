"""The kernel of sparse_adam_step_ for encoders and decoders that are unlike, against the CPU op."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fastsae import SparseActs
from tests.conftest import EMULATED
from tests.cuda_emulation.test_gather import LAYOUTS, off_by_one, skewed
from tests.ops.inputs import acts
from tests.properties import given, settings, st

pytestmark = pytest.mark.skipif(
    EMULATED is None, reason="built without FASTSAE_EMULATION=ON (make test turns it on)"
)
cpu, cuda = torch.ops.fastsae, torch.ops.fastsae_emulated


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@dataclass
class Step:
    """The arguments of one step."""

    state: list[Tensor]
    dec: SparseActs
    grad_output: Tensor
    enc: SparseActs | Tensor
    """A code of its own, or gradients of the values of `dec`."""
    x: Tensor
    extra: list[Tensor | None] = field(default_factory=lambda: [None] * 4)
    more: list[Tensor | None] = field(default_factory=lambda: [None] * 4)
    squared: float | None = None
    """Squared norm of other gradients."""
    clip: float = math.inf
    unit: bool = True
    centered: bool = False
    bf16: bool = False

    def run(self, module, copy=torch.clone) -> list[Tensor]:
        """Return what is written: parameters, averages, and the factor of clipping."""
        after = [copy(t) for t in self.state]
        enc = (self.enc, None, None)
        if isinstance(self.enc, SparseActs):
            enc = (self.enc.values, self.enc.indices, self.enc.offsets)
        found = [] if self.squared is None else [torch.tensor([self.squared, 1.0]).double()]
        module.sparse_adam_step_(
            *after,
            *(self.dec.values, self.dec.indices, self.dec.offsets, self.grad_output),
            *enc,
            self.x,
            *self.extra,
            *self.more,
            *(found or [None]),
            *(1e-2, 0.9, 0.999, 1e-8, 3, self.clip, self.unit, self.centered, self.bf16),
        )  # fmt: skip
        return after + found

    def with_rows(self) -> Step:
        """Gradients of a third of the latents."""
        d_sae, dtype = len(self.state[0]), self.state[0].dtype
        rows = torch.randperm(d_sae)[: d_sae // 3].int()
        shapes = (t.shape[1:] for t in self.state[:3])
        return replace(self, extra=[rows, *(numbers(len(rows), *s, dtype=dtype) for s in shapes)])

    def with_more(self, *places: int) -> Step:
        """Gradients of some whole parameters."""
        more = [
            numbers(*p.shape, dtype=p.dtype) if i in places else None
            for i, p in enumerate(self.state[:4])
        ]
        return replace(self, more=more)

    def by_rows(self) -> Step:
        """One average of squares for each row of both matrices."""
        v = self.state[10]
        return replace(self, state=[*self.state[:8], v.clone(), v.flip(0), *self.state[10:]])


def make(
    n: int,
    d_in: int,
    d_out: int,
    d_sae: int,
    k: int,
    dtype: torch.dtype,
    layout: str = "fixed",
    n_enc: int | None = None,
) -> Step:
    """Return a step with two codes: the encoder's of n_enc rows and half as many entries in each;
    0: with one code."""
    shapes = ((d_sae, d_in), (d_sae, d_out), (d_sae,), (d_out,))
    p = [torch.randn(s, dtype=torch.float64) for s in shapes]
    p[1] /= p[1].norm(dim=1, keepdim=True).clamp(min=1e-9)
    p[1][:1] = 0
    m = [0.1 * torch.randn_like(t) for t in p]
    v = [0.01 * torch.rand_like(t) for t in p]
    dec = acts(n, d_sae, k, dtype, layout)
    n_enc = 2 * n + 1 if n_enc is None else n_enc
    if n_enc:
        enc: SparseActs | Tensor = acts(n_enc, d_sae, (k + 1) // 2, dtype, layout)
    else:
        enc = numbers(*dec.values.shape, dtype=dtype)
    return Step(
        [t.to(dtype) for t in (*p, *m, *v)],
        dec,
        numbers(n, d_out, dtype=dtype),
        enc,
        numbers(n_enc or n, d_in, dtype=dtype),
    )


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def assert_close_steps(got: list[Tensor], want: list[Tensor]) -> None:
    tol = 1e-12 if got[0].dtype == torch.float64 else 2e-5
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, rtol=tol, atol=tol, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}")


def assert_same_step(step: Step) -> list[Tensor]:
    got = step.run(cuda)
    assert_close_steps(got, step.run(cpu))
    return got


def assert_rounding_is_all(step: Step) -> None:
    """Rounding changes aligned rows that bfloat16 does not hold exactly, and nothing else."""
    state = [t.clone() for t in step.state]
    state[3].zero_()  # b_dec
    step = replace(step, state=state)
    aligned = all(t.shape[1] % 8 == 0 for t in state[:2])
    rounded = replace(step, bf16=True).run(cuda)
    assert same(rounded, step.run(cuda)) is not aligned
    exact = {"x": step.x.bfloat16().float(), "grad_output": step.grad_output.bfloat16().float()}
    step = replace(step, **exact)
    for one, other in zip(replace(step, bf16=True).run(cuda), step.run(cuda), strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-6)


# Both numbers of packs per lane, single elements, 128 and 512 threads, gradients in shared memory
# and in scratch; either side the wider one.
WIDTHS = (
    (1, 1), (1, 7), (24, 8), (131, 260), (300, 24), (512, 512), (768, 304), (1028, 2052),
    (2050, 4100), (4104, 4104), (4100, 8200), (8200, 16),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
def test_every_width(d_in, d_out, dtype) -> None:
    d_sae = 37 if d_in + d_out < 2000 else 18
    step = make(9, d_in, d_out, d_sae, 4, dtype)
    step = replace(step, centered=d_in == d_out)
    assert_same_step(step)
    assert_same_step(replace(step.with_rows(), clip=0.5, unit=False))
    assert_same_step(replace(step.by_rows().with_rows(), clip=0.5))
    assert_same_step(replace(step.by_rows().with_more(0, 1), unit=False))
    if dtype == torch.float32:
        assert_rounding_is_all(replace(step.with_rows(), clip=0.5))
        assert_rounding_is_all(step.by_rows().with_more(0, 1))


def test_more_groups_of_latents_than_blocks() -> None:
    # So wide that gradients are kept in scratch, for as many blocks as fit the device.
    assert_same_step(replace(make(3, 4100, 4100, 150, 30, torch.float64), clip=0.5, centered=True))


@pytest.mark.parametrize("clip", [math.inf, 0.5])
@pytest.mark.parametrize("kind", ["one latent", "one in every token", "three"])
@pytest.mark.parametrize("n", [256, 257, 1030])
def test_many_entries_in_one_latent(n, kind, clip) -> None:
    for d_in, d_out in ((24, 24), (40, 33)):
        step = make(n, d_in, d_out, 40, 2, torch.float32, n_enc=3 * n)
        values, indices = skewed(n, 40, 2, kind)
        step.dec = SparseActs(values / n, indices, None, 40)
        values, indices = skewed(3 * n, 40, 2, kind)
        step.enc = SparseActs(values / n, indices.flip(0), None, 40)
        step = replace(step, clip=clip, centered=d_in == d_out)
        got = assert_same_step(step)
        assert same(got, step.run(cuda))
        if d_in == d_out:
            assert_rounding_is_all(step)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(0, 30), st.integers(1, 40)),
    st.integers(1, 80),
    st.integers(1, 30),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.sampled_from(LAYOUTS),
    st.tuples(*[st.booleans()] * 5),
    st.sets(st.integers(0, 3)),
    st.sampled_from((math.inf, 1e9, 0.1)),
)
def test_any_shape(rows, d_sae, k, widths, layout, flags, more, clip) -> None:
    (n, n_enc), (d_in, d_out) = rows, widths
    own, extra, unit, mini, centered = flags
    d_out = d_in if centered else d_out
    k = min(k, d_sae)
    step = make(n, d_in, d_out, d_sae, k, torch.float64, layout, n_enc if own else 0)
    step = step.with_more(*more)
    step = step.with_rows() if extra else step
    step = step.by_rows() if mini else step
    step = replace(step, clip=clip, unit=unit, centered=centered, squared=30.0)
    got = assert_same_step(step)
    assert same(got, step.run(cuda))


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("place", range(4))
def test_gradients_of_whole_parameters(place, own, centered) -> None:
    step = make(9, 24, 24, 37, 4, torch.float64, n_enc=None if own else 0)
    step = replace(step, centered=centered)
    more = replace(step.with_more(place), clip=0.5)
    assert not same(assert_same_step(more), assert_same_step(step))


def test_an_encoder_with_the_decoders_entries_is_one_code() -> None:
    step = replace(make(9, 24, 24, 37, 4, torch.float64, n_enc=0), centered=True)
    g = torch.where(step.dec.values != 0, step.enc, 0)
    own = replace(step, enc=SparseActs(g, step.dec.indices, None, 37))
    assert_close_steps(own.run(cuda), step.run(cuda))


@pytest.mark.parametrize("clip", [math.inf, 0.5])
def test_clips_with_other_gradients(clip) -> None:
    for dtype in (torch.float32, torch.float64):
        step = replace(make(9, 16, 24, 37, 4, dtype).with_more(2, 3), clip=clip, squared=30.0)
        factor = float(assert_same_step(step)[-1][1])
        assert (factor == 1) is math.isinf(clip)
        alone = replace(step, squared=0.0).run(cuda)
        assert (float(alone[-1][1]) > factor) is math.isfinite(clip)


@pytest.mark.parametrize("clip", [math.inf, 0.5])
@pytest.mark.parametrize("empty", ["enc", "dec", "both"])
def test_empty_codes(empty, clip) -> None:
    for dtype, layout in ((torch.float32, "fixed"), (torch.float64, "variable")):
        step = replace(make(9, 24, 16, 37, 4, dtype, layout), clip=clip)
        if layout == "fixed":  # without rows
            values = torch.zeros(0, 2, dtype=dtype)
            nothing = SparseActs(values, values.int(), None, 37)
        else:  # rows without entries
            offsets = torch.zeros(10, dtype=torch.int32)
            nothing = SparseActs(torch.zeros(0, dtype=dtype), offsets[:0], offsets, 37)
        if empty != "enc":
            step = replace(step, dec=nothing, grad_output=step.grad_output[: nothing.n])
        if empty != "dec":
            step = replace(step, enc=nothing, x=step.x[: nothing.n])
        got = assert_same_step(step)
        assert not any(torch.equal(a, b) for a, b in zip(got, step.state, strict=True))
        assert_same_step(step.with_rows())
        assert_same_step(step.by_rows().with_more(0, 1))


def test_no_latents_and_no_columns() -> None:
    for d_in, d_out, d_sae in ((6, 5, 0), (0, 5, 10), (6, 0, 10), (0, 0, 10)):
        for clip in (math.inf, 0.1):
            step = make(4, d_in, d_out, max(d_sae, 1), 1, torch.float32)
            if d_sae == 0:
                step.state = [t[:0] if i % 4 < 3 else t for i, t in enumerate(step.state)]
                nothing = SparseActs(torch.zeros(4, 0), torch.zeros(4, 0).int(), None, 0)
                step.dec, step.enc, step.x = nothing, nothing, step.x[:4]
            assert_same_step(replace(step, clip=clip))


def test_latents_without_entries_take_a_step_with_gradient_0() -> None:
    step = make(9, 24, 16, 60, 2, torch.float64)
    for code, keep in ((step.dec, 2), (step.enc, 3)):  # even ones decode, multiples of 3 encode
        code.values[code.indices % keep != 0] = 0
    got = assert_same_step(replace(step, unit=False))
    odd, third = torch.arange(60) % 2 == 1, torch.arange(60) % 3 != 0
    for place, rows in ((4, third), (5, odd), (6, third)):  # averages of W_enc, W_dec, b_enc
        assert_close(got[place][rows], 0.9 * step.state[place][rows])
        assert not torch.equal(got[place][~rows], 0.9 * step.state[place][~rows])


def test_rows_that_are_not_aligned() -> None:
    step = make(9, 32, 16, 20, 4, torch.float32, "variable").with_more(0, 1).with_rows()
    want = step.run(cuda)
    for held in step.state:
        got = step.run(cuda, lambda t, held=held: off_by_one(t) if t is held else t.clone())
        assert_close_steps(got, want)
    for name, place in (("more", 0), ("more", 1), ("extra", 1), ("extra", 2)):
        tensors = list(getattr(step, name))
        tensors[place] = off_by_one(tensors[place])
        assert_close_steps(replace(step, **{name: tensors}).run(cuda), want)
    for name in ("x", "grad_output"):
        moved = replace(step, **{name: off_by_one(getattr(step, name))})
        assert_close_steps(moved.run(cuda), want)


def test_a_nan_stays_in_its_latent() -> None:
    for centered in (False, True):
        step = make(9, 24, 24 if centered else 12, 20, 4, torch.float32)
        step = replace(step, centered=centered)
        step.enc.values[2, 1] = float("nan")
        got = assert_same_step(step)
        f = int(step.enc.indices[2, 1])
        assert bool(got[0][f].isnan().all())
        assert int(got[0].isnan().any(1).sum()) == 1
        assert not bool(got[1].isnan().any())
        step.enc.values[2, 1] = 0.0
        step.grad_output[3] = float("inf")
        got = assert_same_step(step)
        assert not bool(got[0].isnan().any())
        # The CPU does not clip by a norm that is not a number.
        assert_same_step(replace(step, clip=0.5))


def test_what_is_out_of_range_takes_no_part() -> None:
    step = replace(make(9, 24, 12, 20, 4, torch.float32).with_rows(), clip=0.5)
    want = step.run(cuda)
    for code in (step.dec, step.enc):
        far = torch.tensor([[-1, 20, 2**31 - 1]] * code.n, dtype=torch.int32)
        code.indices = torch.cat([code.indices, far], 1)
        code.values = torch.cat([code.values, torch.ones(code.n, 3)], 1)
    latents, *rows = step.extra
    bad = torch.tensor([-1, 20], dtype=torch.int32)
    step.extra = [torch.cat([bad, latents]), *(torch.cat([t[:2], t]) for t in rows)]
    assert same(step.run(cuda), want)


def test_offsets_that_lead_nowhere_are_not_followed() -> None:
    step = make(9, 24, 12, 20, 4, torch.float32, "variable")
    for offsets in (step.dec.offsets, step.enc.offsets):
        offsets[3], offsets[5] = -7, 1 << 30
    assert all(bool(t.isfinite().all()) for t in step.run(cuda))


def test_takes_the_arguments_of_the_cpu() -> None:
    step = make(6, 5, 7, 20, 3, torch.float32)
    wrong = {
        "dec": SparseActs(step.dec.values.double(), step.dec.indices, None, 20),
        "enc": SparseActs(step.enc.values[:5], step.enc.indices[:5], None, 20),
        "x": step.x[:, :4],
        "grad_output": step.grad_output[:5],
        "more": [torch.ones(20, 7), None, None, None],
        "centered": True,
    }
    more = [None, torch.ones(20, 5), None, None]
    for change in [{name: value} for name, value in wrong.items()] + [{"more": more}]:
        messages = []
        for module in (cpu, cuda):
            with pytest.raises(RuntimeError, match="sparse_adam_step_: expected") as error:
                replace(step, **change).run(module)
            messages.append(str(error.value).split(", sparse_adam_step_: ")[1])
        assert messages[0] == messages[1], change
