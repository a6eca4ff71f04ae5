"""Adam's averages in bfloat16: the random bits, what they do on the mean, and equal bits of every
implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fastsae import ops, reference
from fastsae.reference.dither import dither, round_stochastically
from fastsae.types import MoreGradients, SparseActs, StepTensors
from tests.ops.test_sparse_adam_step import by_rows, copies, extra_rows, make

BF16 = torch.bfloat16


def bits_by_numpy(rows, columns, seed, step, matrix):
    """The generator of csrc/dither.h once more, in unsigned numpy."""

    def mixed(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    with np.errstate(over="ignore"):
        golden = np.uint64(0x9E3779B97F4A7C15)
        whole = mixed(mixed(np.uint64(seed % 2**64) + golden) + np.uint64(step) * golden)
        key = mixed(whole + (2 * np.arange(rows, dtype=np.uint64) + np.uint64(matrix)) * golden)
        low, high = (key & np.uint64(2**32 - 1)).astype(np.uint32), (key >> np.uint64(32))
        x = np.arange(columns, dtype=np.uint32) ^ low[:, None]
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B) ^ high.astype(np.uint32)[:, None]
        x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return x ^ (x >> np.uint32(16))


@pytest.mark.parametrize("where", [(5, 7, 0, 1, 0), (40, 300, 7 << 16, 12345, 1), (3, 2, -1, 9, 1)])
def test_bits_of_the_generator(where) -> None:
    assert np.array_equal(dither(*where).numpy().astype(np.uint32), bits_by_numpy(*where))


def test_bits_look_random() -> None:
    """Every bit is set half of the time, and neither halves, neighbors, rows, matrices, steps nor
    seeds go together."""
    base = dither(256, 512, 3, 5, 0)
    n = base.numel()
    for bit in range(32):
        share = ((base >> bit) & 1).double().mean()
        assert abs(share - 0.5) < 5 * 0.5 / n**0.5

    def unit(x):
        return (x.double() - 32767.5) / (65536 / 12**0.5)

    low = unit(base & 0xFFFF)
    others = [base >> 16]
    for seed, step, matrix in ((4, 5, 0), (3, 6, 0), (3, 5, 1), (3 << 16, 5, 0)):
        other = dither(256, 512, seed, step, matrix)
        others += [other & 0xFFFF, other >> 16]
    others += [low_of.roll(1, axis) for low_of in (base & 0xFFFF,) for axis in (0, 1)]
    for other in others:
        assert abs(float((low * unit(other)).mean())) < 5 / n**0.5
    assert len(torch.unique(base)) > n - 10  # hardly one comes twice


def test_rounding_is_right_on_the_mean() -> None:
    x = torch.randn(1, 400) * torch.logspace(-30, 30, 400)
    x[0, :4] = torch.tensor([0.0, -0.0, 1.0, -2.5])  # which bfloat16 holds
    seeds, total = 1000, torch.zeros(2, 400, dtype=torch.float64)
    for seed in range(seeds):
        noise = dither(1, 400, seed, 1, 0)
        for i, half in enumerate((noise & 0xFFFF, noise >> 16)):
            total[i] += round_stochastically(x, half)[0].double()
    ulp = 2.0 ** (x.abs().log2().floor() - 7).double()
    error = (total / seeds - x.double()) / ulp
    assert torch.equal(total[:, :4] / seeds, x[:, :4].double().expand(2, -1))
    assert error[:, 4:].abs().max() < 5 * 0.5 / seeds**0.5
    nearest = (x.bfloat16().double() - x.double()) / ulp
    assert nearest[:, 4:].abs().max() > 0.4  # which rounding to nearest is off by, on the mean too


def test_what_has_no_place_between_two_numbers() -> None:
    most = 0xFFFF
    inf, largest = float("inf"), 3.4028234e38
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for noise in (0, most):
        rounded = round_stochastically(nans, torch.full((3,), noise))
        assert bool(rounded.isnan().all())
    x = torch.tensor([inf, -inf, largest, 1e-45, 0.0])
    up = round_stochastically(x, torch.full((5,), most)).float()
    assert up[:3].tolist() == [inf, -inf, inf]
    assert up[3] == torch.tensor(0x10000, dtype=torch.int32).view(torch.float32)
    assert up[4] == 0
    down = round_stochastically(x, torch.zeros(5, dtype=torch.long)).float()
    assert down[2].isfinite()
    assert down[3] == 0


def exact(n, d, d_sae, k, layout, device):
    """A step whose gradients and averages float32 holds exactly, summed in any order."""
    state, acts, grad, x, error = make(n, d, d_sae, k, torch.float32, layout, device)
    W_dec = torch.eye(max(d, d_sae), device=device)[:d_sae, :d].contiguous()
    state[0] = state[0]._replace(W_dec=W_dec, b_dec=torch.zeros_like(state[0].b_dec))

    def few(t, most, unit):
        return (torch.randint(-most, most + 1, t.shape) * unit).to(t)

    acts.values.copy_(torch.where(acts.values != 0, few(acts.values, 1, 0.5) + 0.25, 0.0))
    m, v = (
        state[i]._replace(
            W_enc=few(state[0].W_enc, 127, 2**-7).to(BF16), W_dec=few(W_dec, 127, 2**-7).to(BF16)
        )
        for i in (1, 2)
    )
    v = v._replace(W_enc=v.W_enc.abs(), W_dec=v.W_dec.abs())
    rows = few(grad, 3, 0.5), few(x, 4, 0.25), few(error, 4, 0.25)
    return [state[0], m, v], acts, *rows


@pytest.mark.parametrize(
    "shape", [(5, 3, 9, 2), (33, 37, 200, 7), (20, 48, 70, 4), (9, 2052, 18, 4)]
)
@pytest.mark.parametrize("layout", ["fixed", "variable"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("extra", [False, True])
def test_bits_are_those_of_the_reference(device, isa, shape, layout, own, extra) -> None:
    """Of averages, which follow from exact gradients: scalar, AVX2, AVX-512, CUDA, torch."""
    state, acts, grad, x, error = exact(*shape, layout, device)
    grad = SparseActs(grad, acts.indices, acts.offsets, acts.d_sae) if own else grad
    rows = extra_rows(shape[2], shape[1], torch.float32, device) if extra else None
    if rows is not None:
        rows = type(rows)(rows.latents, *((t * 4).round() / 4 for t in rows[1:]))
    for seed, step in ((0, 1), (5 << 16 | 3, 1000)):
        options = {"lr": 1e-2, "step": step, "betas": (0.5, 0.875), "extra_grads": rows}
        options |= {"rounding_seed": seed, "compute_dtype": torch.bfloat16}
        got, want, other = copies(state), copies(state), copies(state)
        ops.sparse_adam_step_(*got, acts, grad, x, error, **options)
        compute = options.pop("compute_dtype")
        reference.sparse_adam_step_(*want, acts, grad, x, error, **options)
        for i in (1, 2):
            for name in ("W_enc", "W_dec"):
                a, b = (getattr(tensors[i], name) for tensors in (got, want))
                assert a.dtype == BF16
                assert torch.equal(a, b), (i, name)
        for a, b in zip(got[0], want[0], strict=True):
            assert_close(a, b, rtol=1e-5, atol=1e-6)
        options |= {"rounding_seed": seed + 1, "compute_dtype": compute}
        ops.sparse_adam_step_(*other, acts, grad, x, error, **options)
        if shape[1] > 3:  # else there may be nothing to round
            assert not torch.equal(other[1].W_enc, got[1].W_enc)
        for a, b in zip(got[0], other[0], strict=True):  # moved by what was not rounded yet
            assert torch.equal(a, b)


def test_more_gradients_and_a_decoder_of_another_width(device, isa) -> None:
    encoder, decoder = (exact(12, d, 30, 3, "fixed", device) for d in (7, 12))
    state = [
        StepTensors(e.W_enc, d.W_dec, e.b_enc, d.b_dec)
        for e, d in zip(encoder[0], decoder[0], strict=True)
    ]
    more = MoreGradients(*((4 * torch.randn_like(p)).round() / 4 for p in state[0]))
    options = {"lr": 1e-2, "step": 4, "betas": (0.5, 0.875), "more_grads": more}
    options |= {"apply_b_dec_to_input": False, "rounding_seed": 2}
    got, want = copies(state), copies(state)
    for module, tensors in ((ops, got), (reference, want)):
        module.sparse_adam_step_(
            *tensors, decoder[1], encoder[2], encoder[3], decoder[4], **options
        )
    for i in (1, 2):
        assert torch.equal(got[i].W_enc, want[i].W_enc)
        assert torch.equal(got[i].W_dec, want[i].W_dec)


def test_bits_for_every_number_of_threads() -> None:
    state, *batch = exact(300, 48, 1000, 20, "fixed", "cpu")
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            got = copies(state)
            ops.sparse_adam_step_(*got, *batch, lr=1e-3, step=1, clip_grad_norm=0.1)
            found.append(sum(got, ()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_second_average_neither_freezes_nor_vanishes(device, isa) -> None:
    """With beta2 = 0.999 a step changes it by less than half a unit in the last place."""
    n, d, d_sae = 1, 64, 8
    p = StepTensors(
        torch.zeros(d_sae, d), torch.zeros(d_sae, d), torch.zeros(d_sae), torch.zeros(d)
    )
    m, v = (p._replace(W_enc=p.W_enc.to(BF16), W_dec=p.W_dec.to(BF16)) for _ in range(2))
    m, v = (StepTensors(*(t.clone().to(device) for t in tensors)) for tensors in (m, v))
    p = StepTensors(*(t.to(device) for t in p))
    v.W_enc.fill_(1)
    nearest_falls, nearest_rises = torch.tensor(1.0).to(BF16), torch.tensor(0.5).to(BF16)
    v.W_dec.fill_(0.5)
    none = torch.zeros(n, 1, device=device)
    acts = SparseActs(none, none.int(), None, d_sae)
    rows = torch.zeros(n, d, device=device)
    one = MoreGradients(W_dec=torch.ones_like(p.W_dec))
    for step in range(1, 401):
        ops.sparse_adam_step_(
            p, m, v, acts, none, rows, rows, lr=1e-9, step=step, more_grads=one, unit_norm=False,
            apply_b_dec_to_input=False,
        )  # fmt: skip
        p.W_dec.zero_()  # nothing to project on
        nearest_falls = (nearest_falls.float() * 0.999).to(BF16)
        nearest_rises = (nearest_rises.float() * 0.999 + 0.001).to(BF16)
    assert nearest_falls == 1
    assert nearest_rises == 0.5
    for average, exact_one in ((v.W_enc, 0.999**400), (v.W_dec, 1 - 0.5 * 0.999**400)):
        numbers = average.double().flatten()
        assert abs(float(numbers.mean()) - exact_one) < 5 * float(numbers.std()) / 512**0.5
        assert float(numbers.std()) < 0.1


def test_opcheck() -> None:
    state, acts, grad, x, error = exact(6, 5, 20, 3, "fixed", "cpu")
    entries = (acts.values, acts.indices, None, error, grad, None, None, x)
    rest = (1e-3, 0.9, 0.999, 1e-8, 1, 0.5, True, True, False, None, None, None, None, 7)
    op = torch.ops.fastsae.sparse_adam_step_.default
    call = (*sum(state, ()), *entries, *[None] * 9, *rest)
    torch.library.opcheck(op, call, test_utils=("test_schema", "test_faketensor"))


def test_wrong_averages() -> None:
    state, acts, grad, x, error = exact(6, 5, 20, 3, "fixed", "cpu")

    def step(*changed):
        ops.sparse_adam_step_(*changed, acts, grad, x, error, lr=1e-3, step=1)

    p, m, v = state
    wide = m.W_enc.float()
    with pytest.raises(
        TypeError, match=r"exp_avg_sq.W_dec to have the dtype of exp_avg.W_enc, tor"
    ):
        step(p, m, v._replace(W_dec=wide))
    with pytest.raises(TypeError, match=r"exp_avg.W_dec to have the dtype of W_enc, torch.float32"):
        step(p, m._replace(W_enc=wide), v)
    with pytest.raises(TypeError, match=r"expected float32 parameters and squares of every number"):
        step(*by_rows([p, m, v]))
    with pytest.raises(TypeError, match=r"exp_avg.b_enc to have the dtype of W_enc, torch.float32"):
        step(p, m._replace(b_enc=m.b_enc.to(BF16)), v)
    op = torch.ops.fastsae.sparse_adam_step_
    entries = (acts.values, acts.indices, None, error, grad, None, None, x)
    rest = (*[None] * 9, 1e-3, 0.9, 0.999, 1e-8, 1, 0.5, True, True, False)
    for changed in (v._replace(W_dec=wide), v._replace(W_enc=v.W_enc[:, 0].contiguous())):
        with pytest.raises(RuntimeError, match=r"sparse_adam_step_: expected .* bfloat16"):
            op(*p, *m, *changed, *entries, *rest)
