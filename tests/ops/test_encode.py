"""The encode ops: selection, masks, chunks, and gradients against a dense reference."""

from __future__ import annotations

import pytest
import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.testing import assert_close

from fastsae import _library, ops, reference

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture
def device(encode_device: str) -> str:
    """Every device, in every way that encoders have there."""
    return encode_device


def weights(d_sae: int, d_in: int, dtype=torch.float32, device="cpu"):
    W = torch.randn(d_sae, d_in, dtype=torch.float64) / d_in**0.5
    return (
        W.to(dtype).to(device),
        (0.1 * torch.randn(d_sae, dtype=torch.float64)).to(dtype).to(device),
        (0.1 * torch.randn(d_in, dtype=torch.float64)).to(dtype).to(device),
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_topk_equals_reference(device, isa, dtype, relu, bias) -> None:
    for n, d_in, d_sae, k in ((1, 1, 1, 1), (7, 5, 33, 33), (20, 48, 700, 9)):
        x = torch.randn(n, d_in, dtype=torch.float64).to(dtype).to(device)
        W, b_enc, b_dec = weights(d_sae, d_in, dtype, device)
        b_enc, b_dec = (b_enc, b_dec) if bias else (None, None)
        got = ops.encode_topk(x, W, b_enc, k, b_dec=b_dec, relu=relu)
        # Compared as dense matrices: two nearly equal entries may swap by rounding.
        want = reference.encode_topk(x, W, b_enc, k, b_dec=b_dec, relu=relu)
        tol = TOLERANCE[dtype]
        a = ops.SparseActs(got.values, got.indices, None, d_sae).to_dense()
        b = ops.SparseActs(want.values, want.indices, None, d_sae).to_dense()
        wrong = ((a - b).abs() > tol * (1 + b.abs())).sum().item()
        assert wrong <= (0 if dtype in (torch.float32, torch.float64) else 0.02 * n * k)
        assert (got.indices.diff(dim=-1) > 0).all()


def test_selection_is_exact_for_its_pre_activations(isa) -> None:
    # Integers: every sum is exact, so ties are real and the result is one bit pattern.
    x = torch.randint(-3, 4, (40, 16)).float()
    W = torch.randint(-3, 4, (3000, 16)).float()
    b = torch.randint(-3, 4, (3000,)).float()
    got = ops.encode_topk(x, W, b, 25)
    want = reference.topk(x @ W.t() + b, 25)
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.values, want.values.relu())
    acts, threshold = ops.encode_batch_topk(x, W, b, 12.5)
    ref = reference.batch_topk(x @ W.t() + b, 12.5)
    assert torch.equal(acts.indices, ref.acts.indices)
    assert torch.equal(acts.values, ref.acts.values)
    assert torch.equal(acts.offsets, ref.acts.offsets)
    assert torch.equal(threshold, ref.threshold)
    theta = torch.tensor(20.0)
    kept = ops.encode_threshold(x, W, b, theta, 4000)
    ref_kept = reference.threshold_select(x @ W.t() + b, theta, 4000)
    assert torch.equal(kept.indices, ref_kept.indices)
    assert torch.equal(kept.offsets, ref_kept.offsets)


def integers(n, d_in, d_sae, device="cpu"):
    """Return inputs whose products are exact in every order, with many ties."""
    x = torch.randint(-3, 4, (n, d_in)).float().to(device)
    W = torch.randint(-3, 4, (d_sae, d_in)).float().to(device)
    b = torch.randint(-3, 4, (d_sae,)).float().to(device)
    return x, W, b, x @ W.t() + b


# n, d_in, d_sae, k: whole panels, odd everything, more than one block of tokens, every latent a
# seed, more seeds than the least, candidates that overflow, and both sides of the choice between
# torch's matmul (few rows) and the fused one.
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "k"),
    [
        (64, 16, 3000, 25),
        (131, 7, 2501, 3),
        (1100, 5, 5000, 8),
        (70, 9, 700, 100),
        (80, 4, 9001, 600),
        (64, 3, 40_000, 1000),
        (66, 1, 13, 13),
        (31, 8, 500, 4),
        (32, 8, 500, 4),
    ],
)
def test_blocks_of_tokens_select_exactly(isa, n, d_in, d_sae, k) -> None:
    check_selects_exactly(*integers(n, d_in, d_sae), k)


# The same for the chunks that other devices take: one row, one chunk, and many.
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "k"),
    [(1, 2, 9, 4), (5, 8, 500, 4), (131, 7, 2501, 3), (23, 4, 5001, 600), (66, 1, 13, 13)],
)
def test_chunks_select_exactly(device, n, d_in, d_sae, k) -> None:
    check_selects_exactly(*integers(n, d_in, d_sae, device), k)


def check_selects_exactly(x, W, b, pre, k) -> None:
    n, d_sae = pre.shape
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        got = ops.encode_topk(x.to(dtype), W.to(dtype), b.to(dtype), k, relu=False)
        want = reference.topk(pre, k)
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.values, want.values.to(dtype))
    got = ops.encode_topk(x, W, b, k, relu=False, compute_dtype=torch.bfloat16)
    assert torch.equal(got.indices, want.indices)
    ref = reference.batch_topk(pre, k)
    for threshold_guess in (None, ref.threshold, ref.threshold * 100, pre.new_tensor(float("nan"))):
        acts, threshold = ops.encode_batch_topk(x, W, b, k, threshold_guess=threshold_guess)
        assert torch.equal(threshold, ref.threshold)
        assert torch.equal(acts.offsets, ref.acts.offsets)
        assert torch.equal(acts.indices, ref.acts.indices)
        assert torch.equal(acts.values, ref.acts.values)
    for theta in (ref.threshold, pre.new_tensor(-2.0), torch.randint(0, 9, (d_sae,)).to(pre)):
        kept = ops.encode_threshold(x, W, b, theta, 2 * n * k)
        ref_kept = reference.threshold_select(pre, theta, 2 * n * k)
        assert torch.equal(kept.offsets, ref_kept.offsets)
        assert torch.equal(kept.indices, ref_kept.indices)
        assert torch.equal(kept.values, ref_kept.values)


def test_blocks_of_tokens_and_masks(device) -> None:
    x, W, b, pre = integers(200, 6, 4000, device)
    for allowed in (30, 31, 300, 3999):
        mask = torch.zeros(4000, dtype=torch.bool, device=device)
        mask[torch.randperm(4000)[:allowed]] = True
        got = ops.encode_topk(x, W, b, 31, mask=mask, relu=False)
        want = reference.encode_topk(x, W, b, 31, mask=mask, relu=False)
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.values, want.values)
        acts, threshold = ops.encode_batch_topk(x, W, b, 7, mask=mask)
        ref = reference.batch_topk(pre.masked_fill(~mask, -1.0), 7)
        assert torch.equal(acts.indices, ref.acts.indices)
        assert torch.equal(threshold, ref.threshold)


def test_blocks_of_tokens_and_b_dec(device) -> None:
    x, W, b, _ = integers(150, 9, 3000, device)
    c = torch.randint(-2, 3, (9,)).to(x)
    want = reference.encode_topk(x, W, b, 10, b_dec=c)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        arguments = (t.to(dtype) for t in (x, W, b))
        got = ops.encode_topk(*arguments, 10, b_dec=c.to(dtype))
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.values, want.values.to(dtype))


def test_bad_rows_in_a_block_stay_alone(device, isa) -> None:
    x, W, b, _ = integers(100, 8, 5000, device)
    clean = ops.encode_topk(x, W, b, 40)
    x[3], x[50, 2], x[99, 0] = float("nan"), float("inf"), float("-inf")
    got = ops.encode_topk(x, W, b, 40)
    good = torch.ones(100, dtype=torch.bool)
    good[[3, 50, 99]] = False
    assert torch.equal(got.values[good], clean.values[good])
    assert torch.equal(got.indices[good], clean.indices[good])
    assert got.values[3].isnan().all()
    assert torch.equal(got.indices[3], torch.arange(40, dtype=torch.int32, device=device))


def test_a_row_has_the_same_bits_in_every_batch_and_thread_count() -> None:
    x, (W, b, c) = torch.randn(700, 96), weights(6000, 96)
    whole = ops.encode_topk(x, W, b, 20, b_dec=c)
    part = ops.encode_topk(x[100:401], W, b, 20, b_dec=c)
    assert torch.equal(part.values, whole.values[100:401])
    assert torch.equal(part.indices, whole.indices[100:401])
    threads = torch.get_num_threads()
    batch = ops.encode_batch_topk(x, W, b, 20, b_dec=c)
    try:
        torch.set_num_threads(1)
        alone = ops.encode_topk(x, W, b, 20, b_dec=c)
        batch_alone = ops.encode_batch_topk(x, W, b, 20, b_dec=c)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone.values, whole.values)
    assert torch.equal(alone.indices, whole.indices)
    assert torch.equal(batch_alone.acts.values, batch.acts.values)
    assert torch.equal(batch_alone.acts.indices, batch.acts.indices)


def test_bfloat16_product_is_close() -> None:
    x, (W, b, c) = torch.randn(300, 200), weights(4000, 200)
    exact = ops.encode_topk(x, W, b, 16, b_dec=c)
    got = ops.encode_topk(x, W, b, 16, b_dec=c, compute_dtype=torch.bfloat16)
    rounded = reference.encode_topk((x - c).bfloat16().float(), W.bfloat16().float(), b, 16)
    same = (got.indices == (rounded if _library.has_bf16() else exact).indices).all(1)
    assert same.float().mean() > 0.97  # the order of a sum may swap two nearly equal latents
    assert_close(got.values.sort().values, exact.values.sort().values, rtol=0, atol=0.03)
    assert got.values.dtype == torch.float32


@pytest.mark.parametrize("allowed", [0, 1, 5, 30])
def test_mask(device, allowed) -> None:
    n, d_in, d_sae, k = 9, 6, 40, 5
    x = torch.randn(n, d_in, device=device)
    W, b_enc, b_dec = weights(d_sae, d_in, device=device)
    mask = torch.zeros(d_sae, dtype=torch.bool, device=device)
    mask[torch.randperm(d_sae)[:allowed]] = True
    for relu in (True, False):
        got = ops.encode_topk(x, W, b_enc, k, b_dec=b_dec, mask=mask, relu=relu)
        want = reference.encode_topk(x, W, b_enc, k, b_dec=b_dec, mask=mask, relu=relu)
        assert_close(got.values, want.values)
        assert torch.equal(got.indices, want.indices)
        assert not got.values[~mask[got.indices.long()]].any()
    acts, threshold = ops.encode_batch_topk(x, W, b_enc, k, b_dec=b_dec, mask=mask)
    ref = reference.encode_batch_topk(x, W, b_enc, k, b_dec=b_dec, mask=mask)
    assert_close(acts.to_dense(), ref.acts.to_dense())
    assert_close(threshold, ref.threshold)


def run(encode, selected):
    """Loss that depends on every active value, and its gradients."""
    tensors = [t.detach().clone().requires_grad_() for t in selected]
    acts = encode(*tensors)
    (acts.to_dense().sin() * torch.arange(acts.d_sae, device=acts.values.device)).sum().backward()
    return [t.grad for t in tensors]


ENCODERS = {
    "topk": lambda m, x, W, b, c, mask: ops.SparseActs(
        *m.encode_topk(x, W, b, 4, b_dec=c, mask=mask), None, W.shape[0]
    ),
    "batch_topk": lambda m, x, W, b, c, mask: (
        m.encode_batch_topk(x, W, b, 3.5, b_dec=c, mask=mask).acts
    ),
    "threshold": lambda m, x, W, b, c, mask: m.encode_threshold(
        x, W, b, torch.tensor(0.4, device=x.device), 1000, b_dec=c
    ),
}


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_a_dense_reference(device, isa, kind, masked) -> None:
    x = torch.randn(12, 10, dtype=torch.float64, device=device)
    W, b_enc, b_dec = weights(50, 10, torch.float64, device)
    mask = torch.rand(50, device=device) < 0.5 if masked else None
    arguments = (x, W, b_enc, b_dec)
    got = run(lambda *t: ENCODERS[kind](ops, *t, mask), arguments)
    want = run(lambda *t: ENCODERS[kind](reference, *t, mask), arguments)
    for name, a, b in zip(("x", "W_enc", "b_enc", "b_dec"), got, want, strict=True):
        assert b.abs().sum() > 0, name
        assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


def test_gradcheck() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    W, b_enc, b_dec = (t.requires_grad_() for t in weights(9, 4, torch.float64))
    for relu in (True, False):

        def f(x, W, b_enc, b_dec, relu=relu):
            return ops.encode_topk(x, W, b_enc, 3, b_dec=b_dec, relu=relu).values

        assert torch.autograd.gradcheck(f, (x, W, b_enc, b_dec))
    assert torch.autograd.gradcheck(
        lambda x, W, b, c: ops.encode_batch_topk(x, W, b, 2, b_dec=c).acts.values,
        (x, W, b_enc, b_dec),
    )


def test_only_what_is_needed_gets_a_gradient() -> None:
    x = torch.randn(5, 4)
    W, b_enc, b_dec = weights(9, 4)
    b_enc.requires_grad_()
    ops.encode_topk(x, W, b_enc, 3, b_dec=b_dec).values.sum().backward()
    assert b_enc.grad is not None
    assert x.grad is None
    assert W.grad is None


def test_all_negative_pre_activations_give_no_gradient() -> None:
    x = torch.rand(6, 4) + 0.1
    W = (-torch.rand(9, 4) - 0.1).requires_grad_()
    b = torch.zeros(9, requires_grad=True)
    values, _ = ops.encode_topk(x, W, b, 3)
    assert not values.any()
    values.sum().backward()
    assert not W.grad.any()
    assert not b.grad.any()
    acts, _ = ops.encode_batch_topk(x, W, b, 3)
    acts.values.sum().backward()
    assert not W.grad.any()


def test_a_nan_row_stays_alone() -> None:
    x = torch.randn(6, 8)
    W, b_enc, _ = weights(40, 8)
    clean = ops.encode_topk(x, W, b_enc, 4)
    x[2] = float("nan")
    got = ops.encode_topk(x, W, b_enc, 4)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(got.values[others], clean.values[others])
    assert torch.equal(got.indices[others], clean.indices[others])
    assert got.values[2].isnan().all()


def test_select_dtype_computes_in_float32() -> None:
    x = torch.randn(50, 64).bfloat16()
    W, b_enc, b_dec = weights(400, 64, torch.bfloat16)
    got = ops.encode_topk(x, W, b_enc, 8, b_dec=b_dec, select_dtype=torch.float32)
    want = reference.encode_topk(x.float(), W.float(), b_enc.float(), 8, b_dec=b_dec.float())
    assert torch.equal(got.indices, want.indices)
    assert got.values.dtype == torch.bfloat16
    assert_close(got.values, want.values.bfloat16())


def test_leading_dimensions_and_empty(device) -> None:
    W, b_enc, _ = weights(20, 4, device=device)
    x = torch.randn(2, 3, 4, device=device)
    values, indices = ops.encode_topk(x, W, b_enc, 5)
    assert values.shape == indices.shape == (2, 3, 5)
    flat = ops.encode_topk(x.reshape(6, 4), W, b_enc, 5)
    assert torch.equal(values.reshape(6, 5), flat.values)
    assert ops.encode_batch_topk(x, W, b_enc, 2).acts.n == 6
    empty = torch.empty(0, 4, device=device)
    assert ops.encode_topk(empty, W, b_enc, 5).values.shape == (0, 5)
    assert ops.encode_batch_topk(empty, W, b_enc, 2).acts.n == 0
    theta = torch.tensor(0.0, device=device)
    assert ops.encode_threshold(empty, W, b_enc, theta, 7).n == 0


def test_transposed_parameters(device) -> None:
    W, b_enc, _ = weights(20, 4, device=device)
    x = torch.randn(6, 4, device=device)
    column_major = W.t().contiguous().t()
    assert not column_major.is_contiguous()
    assert torch.equal(
        ops.encode_topk(x, column_major, b_enc, 5).indices,
        ops.encode_topk(x, W, b_enc, 5).indices,
    )


def test_opcheck() -> None:
    x = torch.randn(6, 5, requires_grad=True)
    W, b_enc, b_dec = (t.requires_grad_() for t in weights(20, 5))
    mask = torch.rand(20) < 0.7
    o = torch.ops.fastsae
    torch.library.opcheck(o.encode_topk.default, (x, W, b_enc, b_dec, 3, mask, True, False, False))
    torch.library.opcheck(o.encode_topk.default, (x, W, None, None, 3, None, False, True, True))
    torch.library.opcheck(
        o.encode_batch_topk.default, (x, W, b_enc, b_dec, 13, mask, False, torch.tensor(0.3))
    )
    threshold = torch.tensor(0.1)
    torch.library.opcheck(o.encode_threshold.default, (x, W, b_enc, b_dec, threshold, 30, False))


def test_compiles() -> None:
    x = torch.randn(6, 5)
    W, b_enc, b_dec = weights(20, 5)
    W.requires_grad_()

    def f(x, W):
        values, indices = ops.encode_topk(x, W, b_enc, 3, b_dec=b_dec)
        acts, _ = ops.encode_batch_topk(x, W, b_enc, 3)
        decoded = ops.sparse_decode(ops.SparseActs(values, indices, None, 20), W)
        return decoded.square().sum() + acts.values.sum()

    want = torch.autograd.grad(f(x, W), W)[0]
    got = torch.autograd.grad(torch.compile(f, fullgraph=True)(x, W), W)[0]
    assert_close(got, want)


def test_wrong_arguments() -> None:
    x, (W, b_enc, b_dec) = torch.randn(6, 5), weights(20, 5)
    with pytest.raises(
        ValueError,
        match=r"encode_topk: expected x to be \[\.\.\., d_in\] with d_in = 5, got ",
    ):
        ops.encode_topk(x[:, :4], W, b_enc, 3)
    with pytest.raises(ValueError, match=r"expected 1 <= k <= d_sae = 20, got k = 21"):
        ops.encode_topk(x, W, b_enc, 21)
    with pytest.raises(ValueError, match=r"expected b_enc to be \[d_sae\] = \[20\], got \[5\]"):
        ops.encode_topk(x, W, b_dec, 3)
    with pytest.raises(TypeError, match=r"expected W_enc to have the dtype of x, torch.float32"):
        ops.encode_topk(x, W.double(), b_enc, 3)
    with pytest.raises(TypeError, match=r"expected mask to be a bool Tensor, got torch.float32"):
        ops.encode_topk(x, W, b_enc, 3, mask=torch.ones(20))
    with pytest.raises(ValueError, match=r"expected W_enc on the device of x, cpu, got meta"):
        ops.encode_topk(x, W.to("meta"), b_enc, 3)
    with pytest.raises(ValueError, match=r"expected select_dtype to be None, float32"):
        ops.encode_topk(x.double(), W.double(), None, 3, select_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"expected compute_dtype to be None, the dtype of x"):
        ops.encode_topk(x, W, b_enc, 3, compute_dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"encode_batch_topk: expected threshold_guess to be \[\], got \[2\]"
    ):
        ops.encode_batch_topk(x, W, b_enc, 3, threshold_guess=torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"encode_topk: expected b_dec to be \[5\], got \[20\]"):
        torch.ops.fastsae.encode_topk(x, W, b_enc, b_enc, 3, None, True, False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stand_ins_agree_with_the_kernels(dtype) -> None:
    """The plain-torch implementations for devices without a kernel, run on the CPU."""
    x, W, b, _ = (t.to(dtype) for t in integers(40, 6, 300))
    keys = DispatchKeySet(DispatchKey.CompositeExplicitAutograd)
    theta = torch.tensor(4.0)
    for op, arguments in (
        ("encode_topk", (x, W, b, None, 5, None, True, False, True)),
        ("encode_topk", (x, W, b, None, 5, None, False, True, True)),
        ("encode_batch_topk", (x, W, b, None, 77, None, False, theta)),
        ("encode_threshold", (x, W, b, None, theta, 900, False)),
        ("batch_topk", (x @ W.t(), 77, None)),
        ("topk", (x @ W.t(), 5, False)),
        ("feature_topk", (x @ W.t(), torch.arange(300).int() % 9, 1200)),
    ):
        native = getattr(torch.ops.fastsae, op)
        got = native.default.redispatch(keys, *arguments)
        assert all(map(torch.equal, got, native(*arguments))), op
