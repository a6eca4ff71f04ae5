"""Whom the auxiliary loss revives, and the loss at several k."""

import copy
import shutil

import pytest
import torch

from fastsae.nn import SAE, StepContext, TopKSAE
from fastsae.train import DeadLatents, TrainConfig, Trainer, UnderusedLatents, why_not_fused


def counted(counter, rows):
    for row in rows:
        counter.count(torch.tensor(row), 100)
    return counter


def test_underused_latents_contain_the_dead_and_fall_to_them():
    counts = [[90, 45, 30, 1, 18, 0]] * 20
    kinds = [UnderusedLatents(6, 500, ratio=ratio) for ratio in (0.3, 0.0)]
    some, none = (counted(kind, counts).to_revive().tolist() for kind in kinds)
    assert some == [False, False, False, True, False, True]
    assert none == counted(DeadLatents(6, 500), counts).to_revive().tolist()
    assert none == [False, False, False, False, False, True]


def test_the_loss_of_the_dead_is_auxk():
    x = torch.randn(40, 8)
    dead = torch.arange(20) >= 14
    found = []
    for aux in ("auxk", "zipf"):
        torch.manual_seed(3)
        found.append(TopKSAE(8, 20, 3, aux=aux).loss(x, context=StepContext(dead=dead)).aux_loss)
    assert found[0] == found[1] > 0
    with pytest.raises(ValueError, match="TopKSAE: expected aux to be auxk or zipf, got 'both'"):
        TopKSAE(8, 20, 3, aux="both")


def test_zipf_trains_resumes_and_loads(tmp_path):
    x = torch.randn(1000, 8) @ torch.randn(8, 8)
    config = TrainConfig(
        batch_size=100, steps=60, dead_after_tokens=300, out=tmp_path, checkpoint_every=25
    )
    torch.manual_seed(0)
    sae = TopKSAE(8, 64, 2, aux="zipf", k_aux=8)
    again = copy.deepcopy(sae)
    result = Trainer(sae, x, config).fit()
    assert result.final["aux_loss"] > 0
    for folder in sorted((tmp_path / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    Trainer(again, x, config).fit(resume=True)
    assert torch.equal(again.W_enc, sae.W_enc)


@pytest.mark.parametrize("k", [2, 7])
def test_multi_topk_adds_an_eighth_of_the_loss_at_4k(k):
    x = torch.randn(30, 8, dtype=torch.float64)
    sae = TopKSAE(8, 20, k, multi_topk=True, dtype=torch.float64)
    parameters = list(sae.parameters())
    out = sae.loss(x)
    got = torch.autograd.grad(out.loss, parameters)
    wide = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    kept = wide.topk(min(4 * k, 20), dim=1)
    dense = torch.zeros_like(wide).scatter(1, kept.indices, kept.values)
    error = (x - dense @ sae.W_dec - sae.b_dec).square().sum()
    sae.multi_topk = False
    want = sae.loss(x).loss + error / (x - x.mean(0)).square().sum() / 8
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(got, torch.autograd.grad(want, parameters))
    sae.multi_topk = True
    assert why_not_fused(sae, TrainConfig()) is None
    assert SAE.registry["TopKSAE"](**sae.config()).multi_topk
