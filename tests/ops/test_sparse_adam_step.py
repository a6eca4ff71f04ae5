"""The feature-major update against autograd and torch.optim.Adam, and against its reference."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fastsae import ops, reference
from fastsae.train.adam_mini import AdamMini
from fastsae.types import LatentGradients, MoreGradients, SparseActs, StepTensors
from tests.ops.inputs import acts as make_acts

SHAPES = ((5, 3, 9, 2), (20, 16, 64, 4), (33, 37, 200, 7), (40, 70, 131, 12))  # n, d, d_sae, k


def make(n, d, d_sae, k, dtype, layout="fixed", device="cpu"):
    """Return arguments of a step; some latents have no entries, some entries are 0."""
    W = torch.randn(d_sae, d, dtype=torch.float64)
    parameters = [torch.randn(d_sae, d), W / W.norm(dim=1, keepdim=True)]
    parameters += [torch.randn(d_sae), torch.randn(d)]
    parameters[1][0] = 0
    m = [0.1 * torch.randn_like(p) for p in parameters]
    v = [0.01 * torch.rand_like(p) for p in parameters]
    move = [[t.to(dtype).to(device) for t in tensors] for tensors in (parameters, m, v)]
    acts = make_acts(n, d_sae, k, dtype, layout, device)
    grad = torch.randn(acts.values.shape).to(dtype).to(device)
    x, error = (torch.randn(n, d).to(dtype).to(device) for _ in range(2))
    return [StepTensors(*tensors) for tensors in move], acts, grad, x, error


def extra_rows(d_sae, d, dtype, device="cpu"):
    latents = torch.randperm(d_sae)[: d_sae // 3].int()
    shapes = ((len(latents), d), (len(latents), d), (len(latents),))
    tensors = [torch.randn(s).to(dtype).to(device) for s in shapes]
    return LatentGradients(latents.to(device), *tensors)


def by_rows(state):
    """Return the same state with one average of squares for each row of the matrices."""
    v = state[2]
    rows = StepTensors(v.W_enc[:, 0].contiguous(), v.W_dec[:, 1].contiguous(), v.b_enc, v.b_dec)
    return [state[0], state[1], rows]


def copies(state):
    return [StepTensors(*(t.clone() for t in tensors)) for tensors in state]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["fixed", "variable"])
@pytest.mark.parametrize("clip", [None, 0.5, 1e9])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("mini", [False, True])
def test_equals_reference_in_float64(device, isa, shape, layout, clip, extra, mini) -> None:
    state, *batch = make(*shape, torch.float64, layout, device)
    state = by_rows(state) if mini else state
    extra_grads = extra_rows(shape[2], shape[1], torch.float64, device) if extra else None
    got, want = copies(state), copies(state)
    options = {"lr": 1e-2, "step": 3, "clip_grad_norm": clip, "extra_grads": extra_grads}
    ops.sparse_adam_step_(*got, *batch, **options)
    reference.sparse_adam_step_(*want, *batch, **options)
    for a, b, before in zip(sum(got, ()), sum(want, ()), sum(state, ()), strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert not torch.equal(a, before)


@pytest.mark.parametrize("shape", [*SHAPES, (33, 48, 200, 7)])
@pytest.mark.parametrize("layout", ["fixed", "variable"])
@pytest.mark.parametrize("mini", [False, True])
def test_rows_rounded_to_bfloat16(device, shape, layout, mini) -> None:
    """A step as exact as bfloat16 rows make it; where it rounds nothing, the same one."""
    state, acts, grad, x, error = make(*shape, torch.float32, layout, device)
    state = by_rows(state) if mini else state
    state[0].b_dec.zero_()
    exact = [t.bfloat16().float() for t in (x, error)]
    for rows, tolerance in (((x, error), 1e-2), (exact, 1e-6)):
        got, want = copies(state), copies(state)
        for tensors, dtype in ((got, torch.bfloat16), (want, None)):
            ops.sparse_adam_step_(*tensors, acts, grad, *rows, lr=1e-2, step=3, compute_dtype=dtype)
        for a, b in zip(sum(got, ()), sum(want, ()), strict=True):
            assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [*SHAPES, (33, 48, 200, 7), (9, 2052, 18, 4), (9, 8200, 18, 4)])
@pytest.mark.parametrize("mini", [False, True])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_copies_are_the_new_matrices(device, isa, shape, mini, unit, own, compute) -> None:
    """Of every kernel: one code and two, wide and not, rows in shared memory and in scratch."""
    state, acts, grad, x, error = make(*shape, torch.float32, "fixed", device)
    state = by_rows(state) if mini else state
    state[0].W_dec[3] = float("nan")  # which stays one
    grad = SparseActs(grad, acts.indices, None, acts.d_sae) if own else grad
    options = {"lr": 1e-2, "step": 3, "clip_grad_norm": 0.5, "unit_norm": unit}
    options |= {"compute_dtype": compute, "apply_b_dec_to_input": not own}
    want = copies(state)
    ops.sparse_adam_step_(*want, acts, grad, x, error, **options)
    for which in ((True, True), (True, False), (False, True)):
        got = copies(state)
        made = [
            torch.full_like(W, 7, dtype=torch.bfloat16) if asked else None
            for W, asked in zip(got[0][:2], which, strict=True)
        ]
        ops.sparse_adam_step_(*got, acts, grad, x, error, **options, copies=tuple(made))
        for a, b in zip(sum(got, ()), sum(want, ()), strict=True):
            assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        for copy, W in zip(made, got[0], strict=False):
            if copy is not None:
                assert_close(copy, W.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_copies_of_the_reference() -> None:
    state, *batch = make(5, 6, 9, 2, torch.float32)
    made = tuple(torch.zeros_like(W, dtype=torch.bfloat16) for W in state[0][:2])
    reference.sparse_adam_step_(*state, *batch, lr=1e-2, step=1, copies=made)
    assert all(torch.equal(c, W.bfloat16()) for c, W in zip(made, state[0], strict=False))


def test_wrong_copies() -> None:
    state, *batch = make(5, 6, 9, 2, torch.float32)
    half = torch.zeros(9, 6, dtype=torch.bfloat16)
    for copy, error, expected in (
        (half[:8], ValueError, r"the copy of W_enc to be like W_enc = \[9, 6\], got \[8, 6\]"),
        (half.half(), TypeError, "the copy of W_enc to be bfloat16, got torch.float16"),
        (half.t().contiguous().t(), RuntimeError, "bf16_W_enc to be contiguous, bfloat16 and"),
        (half.to("meta"), ValueError, "the copy of W_enc on the device of W_enc, cpu, got meta"),
    ):
        with pytest.raises(error, match=f"sparse_adam_step_: expected {expected}"):
            ops.sparse_adam_step_(*state, *batch, lr=1e-2, step=1, copies=(copy, None))
    state, *batch = make(5, 6, 9, 2, torch.float64)
    with pytest.raises(TypeError, match=r"expected float32 parameters with copies, got torch"):
        ops.sparse_adam_step_(*state, *batch, lr=1e-2, step=1, copies=(None, half))


@pytest.mark.parametrize(
    ("dtype", "wrong"), [(torch.float32, torch.float16), (torch.float64, torch.bfloat16)]
)
def test_rows_are_rounded_to_bfloat16_only(dtype, wrong) -> None:
    state, *batch = make(5, 3, 9, 2, dtype)
    before = copies(state)
    with pytest.raises(ValueError, match=rf"expected compute_dtype to be None, .*, got {wrong}"):
        ops.sparse_adam_step_(*state, *batch, lr=1e-2, step=1, compute_dtype=wrong)
    assert all(torch.equal(a, b) for a, b in zip(sum(state, ()), sum(before, ()), strict=True))


def autograd_step(parameters, optimizer, x, k, clip):
    W_enc, W_dec, b_enc, b_dec = parameters
    top = ops.encode_topk(x, W_enc, b_enc, k, b_dec=b_dec)
    values = top.values
    values.retain_grad()
    out = ops.sparse_decode(SparseActs(values, top.indices, None, W_enc.shape[0]), W_dec, b_dec)
    out.retain_grad()
    ((out - x).square().sum() / x.square().sum()).backward()
    g = W_dec.grad
    g -= (g * W_dec).sum(1, keepdim=True) * W_dec
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        W_dec /= W_dec.norm(dim=1, keepdim=True)
    return SparseActs(values.detach(), top.indices, None, W_enc.shape[0]), values.grad, out.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_equals_autograd_and_torch_adam(isa, dtype, tolerance, clip) -> None:
    n, d, d_sae, k = 60, 24, 150, 5
    (parameters, _, _), *_ = make(n, d, d_sae, k, dtype)
    parameters.W_dec[0, 0] = 1
    theirs = [p.clone().requires_grad_() for p in parameters]
    m, v = (StepTensors(*(torch.zeros_like(p) for p in parameters)) for _ in range(2))
    optimizer = torch.optim.Adam(theirs, lr=1e-3, eps=1e-8)
    for step in range(1, 6):
        x = torch.randn(n, d, dtype=dtype)
        for mine, other in zip(parameters, theirs, strict=True):  # one step at a time
            mine.copy_(other.detach())
        acts, grad_values, error = autograd_step(theirs, optimizer, x, k, clip)
        ops.sparse_adam_step_(
            parameters, m, v, acts, grad_values, x, error, lr=1e-3, step=step, clip_grad_norm=clip
        )
        for mine, other in zip(parameters, theirs, strict=True):
            assert_close(mine, other.detach(), rtol=0, atol=tolerance)
        for mine, other in zip(m, theirs, strict=True):
            assert_close(mine, optimizer.state[other]["exp_avg"], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_one_average_for_each_row_equals_autograd_and_adam_mini(isa, dtype, tolerance, clip):
    n, d, d_sae, k = 60, 24, 150, 5
    (parameters, _, _), *_ = make(n, d, d_sae, k, dtype)
    parameters.W_dec[0, 0] = 1
    theirs = [p.clone().requires_grad_() for p in parameters]
    m, v = (StepTensors(*(torch.zeros_like(p) for p in parameters)) for _ in range(2))
    v = by_rows([parameters, m, v])[2]
    optimizer = AdamMini(theirs, lr=1e-3, betas=(0.8, 0.99))
    for step in range(1, 6):
        x = torch.randn(n, d, dtype=dtype)
        for mine, other in zip(parameters, theirs, strict=True):  # one step at a time
            mine.copy_(other.detach())
        acts, grad_values, error = autograd_step(theirs, optimizer, x, k, clip)
        options = {"lr": 1e-3, "step": step, "betas": (0.8, 0.99), "clip_grad_norm": clip}
        ops.sparse_adam_step_(parameters, m, v, acts, grad_values, x, error, **options)
        for mine, other in zip(parameters, theirs, strict=True):
            assert_close(mine, other.detach(), rtol=0, atol=tolerance)
        for mine, other in zip(v, theirs, strict=True):
            assert_close(mine, optimizer.state[other]["exp_avg_sq"], rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("mini", [False, True])
def test_bitwise_the_same_for_every_number_of_threads(mini) -> None:
    state, *batch = make(300, 48, 1000, 20, torch.float32)
    state = by_rows(state) if mini else state
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            got = copies(state)
            ops.sparse_adam_step_(*got, *batch, lr=1e-3, step=1, clip_grad_norm=0.1)
            results.append(sum(got, ()))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_empty_batch_still_moves_by_the_averages() -> None:
    state, *_ = make(4, 6, 10, 2, torch.float64)
    empty = SparseActs(torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, 2).int(), None, 10)
    nothing = torch.zeros(0, 6, dtype=torch.float64)
    got, want = copies(state), copies(state)
    for module, tensors in ((ops, got), (reference, want)):
        module.sparse_adam_step_(*tensors, empty, empty.values, nothing, nothing, lr=1e-2, step=2)
    for a, b in zip(sum(got, ()), sum(want, ()), strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)


def number(x, dtype, device="cpu"):
    return torch.tensor(x, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("mini", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 1000, 123_456])
def test_rate_and_step_as_tensors_give_the_same_bits(device, dtype, clip, mini, own, count) -> None:
    state, acts, grad, x, error = make(20, 16, 64, 4, dtype, device=device)
    state = by_rows(state) if mini else state
    entries = SparseActs(grad, acts.indices, acts.offsets, acts.d_sae) if own else grad
    numbers = (
        (3e-3, count),
        (number(3e-3, torch.float64, device), number(count, torch.int64, device)),
    )
    found = []
    for lr, step in (numbers[0], numbers[1], (numbers[0][0], numbers[1][1])):
        found.append(copies(state))
        ops.sparse_adam_step_(
            *found[-1], acts, entries, x, error, lr=lr, step=step, clip_grad_norm=clip
        )
    flat = [[t for tensors in state for t in tensors] for state in found]
    for given in zip(*flat, strict=True):
        assert all(torch.equal(given[0], t) for t in given[1:])
    assert not torch.equal(found[0][0].W_enc, state[0].W_enc)


def test_tensors_are_read_when_the_step_is_done() -> None:
    """The same call again, with other numbers in its tensors: what a replayed step is."""
    state, *batch = make(20, 16, 64, 4, torch.float64)
    lr, step = number(0.0, torch.float64), number(0, torch.int64)
    got, want = copies(state), copies(state)
    for i in range(1, 5):
        lr.fill_(1e-2 / i)
        step.add_(1)
        ops.sparse_adam_step_(*got, *batch, lr=lr, step=step)
        ops.sparse_adam_step_(*want, *batch, lr=1e-2 / i, step=i)
    assert torch.equal(got[0].W_dec, want[0].W_dec)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_below_step_one_nothing_is_updated(device, own, count, value) -> None:
    state, acts, grad, x, error = make(20, 16, 64, 4, torch.float32, device=device)
    entries = SparseActs(grad, acts.indices, acts.offsets, acts.d_sae) if own else grad
    before = copies(state)
    ops.sparse_adam_step_(
        *state,
        acts,
        entries,
        x * value,
        error * value,
        lr=1e-2,
        step=number(count, torch.int64, device),
        clip_grad_norm=0.5,
    )
    for one, other in zip(before, state, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_adams_constants_to_the_last_bits() -> None:
    """One parameter with gradient 1 at step t, in float64, against exact fractions."""
    from fractions import Fraction

    for count in (1, 7, 100, 5_000):
        state = [
            StepTensors(*(torch.zeros(s).double() for s in ((1, 1), (1, 1), (1,), (1,))))
            for _ in range(3)
        ]
        acts = SparseActs(torch.ones(1, 1).double(), torch.zeros(1, 1).int(), None, 1)
        one = torch.ones(1, 1).double()
        ops.sparse_adam_step_(
            *state, acts, one, 0 * one, one, lr=1.0, step=count, unit_norm=False, eps=0.0
        )
        corrections = [1 - Fraction(beta) ** count for beta in (0.9, 0.999)]
        squared = (
            (1 - Fraction(0.9)) ** 2 / corrections[0] ** 2 * corrections[1] / (1 - Fraction(0.999))
        )
        want = float(squared) ** 0.5
        assert abs(-float(state[0].b_enc) / want - 1) < 1e-14


def test_rows_of_the_decoder_have_norm_one_and_zero_rows_stay() -> None:
    state, *batch = make(8, 12, 30, 3, torch.float32)
    state[0].W_dec[7] = 0
    state[1].W_dec[7] = 0
    batch[0].indices[batch[0].indices == 7] = 8
    ops.sparse_adam_step_(*state, *batch, lr=1e-2, step=1)
    norm = state[0].W_dec.norm(dim=1)
    assert norm[7] == 0
    norm[7] = 1
    assert_close(norm, torch.ones(30))


def test_opcheck() -> None:
    state, acts, grad, x, error = make(6, 5, 20, 3, torch.float32)
    entries = (acts.values, acts.indices, None, error, grad, None, None, x)
    rows = extra_rows(20, 5, torch.float32)
    more = (*(torch.randn_like(p) for p in state[0]), torch.ones(2, dtype=torch.float64))
    rest = (1e-3, 0.9, 0.999, 1e-8, 1, 0.5, True, True, False)
    op = torch.ops.fastsae.sparse_adam_step_.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (*sum(state, ()), *entries, *rows, *more, *rest), test_utils=tests)
    mini = (*sum(by_rows(state), ()), *entries, *rows, *more, *rest)
    torch.library.opcheck(op, mini, test_utils=tests)
    own = (*entries[:5], acts.indices, None, x)
    torch.library.opcheck(op, (*sum(state, ()), *own, *[None] * 9, *rest), test_utils=tests)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("mini", [False, True])
@pytest.mark.parametrize("extra", [False, True])
def test_a_decoder_of_another_width_and_codes_of_their_own(isa, own, clip, mini, extra) -> None:
    """What transcoders, skip connections and losses of several decodes leave."""
    n, d_in, d_out, d_sae = 30, 14, 9, 50
    encoder, decoder = (make(n, d, d_sae, 4, torch.float64) for d in (d_in, d_out))
    mixed = zip(encoder[0], decoder[0], strict=True)
    state = [StepTensors(e.W_enc, d.W_dec, e.b_enc, d.b_dec) for e, d in mixed]
    state = by_rows(state) if mini else state
    acts, grad_output = decoder[1], decoder[4]
    grad_values, x = encoder[2], encoder[3]
    if own:
        grad_values = make_acts(3 * n, d_sae, 2, torch.float64, "variable", "cpu")
        x = torch.randn(3 * n, d_in, dtype=torch.float64)
    more = MoreGradients(*(torch.randn_like(p) for p in state[0]))
    latents = torch.randperm(d_sae)[:7].int()
    rows = (torch.randn(7, *p.shape[1:], dtype=torch.float64) for p in state[0][:3])
    options = {
        "lr": 1e-2,
        "step": 2,
        "clip_grad_norm": clip,
        "extra_grads": LatentGradients(latents, *rows) if extra else None,
        "more_grads": more,
        "apply_b_dec_to_input": False,
        "other_squared": torch.tensor(30.0, dtype=torch.float64),
    }
    got, want = copies(state), copies(state)
    factors = [
        module.sparse_adam_step_(*tensors, acts, grad_values, x, grad_output, **options)
        for module, tensors in ((ops, got), (reference, want))
    ]
    assert_close(*factors, rtol=1e-12, atol=1e-12)
    assert (float(factors[0]) < 0.1) == (clip is not None)
    for a, b, before in zip(sum(got, ()), sum(want, ()), sum(state, ()), strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert not torch.equal(a, before)


@pytest.mark.parametrize("own", [False, True])
def test_more_gradients_of_whole_parameters(isa, own) -> None:
    """They are added to what the entries give, and that of b_dec to the encoder's share."""
    state, acts, grad, x, error = make(12, 6, 40, 3, torch.float64)
    more = MoreGradients(*(torch.randn_like(p) for p in state[0]))
    got, want = copies(state), copies(state)
    given = SparseActs(grad, acts.indices, None, acts.d_sae) if own else grad
    ops.sparse_adam_step_(*got, acts, given, x, error, lr=1e-2, step=1, more_grads=more)
    reference.sparse_adam_step_(*want, acts, given, x, error, lr=1e-2, step=1, more_grads=more)
    for a, b in zip(sum(got, ()), sum(want, ()), strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_wrong_arguments() -> None:
    state, acts, grad, x, error = make(6, 5, 20, 3, torch.float32)
    step = ops.sparse_adam_step_
    with pytest.raises(ValueError, match=r"expected x to be \[n, d_in\] = \[6, 5\], got \[5, 5\]"):
        step(*state, acts, grad, x[:5], error, lr=1e-3, step=1)
    with pytest.raises(ValueError, match=r"sparse_adam_step_: expected step >= 1, got 0"):
        step(*state, acts, grad, x, error, lr=1e-3, step=0)
    with pytest.raises(ValueError, match=r"expected clip_grad_norm > 0 or None, got 0"):
        step(*state, acts, grad, x, error, lr=1e-3, step=1, clip_grad_norm=0)
    with pytest.raises(TypeError, match=r"expected x to have the dtype of W_enc, torch.float32"):
        step(*state, acts, grad, x.double(), error, lr=1e-3, step=1)
    mixed = [*state[:2], state[2]._replace(W_enc=state[2].b_enc)]
    with pytest.raises(
        ValueError, match=r"exp_avg_sq.W_dec to be \[d_sae\] = \[20\], got \[20, 5\]"
    ):
        step(*mixed, acts, grad, x, error, lr=1e-3, step=1)
    wrong = MoreGradients(b_enc=torch.ones(19))
    with pytest.raises(ValueError, match=r"more_grads.b_enc to be like b_enc = \[20\], got \[19\]"):
        step(*state, acts, grad, x, error, lr=1e-3, step=1, more_grads=wrong)
    with pytest.raises(TypeError, match=r"other_squared to be float64, got torch.float32"):
        step(*state, acts, grad, x, error, lr=1e-3, step=1, other_squared=torch.ones(()))
    half = StepTensors(*(t.bfloat16() for t in state[0]))
    with pytest.raises(TypeError, match=r"expected W_enc to be float32 or float64, got torch.bflo"):
        step(half, *state[1:], acts, grad, x, error, lr=1e-3, step=1)
    acts.indices[0, 0] = 20
    with pytest.raises(RuntimeError, match=r"expected 0 <= indices < d_sae = 20, got 20"):
        step(*state, acts, grad, x, error, lr=1e-3, step=1)


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        (
            {"lr": number(1e-3, torch.float32)},
            TypeError,
            "lr to be torch.float64, got torch.float32",
        ),
        ({"step": number(1, torch.int32)}, TypeError, "step to be torch.int64, got torch.int32"),
        ({"lr": torch.zeros(1).double()}, ValueError, r"lr to be \[\]"),
        (
            {"step": torch.zeros((), dtype=torch.int64, device="meta")},
            ValueError,
            "step on the device",
        ),
    ],
)
def test_wrong_tensors_for_numbers(named, error, message) -> None:
    state, *batch = make(5, 3, 9, 2, torch.float32)
    with pytest.raises(error, match=f"sparse_adam_step_: expected {message}"):
        ops.sparse_adam_step_(*state, *batch, **{"lr": 1e-3, "step": 1, **named})
