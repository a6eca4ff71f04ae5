"""The fused update against autograd, and what decides between them."""

import pytest
import torch

from fastsae import _library
from fastsae.nn import BatchTopKSAE, GatedSAE, StepContext, TopKSAE
from fastsae.train import TrainConfig, Trainer, make_update, why_not_fused
from fastsae.train.autograd_update import AutogradUpdate
from fastsae.train.fused_update import FusedUpdate
from fastsae.train.precision import compute_dtype

D_IN, D_SAE = 24, 96


def rows(n=900, dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    basis = torch.randn(60, D_IN, generator=g)
    return ((torch.rand(n, 60, generator=g) < 0.05).float() @ basis + 1).to(dtype)


def run(cls, update, dtype=torch.float32, **arguments):
    torch.manual_seed(1)
    sae = cls(D_IN, D_SAE, k=4, k_aux=16, dtype=dtype)
    settings = {"batch_size": 50, "steps": 60, "lr": 3e-3, "dead_after_tokens": 100, "log_every": 1}
    config = TrainConfig(
        **settings | arguments, update=update, compute_dtype="float32", progress=False
    )
    return Trainer(sae, rows(dtype=dtype), config).fit()


@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE])
@pytest.mark.parametrize("clip", [None, 0.02])
def test_fused_and_autograd_train_the_same_sae(cls, clip):
    """Sixty steps in float64, with dead latents on the way: only the order of sums differs."""
    results = [
        run(cls, update, torch.float64, clip_grad_norm=clip) for update in ("fused", "autograd")
    ]
    assert any(row["dead"] > 0 and row["aux_loss"] > 0 for row in results[0].history)
    for name, p in results[0].sae.named_parameters():
        other = dict(results[1].sae.named_parameters())[name]
        torch.testing.assert_close(p, other, rtol=1e-7, atol=1e-8)
        assert p.requires_grad
        assert p.grad is None
    for mine, other in zip(results[0].history, results[1].history, strict=True):
        assert mine["fvu"] == pytest.approx(other["fvu"], rel=1e-7)
        assert mine["dead"] == other["dead"]


def test_the_fused_update_is_repeatable_whatever_the_threads():
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, threads, threads + 1):
            torch.set_num_threads(count)
            found.append(run(TopKSAE, "fused", steps=20, dead_after_tokens=10**9).sae)
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name in ("W_enc", "W_dec", "b_enc"):
            assert torch.equal(getattr(other, name), getattr(found[0], name)), name


def test_what_is_fused():
    def sae():
        return TopKSAE(8, 16, k=2)

    auto, fused = TrainConfig(), TrainConfig(update="fused")
    assert why_not_fused(sae(), auto) is None
    assert type(make_update(sae(), auto)) is type(make_update(sae(), fused)) is FusedUpdate
    assert type(make_update(sae(), TrainConfig(update="autograd"))) is AutogradUpdate
    frozen, replaced = sae(), sae()
    frozen.b_dec.requires_grad_(False)
    replaced.W_enc_rows = torch.nn.Parameter(torch.randn(8, 16).t())
    mine = type("Mine", (TopKSAE,), {"decode": lambda self, acts: acts}, register=False)
    for module, reason in (
        (sae().to(torch.bfloat16), "the parameters are torch.bfloat16"),
        (frozen, "b_dec is frozen"),
        (replaced, "W_enc_rows is not contiguous"),
        (mine(8, 16, k=2), "Mine overrides decode"),
    ):
        assert reason in why_not_fused(module, auto)
        assert type(make_update(module, auto)) is AutogradUpdate
        with pytest.raises(ValueError, match=f"expected update='fused' to apply, but .*{reason}"):
            make_update(module, fused)
    for module in (TopKSAE(8, 16, k=2, multi_topk=True), GatedSAE(8, 16, k=2)):
        assert type(make_update(module, fused)) is FusedUpdate
    assert "sgd_sai" in why_not_fused(sae(), TrainConfig(optimizer="sgd_sai"))


def test_a_replaced_encoder_matrix_still_trains():
    """A new parameter may lie in any way; the fused update would refuse it."""
    sae = TopKSAE(D_IN, D_SAE, k=4)
    sae.W_enc_rows = torch.nn.Parameter(torch.randn(D_IN, D_SAE).t())
    before = sae.W_enc.detach().clone()
    Trainer(sae, rows(), TrainConfig(batch_size=50, steps=3, progress=False)).fit()
    assert not torch.equal(sae.W_enc, before)


def test_what_the_product_is_computed_in():
    sae = TopKSAE(8, 16, k=2)
    bfloat16 = torch.bfloat16
    assert compute_dtype(sae, TrainConfig(compute_dtype="float32")) is None
    assert compute_dtype(sae, TrainConfig(compute_dtype="bfloat16")) is bfloat16
    assert compute_dtype(sae, TrainConfig()) is (bfloat16 if _library.has_bf16() else None)
    assert compute_dtype(sae.double(), TrainConfig(compute_dtype="bfloat16")) is None


@pytest.mark.skipif(not _library.has_bf16(), reason="the processor has no such product")
def test_inference_is_exact_after_a_bfloat16_product():
    sae = TopKSAE(D_IN, D_SAE, k=4)
    config = TrainConfig(batch_size=50, steps=5, compute_dtype="bfloat16", progress=False)
    Trainer(sae, rows(), config).fit()
    x = rows()[:100]
    rounded = sae.encode_for_training(x, StepContext(compute_dtype=torch.bfloat16))
    assert not torch.equal(rounded.values, sae.encode_sparse(x).values)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(sae.encode_sparse(x).values.sum(), pre.topk(4).values.relu().sum())


def test_wrong_choices():
    with pytest.raises(ValueError, match=r"expected update in auto, fused, autograd, got 'fast'"):
        TrainConfig(update="fast")
    with pytest.raises(ValueError, match=r"compute_dtype in auto, float32, bfloat16, got 'half'"):
        TrainConfig(compute_dtype="half")
