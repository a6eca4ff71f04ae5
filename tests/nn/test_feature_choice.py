"""Feature choice: budgets, whose entries are kept, thresholds, and training."""

import copy
import math
import shutil
import sys

import pytest
import torch

import fastsae
from fastsae import ops, reference
from fastsae.nn import ActivationScaler, FeatureChoiceSAE
from fastsae.train import TrainConfig, Trainer
from tests.properties import given, settings, st


def planted(n=4000, d=16, latents=48, active=3):
    """Return sums of a few of many directions."""
    directions = torch.nn.functional.normalize(torch.randn(latents, d), dim=1)
    code = torch.zeros(n, latents)
    place = torch.rand(n, latents).topk(active, 1).indices
    return code.scatter(1, place, torch.rand(n, active) + 0.5) @ directions


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(1, 30), st.integers(1, 9), st.integers(0, 2**31))
def test_the_encoder_equals_a_dense_reference(n, d_sae, d_in, seed):
    torch.manual_seed(seed)
    x, W = torch.randn(n, d_in).double(), torch.randn(d_sae, d_in).double()
    b, c = torch.randn(d_sae).double(), torch.randn(d_in).double()
    m = torch.randint(0, 6, (d_sae,))
    capacity = int(m.clamp(max=n).sum()) + 2
    got = ops.encode_feature_topk(x, W, b, m, capacity, b_dec=c)
    want = reference.feature_topk((x - c) @ W.t() + b, m, capacity)
    assert torch.equal(got.offsets, want.offsets)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.values, want.values)


def test_blocks_of_latents_are_merged_by_row(monkeypatch):
    module = sys.modules["fastsae.ops.encode_feature_topk"]
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)  # 64 latents at a time
    x = torch.randint(-3, 4, (50, 6)).float()
    W, b = torch.randint(-3, 4, (300, 6)).float(), torch.randint(-3, 4, (300,)).float()
    m = torch.randint(0, 5, (300,))
    for dtype in (torch.float32, torch.bfloat16):
        got = ops.encode_feature_topk(x.to(dtype), W.to(dtype), b.to(dtype), m, int(m.sum()))
        want = reference.feature_topk(x @ W.t() + b, m, int(m.sum()))
        assert torch.equal(got.offsets, want.offsets)
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.values, want.values.to(dtype))


def test_gradients():
    x, W, b, c = (torch.randn(s).double().requires_grad_() for s in ((9, 4), (7, 4), (7,), (4,)))
    m = torch.tensor([3, 0, 1, 9, 2, 2, 4])

    def values(x, W, b, c):
        return ops.encode_feature_topk(x, W, b, m, 30, b_dec=c).values

    assert torch.autograd.gradcheck(values, (x, W, b, c))


@pytest.mark.parametrize("allocation", ["uniform", "zipf"])
def test_columns_keep_their_budgets(allocation):
    sae = FeatureChoiceSAE(16, 48, 3, allocation=allocation, mutual_choice_batches=2)
    x = planted(256)
    sae.loss(x)
    sae.loss(x)
    for _ in range(3):
        acts = sae.loss(x).acts
        counts = torch.bincount(acts.indices[acts.values != 0].long(), minlength=48)
        positive = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc > 0).sum(0)
        assert sae.budget.sum() == 3 * 256
        assert torch.equal(counts, sae.budget.minimum(positive))
    uneven = sae.budgets(256).max() > sae.budgets(256).min()
    assert bool(uneven) == (allocation == "zipf")


def test_uniform_budgets_choose_as_topk_of_the_transpose():
    sae = FeatureChoiceSAE(16, 48, 3, allocation="uniform", mutual_choice_batches=0)
    x = planted(256).abs()
    dense = sae.encode(x)
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    kept = reference.topk(pre.t().contiguous(), 16)
    want = torch.zeros(48, 256).scatter(1, kept.indices.long(), kept.values).t()
    torch.testing.assert_close(dense, want)


def test_mutual_choice_comes_first():
    sae = FeatureChoiceSAE(16, 48, 3, mutual_choice_batches=2)
    x = planted(200)
    for batch in range(4):
        acts = sae.loss(x).acts
        want = reference.batch_topk((x - sae.b_dec) @ sae.W_enc + sae.b_enc, 3).acts
        assert torch.equal(acts.indices, want.indices) == (batch < 2)


def test_thresholds_average_the_smallest_value_of_every_column():
    sae = FeatureChoiceSAE(3, 3, 1, mutual_choice_batches=0, density_lr=0.25)
    sae.W_enc = sae.W_dec = torch.eye(3)
    sae.loss(torch.tensor([[5.0, 1, 0], [4, 2, 0], [3, 3, 1]]))
    assert sae.threshold.tolist() == [5, 3, 1]  # one each
    sae.loss(torch.tensor([[1.0, 7, -1], [9, 0, -1], [0, 0, -1]]))
    assert sae.threshold.tolist() == [5 + 0.25 * 4, 3 + 0.25 * 4, 0.75]
    sae.eval()
    dense = sae.encode(torch.tensor([[6.0, 5, 0.75], [6.5, 3, 0.8]]))
    assert dense.tolist() == [[0, 5, 0], [6.5, 0, pytest.approx(0.8)]]


def test_training_reaches_k_and_no_latent_dies(tmp_path):
    x, val = planted(6000).split([4000, 2000])
    sae = FeatureChoiceSAE(16, 48, 3, mutual_choice_batches=60)
    config = TrainConfig(batch_size=500, steps=300, lr=3e-3, out=tmp_path, log_every=20)
    result = Trainer(sae, x, config, val=val).fit()
    history = result.history
    assert history[-1]["fvu"] < 0.4 < history[0]["fvu"]
    assert history[-1]["dead"] == 0
    assert abs(result.final["val_l0"] - 3) < 0.45
    sae.calibrate_(val[:1000])
    assert (sae.encode(val[:1000]) != 0).sum() / 1000 == pytest.approx(3, abs=0.01)
    fastsae.save(sae, tmp_path)
    loaded = fastsae.load(tmp_path)
    assert isinstance(loaded, FeatureChoiceSAE)
    assert torch.equal(loaded.encode(x), sae.encode(x))
    scaled = copy.deepcopy(sae)
    ActivationScaler(scaled.columns, [4.0]).fold_(scaled)
    torch.testing.assert_close(scaled(x), sae(4 * x) / 4, rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_goes_on_with_the_same_bits(tmp_path):
    x = planted(2000)
    config = TrainConfig(
        batch_size=200, steps=40, out=tmp_path / "a", checkpoint_every=13, keep_checkpoints=9
    )
    torch.manual_seed(1)
    whole = FeatureChoiceSAE(16, 48, 3, refresh=10, mutual_choice_batches=8)
    start = copy.deepcopy(whole)
    Trainer(whole, x, config).fit()
    for folder in sorted((tmp_path / "a/checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    again = copy.deepcopy(start)
    Trainer(again, x, config).fit(resume=True)
    assert torch.equal(again.W_dec, whole.W_dec)
    assert torch.equal(again.threshold, whole.threshold)


def test_errors():
    for arguments, message in (
        ({"k": 0}, "0 < k <= d_sae = 8, got k = 0"),
        ({"k": 2, "allocation": "fair"}, "allocation to be uniform or zipf, got 'fair'"),
        ({"k": 2, "refresh": 0}, "refresh >= 1"),
        ({"k": 2, "density_lr": 2}, "0 < density_lr <= 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureChoiceSAE(4, 8, **arguments)
    with pytest.raises(RuntimeError, match="expected a threshold in eval mode, got none yet"):
        FeatureChoiceSAE(4, 8, 2).eval()(torch.randn(3, 4))
    assert math.isinf(FeatureChoiceSAE(4, 8, 2).threshold.min())
