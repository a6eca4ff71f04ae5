"""Encoders that select by magnitude, by group and by effect; scores of latents over a batch."""

from __future__ import annotations

import pytest
import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.testing import assert_close

from fastsae import ops, reference
from tests.ops.test_encode import integers, run, weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def device(encode_device: str) -> str:
    """Every device, in every way that encoders have there."""
    return encode_device


def factors(n, d_out, d_sae, like):
    """Return an integer gradient and decoder, the products of which are exact."""
    grad, W_dec = (torch.randint(-3, 4, (rows, d_out)).to(like) for rows in (n, d_sae))
    return grad, W_dec


def encoders(m, k, grad, W_dec, **options):
    """Return every rule of a module, `ops` or `reference`, as a function of x, W_enc and b_enc."""
    scored = {"grad": grad, "W_dec": W_dec, **options}
    return {
        "absolute": lambda x, W, b: m.encode_topk(x, W, b, k, absolute=True, **options),
        "group_max": lambda x, W, b: m.encode_group_max(x, W, b, k, **options),
        "gradient": lambda x, W, b: m.encode_gradient_topk(x, W, b, k, **scored),
        "weighted": lambda x, W, b: m.encode_gradient_topk(x, W, b, k, beta=2.5, **scored),
        "literal": lambda x, W, b: m.encode_gradient_topk(
            x, W, b, k, beta=0.5, normalize=False, **scored
        ),
    }


RULES = tuple(encoders(ops, 1, None, None))


def same(got, want, what=None):
    assert torch.equal(got.indices, want.indices), what
    assert_close(got.values, want.values, rtol=0, atol=0, equal_nan=True, msg=what)


# n, d_in, d_sae, k: whole panels, odd everything, more than one block of tokens, groups that end
# inside of a tile, candidates that overflow, and both sides of the choice between torch's matmul
# (few rows) and the fused one.
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "k"),
    [
        (64, 16, 3000, 25),
        (131, 7, 2501, 61),
        (1100, 5, 5000, 8),
        (70, 9, 700, 100),
        (80, 4, 9000, 600),
        (66, 1, 13, 13),
        (31, 8, 500, 4),
        (32, 8, 500, 1),
    ],
)
def test_selection_is_exact(isa, n, d_in, d_sae, k) -> None:
    check_selects_exactly(n, d_in, d_sae, k, "cpu")


# The same for the chunks that other devices take: one row, one chunk, and many.
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "k"),
    [(1, 2, 9, 3), (5, 8, 500, 4), (131, 7, 2501, 61), (23, 4, 5000, 625), (66, 1, 13, 13)],
)
def test_chunks_select_exactly(device, n, d_in, d_sae, k) -> None:
    check_selects_exactly(n, d_in, d_sae, k, device)


def check_selects_exactly(n, d_in, d_sae, k, device) -> None:
    x, W, b, _ = integers(n, d_in, d_sae, device)
    c = torch.randint(-2, 3, (d_in,)).to(x)
    grad, W_dec = factors(n, d_in + 2, d_sae, x)
    for dtype in DTYPES:
        inputs = [t.to(dtype) for t in (x, W, b)]
        rest = (grad.to(dtype), W_dec.to(dtype))
        got = encoders(ops, k, *rest, b_dec=c.to(dtype))
        want = encoders(reference, k, *rest, b_dec=c.to(dtype))
        for rule in RULES:
            same(got[rule](*inputs), want[rule](*inputs), f"{rule} {dtype}")
    rounded = encoders(ops, k, grad, W_dec, b_dec=c, compute_dtype=torch.bfloat16)
    for rule, encode in encoders(reference, k, grad, W_dec, b_dec=c).items():
        same(rounded[rule](x, W, b), encode(x, W, b), rule)


def test_magnitude_and_mask(device) -> None:
    x, W, b, _ = integers(200, 6, 4000, device)
    for allowed in (30, 31, 300, 3999):
        mask = torch.zeros(4000, dtype=torch.bool, device=device)
        mask[torch.randperm(4000)[:allowed]] = True
        got = ops.encode_topk(x, W, b, 31, mask=mask, absolute=True)
        same(got, reference.encode_topk(x, W, b, 31, mask=mask, absolute=True), allowed)
        assert (got.values < 0).any()


@pytest.mark.parametrize("n", [100, 20])
def test_bad_rows_stay_alone(device, isa, n) -> None:
    x, W, b, _ = integers(n, 8, 5000, device)
    grad, W_dec = factors(n, 8, 5000, x)
    clean = {rule: f(x, W, b) for rule, f in encoders(ops, 40, grad, W_dec).items()}
    x[3], x[10, 2], x[-1, 0] = float("nan"), float("inf"), float("-inf")
    grad[5, 1], grad[6] = float("nan"), 0
    got, want = encoders(ops, 40, grad, W_dec), encoders(reference, 40, grad, W_dec)
    good = torch.ones(n, dtype=torch.bool)
    good[[3, 5, 6, 10, -1]] = False
    for rule in RULES:
        found = got[rule](x, W, b)
        same(found, want[rule](x, W, b), rule)
        assert torch.equal(found.values[good], clean[rule].values[good])
        assert torch.equal(found.indices[good], clean[rule].indices[good])


def test_group_max_keeps_the_first_nan_and_the_first_of_equals(device, isa) -> None:
    for n in (3, 40):  # torch's matmul, and the fused one
        x = torch.ones(n, 1, device=device)
        W = torch.zeros(12, 1, device=device)
        b = torch.tensor([1, 2, 2, -3, -3, -4, 5, torch.nan, torch.nan, -torch.inf, -0.0, 0.0])
        got = ops.encode_group_max(x, W, b.to(x), 4)
        assert got.indices.tolist() == [[1, 3, 7, 10]] * n
        assert_close(got.values[0].cpu(), torch.tensor([2.0, 0, torch.nan, 0]), equal_nan=True)


@pytest.mark.parametrize("rule", RULES)
def test_a_row_has_the_same_bits_in_every_batch_and_thread_count(rule) -> None:
    x, (W, b, _) = torch.randn(700, 96), weights(6000, 96)
    grad, W_dec = torch.randn(700, 40), torch.randn(6000, 40)
    whole = encoders(ops, 20, grad, W_dec)[rule](x, W, b)
    part = encoders(ops, 20, grad[100:401], W_dec)[rule](x[100:401], W, b)
    assert torch.equal(part.values, whole.values[100:401])
    assert torch.equal(part.indices, whole.indices[100:401])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        same(encoders(ops, 20, grad, W_dec)[rule](x, W, b), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_equal_a_dense_reference(device, isa, rule) -> None:
    x = torch.randn(12, 10, dtype=torch.float64, device=device)
    W, b_enc, b_dec = weights(50, 10, torch.float64, device)
    grad, W_dec = torch.randn(12, 7).to(x), torch.randn(50, 7).to(x)

    def code(module):
        return lambda x, W, b, c: ops.SparseActs(
            *encoders(module, 5, grad, W_dec, b_dec=c)[rule](x, W, b), None, 50
        )

    got, want = (run(code(module), (x, W, b_enc, b_dec)) for module in (ops, reference))
    for name, a, b in zip(("x", "W_enc", "b_enc", "b_dec"), got, want, strict=True):
        assert b.abs().sum() > 0, name
        assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(rule) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    W, b, c = (t.requires_grad_() for t in weights(8, 4, torch.float64))
    grad, W_dec = torch.randn(3, 4).double(), torch.randn(8, 4).double()

    def f(x, W, b, c):
        return encoders(ops, 2, grad, W_dec, b_dec=c)[rule](x, W, b).values

    assert torch.autograd.gradcheck(f, (x, W, b, c), check_forward_ad=True)


def test_what_selects_gets_no_gradient() -> None:
    x, (W, b, _) = torch.randn(5, 4), weights(9, 4)
    grad, W_dec = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    W.requires_grad_()
    values = ops.encode_gradient_topk(x, W, b, 3, grad=grad, W_dec=W_dec).values
    found = torch.autograd.grad(values.sum(), [W, grad, W_dec], allow_unused=True)
    assert found[0].any()
    assert found[1:] == (None, None)


@pytest.mark.parametrize("rule", RULES)
def test_leading_dimensions_and_empty(device, rule) -> None:
    W, b, _ = weights(20, 4, device=device)
    x, grad = torch.randn(2, 3, 4, device=device), torch.randn(2, 3, 6, device=device)
    W_dec = torch.randn(20, 6, device=device)
    got = encoders(ops, 5, grad, W_dec)[rule](x, W, b)
    assert got.values.shape == got.indices.shape == (2, 3, 5)
    flat = encoders(ops, 5, grad.view(6, 6), W_dec)[rule](x.view(6, 4), W, b)
    assert torch.equal(got.values.view(6, 5), flat.values)
    none = encoders(ops, 5, grad.view(6, 6)[:0], W_dec)[rule](x.view(6, 4)[:0], W, b)
    assert none.values.shape == none.indices.shape == (0, 5)


@pytest.mark.parametrize("rule", RULES)
def test_vmap_over_rows_is_one_call(rule) -> None:
    x, (W, b, _) = torch.randn(3, 5, 4), weights(20, 4)
    grad, W_dec = torch.randn(5, 6), torch.randn(20, 6)
    encode = encoders(ops, 5, grad, W_dec)[rule]
    got = torch.vmap(lambda x: encode(x, W, b).values)(x)
    for i in range(3):
        assert_close(got[i], encode(x[i], W, b).values)


def calls(dtype=torch.float32):
    """Return native calls of every op of this file."""
    x, W, b, _ = (t.to(dtype) for t in integers(40, 6, 300))
    grad, W_dec = factors(40, 5, 300, x)
    encoder = (x, W, b, None)
    return [
        ("encode_topk", (*encoder, 5, None, False, True, True)),
        ("encode_group_max", (*encoder, 5, True)),
        ("encode_gradient_topk", (*encoder, grad, W_dec, 5, 0.5, True, False)),
        ("encode_gradient_topk", (*encoder, grad, W_dec, 5, 2.0, False, True)),
        ("latent_scores", (*encoder, False, 200, False)),
    ]


def test_opcheck() -> None:
    for op, arguments in calls():
        x, W, b = (t.clone().requires_grad_() for t in arguments[:3])
        if op == "latent_scores":
            x, W, b = arguments[:3]
        native = getattr(torch.ops.fastsae, op).default
        torch.library.opcheck(native, (x, W, b, *arguments[3:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stand_ins_agree_with_the_kernels(dtype) -> None:
    keys = DispatchKeySet(DispatchKey.CompositeExplicitAutograd)
    for op, arguments in calls(dtype):
        native = getattr(torch.ops.fastsae, op)
        got = native.default.redispatch(keys, *arguments)
        assert_close(got, native(*arguments), rtol=1e-5, atol=1e-5, msg=op)


def test_compiles() -> None:
    x, (W, b, _) = torch.randn(6, 5), weights(20, 5)
    grad, W_dec = torch.randn(6, 3), torch.randn(20, 3)
    rules = encoders(ops, 4, grad, W_dec)

    def f(x):
        scores, threshold = ops.latent_scores(x, W, b, 4)
        return scores.sum() + threshold, [encode(x, W, b).values for encode in rules.values()]

    assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", ["l2", "entropy"])
def test_scores_equal_reference(device, isa, dtype, score) -> None:
    for n, d_in, d_sae, k in ((1, 3, 5, 2), (70, 8, 301, 2.5), (600, 5, 50, 40), (0, 4, 6, 1)):
        x, W, b, _ = (t.to(dtype) for t in integers(n, d_in, d_sae, device))
        c = torch.randint(-2, 3, (d_in,)).to(x)
        W[1], b[1] = 0, -1  # never positive
        got = ops.latent_scores(x, W, b, k, score=score, b_dec=c)
        want = reference.latent_scores(x, W, b, k, score=score, b_dec=c)
        assert_close(got.scores, want.scores, rtol=1e-5, atol=1e-5)
        assert torch.equal(got.threshold, want.threshold)
        assert got.scores.dtype == got.threshold.dtype == want.scores.dtype


def test_the_threshold_of_scores_is_that_of_batch_topk() -> None:
    x, (W, b, c) = torch.randn(700, 96), weights(3000, 96)
    for k in (0, 0.01, 7, 2999):
        want = ops.encode_batch_topk(x, W, b, k, b_dec=c).threshold
        assert torch.equal(ops.latent_scores(x, W, b, k, b_dec=c).threshold, want)


def test_scores_have_the_same_bits_with_any_number_of_threads() -> None:
    x, (W, b, _) = torch.randn(700, 96), weights(3001, 96)
    threads = torch.get_num_threads()
    for score in ("l2", "entropy"):
        found = ops.latent_scores(x, W, b, 7, score=score)
        try:
            torch.set_num_threads(1)
            alone = ops.latent_scores(x, W, b, 7, score=score)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(found.scores, alone.scores)
        assert torch.equal(found.threshold, alone.threshold)


def test_wrong_arguments() -> None:
    x, (W, b, _) = torch.randn(6, 5), weights(20, 5)
    good = {"grad": torch.randn(6, 3), "W_dec": torch.randn(20, 3)}
    with pytest.raises(ValueError, match=r"group_max: expected k to divide d_sae = 20, got k = 3"):
        ops.encode_group_max(x, W, b, 3)
    with pytest.raises(TypeError, match=r"encode_group_max: expected k to be an int, got float"):
        ops.encode_group_max(x, W, b, 2.0)
    for change, error, message in (
        ({"grad": torch.randn(5, 3)}, ValueError, r"expected grad to be \[6, 3\], got \[5, 3\]"),
        ({"grad": None}, TypeError, r"expected grad to be a Tensor, got NoneType"),
        ({"grad": good["grad"].double()}, TypeError, r"expected grad to have the dtype of x"),
        ({"W_dec": torch.randn(3, 20)}, ValueError, r"expected W_dec to be \[d_sae, d_out\]"),
        ({"beta": 0}, ValueError, r"expected 0 < beta < inf, got 0"),
        ({"beta": "1"}, TypeError, r"expected beta to be a number, got str"),
    ):
        with pytest.raises(error, match="encode_gradient_topk: " + message):
            ops.encode_gradient_topk(x, W, b, 3, **(good | change))
    with pytest.raises(ValueError, match=r"expected 1 <= k <= d_sae = 20, got k = 21"):
        ops.encode_gradient_topk(x, W, b, 21, **good)
    with pytest.raises(ValueError, match=r"expected score to be l2 or entropy, got 'l1'"):
        ops.latent_scores(x, W, b, 3, score="l1")
    with pytest.raises(ValueError, match=r"latent_scores: expected a finite k >= 0, got k = -1"):
        ops.latent_scores(x, W, b, -1)
    native = torch.ops.fastsae
    with pytest.raises(RuntimeError, match=r"expected k to divide d_sae = 20, got k = 3"):
        native.encode_group_max(x, W, b, None, 3, False)
    with pytest.raises(RuntimeError, match=r"expected grad to be \[6, 3\], got \[5, 3\]"):
        native.encode_gradient_topk(
            x, W, b, None, good["grad"][:5], good["W_dec"], 3, 1.0, True, False
        )
    with pytest.raises(RuntimeError, match=r"expected 0 < beta < inf, got"):
        native.encode_gradient_topk(x, W, b, None, *good.values(), 3, 0.0, True, False)
