"""Sampled SAE: the pool and its scores, gradients, thresholds without a pool, training, files."""

import pytest
import torch

import fastsae
from fastsae.nn import BatchTopKSAE
from fastsae.nn.sampled import SampledSAE
from fastsae.train import TrainConfig, Trainer

D_IN, D_SAE = 12, 80


def rows(n=900, dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    basis = torch.randn(40, D_IN, generator=g)
    return ((torch.rand(n, 40, generator=g) < 0.06).float() @ basis + 1).to(dtype)


def random_sae(k=3, dtype=torch.float32, **arguments):
    """An SAE none of whose parameters is 0."""
    sae = SampledSAE(D_IN, D_SAE, k, dtype=dtype, **arguments)
    sae.b_enc, sae.b_dec = torch.randn(D_SAE).to(dtype), torch.randn(D_IN).to(dtype)
    return sae


def activations(sae, x):
    return ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()


def dense_scores(a, score):
    """The formulas of the scores, column by column of `a: [n, d_sae]`."""
    if score == "l2":
        return torch.stack([column.norm() for column in a.unbind(1)])
    found = []
    for column in a.unbind(1):
        p = column[column > 0] / column.sum()
        found.append(-(p * p.log()).sum() if len(p) else torch.tensor(-1.0).to(a))
    return torch.stack(found)


def largest(a, count):
    """The `count` largest entries of the matrix, the rest 0."""
    return torch.where(a >= a.flatten().topk(count).values[-1], a, 0)


@pytest.mark.parametrize("score", ["l2", "entropy"])
def test_the_code_is_batch_topk_in_the_pool_of_a_dense_computation(score, device):
    sae = random_sae(dtype=torch.float64, pool=5, score=score).to(device)
    x = 2 * torch.randn(60, D_IN, dtype=torch.float64, device=device)
    a = activations(sae, x).detach()
    pool = dense_scores(a, score).topk(15).indices
    inside = torch.zeros(D_SAE, dtype=torch.bool, device=device).index_fill(0, pool, True)
    want = largest(torch.where(inside, a, 0), 180)
    acts = sae.loss(x).acts
    torch.testing.assert_close(acts.to_dense(), want)
    torch.testing.assert_close(sae.encode(x), want)
    smallest = a.flatten().topk(180).values[-1]  # without a pool
    torch.testing.assert_close(sae.threshold, smallest.float())
    assert not torch.equal(want, largest(a, 180))
    entries = acts.rows() * D_SAE + acts.indices
    assert (entries[: acts.offsets[-1]].diff() > 0).all()


def test_the_scores_choose_differently():
    """Latent 0 fires once and strongly, latent 1 a little everywhere."""
    x = torch.zeros(9, 2)
    x[0, 0], x[:, 1] = 5, 1
    for score, chosen in (("l2", 0), ("entropy", 1)):
        sae = SampledSAE(2, 2, 1, pool=1, score=score)
        sae.W_enc = sae.W_dec = torch.eye(2)
        assert sae.encode_sparse(x).fired().nonzero().tolist() == [[chosen]]


@pytest.mark.parametrize("shift", [2, 100])
def test_places_that_stay_empty_are_padding(shift):
    sae = random_sae(pool=2)
    sae.b_enc = sae.b_enc - shift
    x = torch.randn(7, D_IN)
    acts = sae.loss(x).acts
    kept = acts.offsets[-1]
    assert kept == (0 if shift == 100 else (acts.values > 0).sum())
    assert kept < 21 == acts.values.numel()
    assert not acts.values[kept:].any()
    assert not acts.indices[kept:].any()
    assert acts.indices.count_nonzero() == kept
    assert sae.threshold.isinf() == (shift == 100)
    assert sae.encode_sparse(x[:0]).shape == (0, D_SAE)


def same_bits(sae, other, x):
    """Both train, learn a threshold and encode at inference with the same bits."""
    for mine, theirs in ((sae.loss(x), other.loss(x)), (sae.eval().loss(x), other.eval().loss(x))):
        assert torch.equal(mine.acts.values, theirs.acts.values)
        assert torch.equal(mine.acts.indices, theirs.acts.indices)
        assert torch.equal(mine.acts.offsets, theirs.acts.offsets)
        assert torch.equal(mine.loss, theirs.loss)
    return torch.equal(sae.threshold, other.threshold)


@pytest.mark.parametrize("k", [3, 7, 0.3])
def test_a_pool_of_all_latents_is_batch_topk_bit_for_bit(k):
    sae = random_sae(k, pool=D_SAE / k)
    other = BatchTopKSAE(D_IN, D_SAE, k)
    other.load_state_dict(sae.state_dict())
    assert same_bits(sae, other, torch.randn(100, D_IN))


def test_a_pool_of_all_that_fire_is_batch_topk_bit_for_bit():
    sae = random_sae(4, pool=5)
    silent = torch.randperm(D_SAE)[20:]
    with torch.no_grad():
        sae.b_enc[silent] = -1000
    other = BatchTopKSAE(D_IN, D_SAE, 4)
    other.load_state_dict(sae.state_dict())
    x = torch.randn(100, D_IN)
    sae.loss(x)
    other.loss(x)
    assert torch.equal(sae.threshold, other.threshold)
    assert same_bits(sae, other, x)


@pytest.mark.parametrize("score", ["l2", "entropy"])
def test_gradients_equal_those_of_a_dense_reference(score):
    sae = random_sae(dtype=torch.float64, pool=4, score=score, k_aux=5)
    x = torch.randn(50, D_IN).double()
    sae.loss(x).loss.backward()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    a = ((x - leaves["b_dec"]) @ leaves["W_enc_rows"].t() + leaves["b_enc"]).relu()
    pool = dense_scores(a.detach(), score).topk(12).indices
    inside = torch.zeros(D_SAE, dtype=torch.bool).index_fill(0, pool, True)
    x_hat = largest(torch.where(inside, a, 0), 150) @ leaves["W_dec"] + leaves["b_dec"]
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    fvu.backward()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, leaves[name].grad, rtol=1e-9, atol=1e-12)
    assert not sae.W_enc_rows.grad[~inside].any()
    assert sae.W_enc_rows.grad[inside].any()


@pytest.mark.parametrize("score", ["l2", "entropy"])
def test_fused_and_autograd_train_the_same_sae(score):
    results = []
    for update in ("fused", "autograd"):
        torch.manual_seed(1)
        sae = SampledSAE(D_IN, D_SAE, 4, pool=4, score=score, k_aux=16, dtype=torch.float64)
        config = TrainConfig(
            batch_size=50,
            steps=60,
            lr=3e-3,
            dead_after_tokens=100,
            log_every=1,
            update=update,
            progress=False,
        )
        results.append(Trainer(sae, rows(dtype=torch.float64), config).fit())
    fused, autograd = results
    assert any(row["dead"] > 0 and row["aux_loss"] > 0 for row in fused.history)
    assert fused.history[-1]["fvu"] < 0.9 * fused.history[0]["fvu"]
    for name, p in fused.sae.named_parameters():
        other = dict(autograd.sae.named_parameters())[name]
        torch.testing.assert_close(p, other, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(fused.sae.threshold, autograd.sae.threshold)


def test_inference_keeps_k_of_all_latents():
    """Averaged in training, estimated and calibrated: no threshold is that of the pool."""
    x, held_out = torch.randn(4000, D_IN), torch.randn(4000, D_IN)
    sae = random_sae(6, pool=2, threshold_lr=0.1)
    for batch in x.split(200):
        smallest_in_pool = sae.loss(batch).acts
    smallest_in_pool = smallest_in_pool.values[smallest_in_pool.values > 0].min()
    averaged = sae.threshold.clone()
    assert smallest_in_pool < 0.9 * averaged
    sae.estimate_threshold_(x.split(200))
    torch.testing.assert_close(averaged, sae.threshold, rtol=0.02, atol=0)
    assert abs(sae.eval().encode_sparse(held_out).l0() / 6 - 1) < 0.05
    for training in (True, False):
        sae.train(training).calibrate_(2 * held_out)
        l0 = sae.eval().encode_sparse(2 * held_out).l0()
        assert abs(l0 / 6 - 1) < 0.001
    assert sae.encode_sparse(held_out).fired().sum() > sae.pool_size


def test_what_was_saved_is_loaded(tmp_path):
    sae = random_sae(2.5, pool=3.5, score="entropy", threshold_lr=0.2)
    x = torch.randn(40, D_IN)
    sae.loss(x)
    fastsae.save(sae, tmp_path)
    loaded = fastsae.load(tmp_path)
    assert type(loaded) is SampledSAE
    assert loaded.config() == sae.config()
    assert (loaded.pool, loaded.score, loaded.pool_size) == (3.5, "entropy", 9)
    assert torch.equal(loaded(x), sae.eval()(x))
    assert torch.equal(loaded.train()(x), sae.train()(x))


def test_parameters_in_bfloat16():
    sae = random_sae(3, pool=5).bfloat16()
    out = sae.loss(torch.randn(50, D_IN).bfloat16())
    out.loss.backward()
    assert out.acts.values.dtype == torch.bfloat16
    assert out.acts.fired().sum() <= 15
    assert out.acts.row_counts().sum() == 150
    assert sae.W_enc_rows.grad.any()


@pytest.mark.parametrize(("k", "pool", "size"), [(3, 8, 24), (3, 100, 80), (0.3, 1, 1), (5, 1, 5)])
def test_sizes_of_the_pool(k, pool, size):
    assert SampledSAE(D_IN, D_SAE, k, pool=pool).pool_size == size


def test_errors():
    for arguments, message in (
        ({"k": 0}, "SampledSAE: expected 0 < k <= d_sae = 8, got k = 0"),
        ({"k": 2, "pool": 0.5}, "SampledSAE: expected 1 <= pool < inf, got 0.5"),
        ({"k": 2, "pool": float("inf")}, "SampledSAE: expected 1 <= pool < inf, got inf"),
        ({"k": 2, "score": "l1"}, "SampledSAE: expected score to be l2 or entropy, got 'l1'"),
    ):
        with pytest.raises(ValueError, match=message):
            SampledSAE(4, 8, **arguments)
    with pytest.raises(RuntimeError, match="SampledSAE: expected a threshold in eval mode"):
        SampledSAE(4, 8, 2, pool=2).eval()(torch.randn(3, 4))
