"""Transcoders and crosscoders: several blocks of columns, their scales, and what they compute."""

import pytest
import torch

import fastsae
from fastsae import (
    BatchTopKTranscoder,
    CrossCoder,
    JumpReLUTranscoder,
    ReLUCrossCoder,
    ReLUTranscoder,
    TopKCrossCoder,
    TopKSAE,
    TrainConfig,
    Trainer,
    Transcoder,
)
from fastsae.nn import ActivationScaler, StepContext
from fastsae.nn.parallel import ALONE
from tests.nn.randomized import make, rows

TRANSCODERS = (Transcoder, BatchTopKTranscoder, JumpReLUTranscoder, ReLUTranscoder)
CROSSCODERS = (CrossCoder, TopKCrossCoder, ReLUCrossCoder)


@pytest.mark.parametrize("skip", [False, True])
def test_transcoder_loss_and_gradients_are_the_written_ones(skip):
    coder = make(Transcoder, 6, 4, 16, 3, skip=skip)
    x, y = rows(20, 6), rows(20, 4)
    out = coder.loss(x, y)
    z = (x @ coder.W_enc + coder.b_enc).relu()
    f = z * torch.zeros_like(z).scatter(1, z.topk(3).indices, 1.0)
    y_hat = f @ coder.W_dec + coder.b_dec
    if skip:
        y_hat = y_hat + x @ coder.W_skip.t()
    expected = (y - y_hat).square().sum() / ALONE.total_variance(y)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.reconstruction, y_hat)
    torch.testing.assert_close(coder(x.reshape(4, 5, 6)), y_hat.reshape(4, 5, 4))
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, list(coder.parameters())),
        torch.autograd.grad(expected, list(coder.parameters())),
    )


def test_dead_latents_of_a_transcoder_reconstruct_what_is_left_of_the_output():
    coder = make(Transcoder, 6, 4, 16, 1)
    x, y = rows(20, 6), rows(20, 4)
    dead = torch.arange(16) < 4
    out = coder.loss(x, y, context=StepContext(dead=dead))
    residual = (y - out.reconstruction).detach()
    z = (x @ coder.W_enc[:, :4] + coder.b_enc[:4]).relu()
    k = min(coder.k_aux, 4)
    guess = (z * torch.zeros_like(z).scatter(1, z.topk(k).indices, 1.0)) @ coder.W_dec[:4]
    torch.testing.assert_close(
        out.aux_loss, (residual - guess).square().sum() / ALONE.total_variance(residual)
    )


@pytest.mark.parametrize("cls", TRANSCODERS)
def test_scales_fold_away(cls):
    a, b = (make(cls, 6, 4, 16, 3, skip=True) for _ in range(2))
    x, y = rows(20, 6), rows(20, 4)
    a.loss(2 * x, 8 * y)
    b.loss(2 * x, 8 * y)
    ActivationScaler(b.columns, [2, 8]).fold_(b)
    a.eval()
    b.eval()
    torch.testing.assert_close(b(x), a(2 * x) / 8)
    torch.testing.assert_close(b.encode(x), a.encode(2 * x) / 8)
    assert torch.equal(a.W_dec, b.W_dec)


@pytest.mark.parametrize("cls", TRANSCODERS)
def test_training_a_transcoder_finds_a_sparse_map(cls, tmp_path):
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 16), dim=1)
    code = (torch.rand(6000, 24) < 0.08) * (1 + torch.rand(6000, 24))
    x = 5 * code @ directions + 10
    y = 300 * code @ torch.nn.functional.normalize(torch.randn(24, 12), dim=1) - 50
    data = torch.cat([x, y], 1)
    coder = cls(16, 12, 48, 3)
    config = TrainConfig(batch_size=250, epochs=15, lr=3e-3, progress=False, out=tmp_path)
    final = Trainer(coder, data[:5000], config, val=data[5000:]).fit().final
    assert final["val_fvu"] < (0.9 if cls in (ReLUTranscoder, JumpReLUTranscoder) else 0.6)
    error = (y[5000:] - coder(x[5000:])).square().sum(1).mean().item()
    assert final["val_mse"] == pytest.approx(error, rel=1e-3)
    again = fastsae.load(tmp_path)
    assert type(again) is cls
    torch.testing.assert_close(again(x[:99]), coder(x[:99]))
    norms = coder.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize(
    "build", [lambda: Transcoder(6, 4, 16, 3), lambda: TopKCrossCoder(5, 2, 16, 3)]
)
def test_the_trainer_starts_a_fresh_module_and_keeps_a_trained_one(build):
    fresh, trained = build(), build()
    x = torch.cat([torch.randn(50, 5), 9 * torch.randn(50, 5)], 1) + 7
    start = {"b_dec_init": "zeros", "weight_init": "random"}
    config = TrainConfig(batch_size=10, steps=5, progress=False, **start)
    before = [p.clone() for p in fresh.parameters()]
    trainer = Trainer(fresh, None, config)
    trainer.prepare(x)
    assert not trainer.scaler.keeps_matrices
    for p, q in zip(fresh.parameters(), before, strict=True):
        assert torch.equal(p, q)
    with torch.no_grad():
        trained.b_enc[3] = 0.5
    given = trained.columns.split(x).x
    wanted = trained(given)
    config = TrainConfig(batch_size=10, steps=5, progress=False)
    trainer = Trainer(trained, None, config)
    trainer.prepare(x)
    scaled = trainer.scaler.scale(x)
    got = trainer.scaler.unscale_target(trained(trained.columns.split(scaled).x))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    trainer.finish()
    torch.testing.assert_close(trained(given), wanted, rtol=1e-4, atol=1e-5)


def test_what_a_transcoder_does_not_take():
    coder = Transcoder(6, 4, 16, 3)
    with pytest.raises(ValueError, match="expected a target, the layer's output y, got None"):
        coder.loss(torch.ones(2, 6))
    with pytest.raises(
        ValueError, match=r"target to be \[..., d_out\] with d_out = 4, got \[2, 6\]"
    ):
        coder.loss(torch.ones(2, 6), torch.ones(2, 6))
    with pytest.raises(ValueError, match="expected d_out >= 1, got 0"):
        Transcoder(6, 0, 16, 3)
    with pytest.raises(
        ValueError, match=r"expected k to be an integer in 1..d_sae = 16, got k = None"
    ):
        Transcoder(6, 4, 16)
    with pytest.raises(ValueError, match="expected 2 scales above 0 and finite, got"):
        ActivationScaler(coder.columns, [1, 0]).fold_(coder)


def test_a_transcoder_latent_is_the_sum_of_what_feeds_it():
    """Through a frozen norm, upstream latents, their bias and their error make a pre-activation."""
    upstream, coder = make(TopKSAE, 6, 16, 3), make(Transcoder, 6, 4, 24, 3)
    x, scale = rows(20, 6), 1 + torch.rand(20, 1, dtype=torch.float64)
    acts = upstream.encode(x)
    error = x - upstream(x)
    latents = torch.einsum("nf,fd,dj,n->nfj", acts, upstream.W_dec, coder.W_enc, 1 / scale[:, 0])
    rest = (upstream.b_dec + error) / scale @ coder.W_enc + coder.b_enc
    z = x / scale @ coder.W_enc + coder.b_enc
    torch.testing.assert_close(latents.sum(1) + rest, z)


@pytest.mark.parametrize("cls", CROSSCODERS)
def test_a_crosscoder_is_the_written_sum_over_layers(cls):
    coder = make(cls, 4, 3, 16, 3)
    x = rows(20, 12)
    out = coder.loss(x)
    layers = x.reshape(20, 3, 4)
    W_enc, b_dec = coder.W_enc.reshape(3, 4, 16), coder.b_dec.reshape(3, 4)
    z = sum((layers[:, i] - b_dec[i]) @ W_enc[i] for i in range(3)) + coder.b_enc
    f = out.acts.to_dense()
    torch.testing.assert_close(f, torch.where(f != 0, z, 0))
    W_dec = coder.W_dec.reshape(16, 3, 4)
    for i in range(3):
        x_hat = coder.layers(out.reconstruction)[:, i]
        torch.testing.assert_close(x_hat, f @ W_dec[:, i] + b_dec[i])
    torch.testing.assert_close(coder.layer_norms(), W_dec.norm(dim=2))


@pytest.mark.parametrize("cls", CROSSCODERS)
def test_scales_of_layers_fold_away(cls):
    a, b = (make(cls, 4, 3, 16, 3) for _ in range(2))
    x = rows(20, 12)
    factor = torch.tensor([2.0, 8, 0.5]).double().repeat_interleave(4)
    a.loss(factor * x)
    b.loss(factor * x)
    ActivationScaler(b.columns, [2, 8, 0.5]).fold_(b)
    a.eval()
    b.eval()
    torch.testing.assert_close(b(x), a(factor * x) / factor)
    ActivationScaler(b.columns, [1 / 2, 1 / 8, 1 / 0.5]).fold_(b)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("cls", CROSSCODERS)
def test_training_gives_layers_of_different_size_the_same_weight(cls, tmp_path):
    torch.manual_seed(0)
    code = (torch.rand(6000, 24) < 0.08) * (1 + torch.rand(6000, 24))
    directions = torch.nn.functional.normalize(torch.randn(2, 24, 12), dim=2)
    directions[1, :8] = 0  # eight features of the first layer alone
    small, large = code @ directions[0] + 3, 1000 * code @ directions[1]
    data = torch.cat([small, large], 1)
    coder = cls(12, 2, 48, 3)
    config = TrainConfig(batch_size=250, epochs=15, lr=3e-3, progress=False, out=tmp_path)
    Trainer(coder, data[:5000], config).fit()
    x_hat = coder.layers(coder(data[5000:])).detach()
    fvu = [
        float(
            (layer[5000:] - x_hat[:, i]).square().sum()
            / (layer[5000:] - layer[5000:].mean(0)).square().sum()
        )
        for i, layer in enumerate((small, large))
    ]
    assert max(fvu) < (0.8 if cls is ReLUCrossCoder else 0.4)
    assert max(fvu) < 2 * min(fvu)
    again = fastsae.load(tmp_path)
    assert type(again) is cls
    torch.testing.assert_close(again(data[:99]), coder(data[:99]))


def test_a_crosscoder_of_one_layer_is_the_sae():
    a, b = make(TopKCrossCoder, 6, 1, 16, 3), make(TopKSAE, 6, 16, 3)
    x = rows(20, 6)
    assert torch.equal(a.loss(x).loss, b.loss(x).loss)
    with pytest.raises(ValueError, match="expected n_layers >= 1, got 0"):
        CrossCoder(6, 0, 16, 3)
