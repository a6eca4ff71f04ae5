"""Codes that are hardly sparse go through dense matmuls: the same numbers as from the kernels."""

import math

import pytest
import torch

from fastsae import TrainConfig, Trainer, nn, ops
from fastsae.ops import _dense
from fastsae.types import LatentGradients, SparseActs, StepTensors
from tests.nn.randomized import rows

N, D, F = 24, 10, 40


@pytest.fixture(params=["fixed", "variable"])
def acts(request):
    torch.manual_seed(0)
    dense = torch.rand(N, F, dtype=torch.float64)
    if request.param == "fixed":
        values, indices = dense.topk(20)
        order = indices.argsort(1)
        values = values.gather(1, order)
        values[2, 3] = 0  # inactive
        return SparseActs(values, indices.gather(1, order).int(), None, F)
    acts = SparseActs.from_dense(torch.where(dense < 0.6, dense, 0))
    padding = torch.zeros(7, dtype=torch.float64)
    values = torch.cat([acts.values, padding])
    values[5] = 0
    return SparseActs(values, torch.cat([acts.indices, padding.int()]), acts.offsets, F)


def always(monkeypatch):
    monkeypatch.setattr(_dense, "LEAST", 1)
    monkeypatch.setattr(_dense, "LEAST_WIDTH", 1)
    monkeypatch.setattr(_dense, "SHARE", dict.fromkeys(_dense.SHARE, 0.0))
    monkeypatch.setattr(_dense, "CHUNK_BYTES", 7 * F * 8)  # several blocks, the last one smaller


def never(monkeypatch):
    monkeypatch.setattr(_dense, "LEAST", 1 << 60)


@pytest.fixture
def dense_calls(monkeypatch):
    """Counts the blocks that went through dense matmuls."""
    calls, filled = [], _dense._filled
    monkeypatch.setattr(_dense, "_filled", lambda *a: calls.append(1) or filled(*a))
    return calls


def in_both_ways(compute, monkeypatch):
    with monkeypatch.context() as patch:
        never(patch)
        sparse = compute()
    always(monkeypatch)
    return sparse, compute()


def test_the_rule_is_a_share_of_a_large_code():
    assert not _dense.pays("sparse_decode", 1024 * 2212, 1024, 9216, 576)  # 24 %
    assert _dense.pays("sparse_decode", 1024 * 2396, 1024, 9216, 576)  # 26 %
    assert not _dense.pays("sparse_weight_grad", 1024 * 2949, 1024, 9216, 576)  # 32 %
    assert _dense.pays("sparse_weight_grad", 1024 * 3133, 1024, 9216, 576)  # 34 %
    assert not _dense.pays("sparse_decode", 1000, 10, 100, 576)  # full, but small
    assert not _dense.pays("sparse_decode", 1024 * 9216, 1024, 9216, 128)  # full, but narrow


def test_decode_and_its_gradients(acts, monkeypatch, dense_calls):
    W, b, g = rows(F, D), rows(1, D)[0], rows(N, D)

    def compute():
        leaves = [t.clone().requires_grad_() for t in (acts.values, W, b)]
        code = SparseActs(leaves[0], acts.indices, acts.offsets, F)
        out = ops.sparse_decode(code, leaves[1], leaves[2])
        first = torch.autograd.grad((out * g).sum() + out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(
            sum(t.square().sum() for t in first), leaves, retain_graph=True
        )
        plain = torch.autograd.grad((out * g).sum(), leaves)
        return [out, *first, *second, *plain]

    sparse, dense = in_both_ways(compute, monkeypatch)
    assert dense_calls
    torch.testing.assert_close(dense, sparse, rtol=1e-12, atol=1e-12)


def test_values_grad(acts, monkeypatch):
    W, g = rows(F, D), rows(N, D)
    sparse, dense = in_both_ways(lambda: ops.sparse_decode_values_grad(g, acts, W), monkeypatch)
    torch.testing.assert_close(dense, sparse, rtol=1e-12, atol=1e-12)
    assert torch.equal(dense != 0, acts.values != 0)


def test_encoders_and_their_gradients(monkeypatch, dense_calls):
    x, W, b, c = rows(N, D), rows(F, D), rows(1, F)[0], rows(1, D)[0]
    g = rows(N, F)

    def compute():
        leaves = [t.clone().requires_grad_() for t in (x, W, b, c)]
        acts = ops.encode_threshold(*leaves[:3], torch.zeros(()), N * F, b_dec=leaves[3])
        grads = torch.autograd.grad((acts.to_dense() * g).sum(), leaves)
        return [acts.to_dense(), *grads]

    sparse, dense = in_both_ways(compute, monkeypatch)
    assert dense_calls
    torch.testing.assert_close(dense, sparse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_training_step(acts, extra, by_rows, clip, monkeypatch, dense_calls):
    start = [rows(F, D), rows(F, D), rows(1, F)[0], rows(1, D)[0]]
    more = None
    if extra:
        latents = torch.tensor([3, 17], dtype=torch.int32)
        more = LatentGradients(latents, rows(2, D), rows(2, D), rows(1, 2)[0])
    grad_values, x, grad_output = torch.randn_like(acts.values), rows(N, D), rows(N, D)

    def compute():
        p, m, v = (
            StepTensors(*(f(t) for t in start)) for f in (torch.clone, *[torch.zeros_like] * 2)
        )
        if by_rows:
            v = v._replace(W_enc=v.W_enc[:, 0].clone(), W_dec=v.W_dec[:, 0].clone())
        for step in (1, 2):
            ops.sparse_adam_step_(
                p, m, v, acts, grad_values, x, grad_output, lr=0.01, step=step,
                clip_grad_norm=clip, extra_grads=more,
            )  # fmt: skip
        return [*p, *m, *v]

    sparse, dense = in_both_ways(compute, monkeypatch)
    assert dense_calls
    torch.testing.assert_close(dense, sparse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_does_not_spread(bad, monkeypatch):
    """A row of the dictionary that nobody decodes, and a token that one latent sees."""
    torch.manual_seed(0)
    dense = torch.rand(N, F, dtype=torch.float64) + 0.1
    dense[:, 5] = 0
    acts, W = SparseActs.from_dense(dense), rows(F, D)
    W[5] = bad
    sparse, out = in_both_ways(lambda: ops.sparse_decode(acts, W), monkeypatch)
    assert bool(out.isfinite().all())
    torch.testing.assert_close(out, sparse)


def test_entries_that_come_twice_or_in_disorder_are_added(monkeypatch, dense_calls):
    always(monkeypatch)
    values = rows(2, 3)
    indices = torch.tensor([[1, 1, 2], [3, 0, 2]], dtype=torch.int32)
    W = rows(4, D)
    out = ops.sparse_decode(SparseActs(values, indices, None, 4), W)
    torch.testing.assert_close(out, (values.unsqueeze(2) * W[indices.long()]).sum(1))
    assert not dense_calls


def test_an_index_out_of_range_is_an_error(monkeypatch):
    always(monkeypatch)
    acts = SparseActs(torch.ones(1, 2), torch.tensor([[0, 9]], dtype=torch.int32), None, 4)
    with pytest.raises(RuntimeError):
        ops.sparse_decode(acts, torch.ones(4, 3))


@pytest.mark.parametrize("cls", [nn.JumpReLUSAE, nn.MatryoshkaSAE, nn.TopKSAE])
def test_a_run_is_the_same(cls, monkeypatch, dense_calls):
    torch.manual_seed(0)
    x = torch.randn(256, 12, dtype=torch.float64)

    def compute():
        torch.manual_seed(1)
        sae = cls(12, 32, 4, dtype=torch.float64)
        Trainer(sae, x, TrainConfig(steps=6, batch_size=64, progress=False)).fit()
        return [p.detach() for p in sae.parameters()]

    sparse, dense = in_both_ways(compute, monkeypatch)
    assert dense_calls
    torch.testing.assert_close(dense, sparse, rtol=1e-8, atol=1e-8)


def full(monkeypatch):
    """Have every positive code be full."""
    monkeypatch.setattr(_dense, "LEAST", 1)
    monkeypatch.setattr(_dense, "FULL_SHARE", -1.0)


def test_a_full_code_is_the_dense_matrix():
    dense = torch.where(rows(N, F) > 0, rows(N, F), 0)
    acts = SparseActs.full(dense)
    plain = SparseActs.from_dense(dense)
    assert acts.is_full
    assert not plain.is_full
    assert not SparseActs(dense, acts.indices.contiguous(), None, F).is_full  # not the same memory
    assert not SparseActs(dense, acts.indices.flip(1)[:1].expand(N, -1), None, F).is_full
    assert acts.shape == (N, F)
    assert torch.equal(acts.to_dense(), dense)
    assert torch.equal(acts.counts(), plain.counts())
    assert torch.equal(acts.row_counts(), plain.row_counts())
    assert torch.equal(acts.fired(), plain.fired())
    half = acts.to(torch.float32)
    assert half.is_full
    assert torch.equal(half.to_dense(), dense.float())
    assert torch.equal(SparseActs.cat([acts, plain]).to_dense(), torch.cat([dense, dense]))
    leaf = dense.clone().requires_grad_()
    assert torch.equal(
        torch.autograd.grad(SparseActs.full(leaf).to_dense().sum(), leaf)[0], dense * 0 + 1
    )


def test_ops_of_a_full_code_are_those_of_its_entries():
    dense, W, b, g = (
        torch.where(rows(N, F) > 0, rows(N, F), 0),
        rows(F, D),
        rows(1, D)[0],
        rows(N, D),
    )
    acts, plain = SparseActs.full(dense), SparseActs.from_dense(dense)
    torch.testing.assert_close(ops.sparse_decode(acts, W, b), ops.sparse_decode(plain, W, b))
    found = ops.sparse_decode_values_grad(g, acts, W)
    torch.testing.assert_close(found[dense != 0], ops.sparse_decode_values_grad(g, plain, W))
    assert not found[dense == 0].any()
    # Where dense matmuls do not apply, the kernels take it as any other code.
    torch.testing.assert_close(
        ops.sparse_decode(SparseActs.full(dense.float().bfloat16()), W.bfloat16()),
        ops.sparse_decode(SparseActs.from_dense(dense.float().bfloat16()), W.bfloat16()),
    )
    W[3] = math.inf
    dense[:, 3] = 0
    out = ops.sparse_decode(SparseActs.full(dense), W)
    torch.testing.assert_close(out, ops.sparse_decode(SparseActs.from_dense(dense), W))
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("cls", [nn.ReLUSAE, nn.GatedSAE])
@pytest.mark.parametrize("grad", [True, False])
def test_codes_and_losses_of_full_codes(cls, grad, monkeypatch):
    torch.manual_seed(0)
    sae, x = cls(12, 32, dtype=torch.float64), rows(64, 12)
    sae.b_enc = 0.1 * torch.randn(32)

    def compute():
        with torch.set_grad_enabled(grad):
            acts, out = sae.encode_sparse(x), sae.loss(x)
        found = [acts.to_dense(), out.loss, out.reconstruction, out.acts.l0()]
        if grad:
            found += torch.autograd.grad(out.loss, list(sae.parameters()))
        return acts.is_full, found

    with monkeypatch.context() as patch:
        never(patch)
        was_full, sparse = compute()
    full(monkeypatch)
    is_full, dense = compute()
    assert (was_full, is_full) == (False, True)
    torch.testing.assert_close(dense, sparse, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("cls", [nn.ReLUSAE, nn.GatedSAE])
@pytest.mark.parametrize("update", ["fused", "autograd"])
def test_a_run_with_full_codes_is_the_same(cls, update, monkeypatch):
    if cls is nn.GatedSAE and update == "fused":
        pytest.skip("has no fused update")
    torch.manual_seed(0)
    x = torch.randn(256, 12, dtype=torch.float64)

    def compute():
        torch.manual_seed(1)
        sae = cls(12, 32, 4, dtype=torch.float64)
        config = TrainConfig(steps=6, batch_size=64, progress=False, update=update)
        Trainer(sae, x, config).fit()
        return [p.detach() for p in sae.parameters()]

    with monkeypatch.context() as patch:
        never(patch)
        sparse = compute()
    full(monkeypatch)
    torch.testing.assert_close(compute(), sparse, rtol=1e-8, atol=1e-8)


def test_a_code_looks_full_where_most_latents_are_active(monkeypatch):
    x, W, b = torch.randn(1024, 8), torch.randn(512, 8), torch.zeros(512)
    assert _dense.looks_full(x, W, b, None)
    assert not _dense.looks_full(x, W, b - 10, None)
    assert not _dense.looks_full(x, W, b, torch.full((8,), math.nan))
    assert not _dense.looks_full(x[:100], W, b, None)  # small
    assert not _dense.looks_full(x.bfloat16(), W.bfloat16(), b.bfloat16(), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not _dense.looks_full(x, W, b, None)
    monkeypatch.setattr(_dense, "MOST", 1 << 18)
    assert not _dense.looks_full(x, W, b, None)  # too large to hold


@pytest.mark.parametrize("what", ["indices", "offsets", "values", "latents"])
def test_what_is_wrong_is_left_to_the_kernels(what, monkeypatch, dense_calls):
    always(monkeypatch)
    acts = SparseActs.from_dense(torch.rand(6, 8) + 0.1)
    if what == "indices":
        acts.indices = acts.indices.long()
    elif what == "offsets":
        acts.offsets = acts.offsets.long()
    elif what == "values":
        acts.values = torch.cat([acts.values, acts.values[:3]])
    before = acts.indices.clone()
    if what == "latents":
        p, m, v = (
            StepTensors(*(torch.ones(s) for s in ((8, 3), (8, 3), (8,), (3,)))) for _ in "pmv"
        )
        twice = torch.tensor([3, 3], dtype=torch.int32)
        extra = LatentGradients(twice, torch.ones(2, 3), torch.ones(2, 3), torch.ones(2))
        with pytest.raises(RuntimeError, match="twice"):
            ops.sparse_adam_step_(
                p, m, v, acts, acts.values, torch.ones(6, 3), torch.ones(6, 3), lr=1.0, step=1,
                extra_grads=extra,
            )  # fmt: skip
        assert all(bool((t == 1).all()) for t in (*p, *m, *v))
        dense_calls.clear()  # those of the entries, before the rows are looked at
    else:
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            ops.sparse_decode(acts, torch.ones(8, 3))
    assert torch.equal(acts.indices, before)
    assert not dense_calls


def test_backward_inside_autocast_keeps_the_dtype(acts, monkeypatch, dense_calls):
    always(monkeypatch)
    values = acts.values.float().requires_grad_()
    out = ops.sparse_decode(SparseActs(values, acts.indices, acts.offsets, F), rows(F, D).float())
    with torch.autocast("cpu", torch.bfloat16):
        (grad,) = torch.autograd.grad(out.sum(), values)
    assert grad.dtype == torch.float32
    assert dense_calls
