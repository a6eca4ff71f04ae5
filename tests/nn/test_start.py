"""Where training starts: directions of the data, and the length of encoder rows."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.testing import assert_close

import fastsae
from fastsae import TrainConfig, Trainer
from fastsae.nn.init import directions
from fastsae.nn.loss import squared_error


def data(n: int = 600, d: int = 16) -> torch.Tensor:
    """Rows around a center that is far from 0."""
    torch.manual_seed(0)
    return torch.randn(n, 4) @ torch.randn(4, d) + 0.1 * torch.randn(n, d) + 5


def test_directions_are_rows_of_the_data_and_some_noise() -> None:
    # In 400 dimensions noise is all but orthogonal to a row: cosines of 1 / sqrt(1 + 1/4).
    x = torch.randn(50, 400)
    w = directions(x, 120, seed=3)
    assert_close(w.norm(dim=1), torch.ones(120))
    cosine = w @ torch.nn.functional.normalize(x).t()
    nearest, of = cosine.max(1)
    assert_close(nearest, torch.full((120,), math.sqrt(0.8)), rtol=0, atol=0.1)
    assert of.bincount(minlength=50).max() == 3  # 120 of 50 rows: every one twice or thrice
    assert of.bincount(minlength=50).min() == 2
    assert (w @ w.t() - torch.eye(120)).max() < 0.9  # those of one row differ by their noise
    assert torch.equal(w, directions(x, 120, seed=3))
    assert not torch.equal(w, directions(x, 120, seed=4))


def test_directions_are_half_whitened() -> None:
    """The fourth root of the spread of one axis remains, of 256 as much as of the others."""
    x = torch.randn(4000, 64)
    x[:, 0] *= 256
    u = directions(x, 4000)
    unit = torch.nn.functional.normalize(x)
    white = unit * torch.tensor([256**-0.5, *[1.0] * 63])
    along = torch.nn.functional.normalize(white) * math.sqrt(0.8)  # noise has the rest
    assert_close(u[:, 0].abs().mean(), along[:, 0].abs().mean(), rtol=0.15, atol=0)
    assert u[:, 0].abs().mean() < 0.9 * unit[:, 0].abs().mean()


SAES = {
    "TopK": lambda: fastsae.TopKSAE(16, 64, 4),
    "AbsTopK": lambda: fastsae.TopKSAE(16, 64, 4, absolute=True),
    "BatchTopK": lambda: fastsae.BatchTopKSAE(16, 64, 4),
    "FeatureChoice": lambda: fastsae.FeatureChoiceSAE(16, 64, 4),
    "Matryoshka": lambda: fastsae.MatryoshkaSAE(16, 64, 4),
    "GroupMax": lambda: fastsae.GroupMaxSAE(16, 64, 4),
    "JumpReLU": lambda: fastsae.JumpReLUSAE(16, 64, 4),
    "Gated": lambda: fastsae.GatedSAE(16, 64, 4),
    "ReLU": lambda: fastsae.ReLUSAE(16, 64, 4),
    "CrossCoder": lambda: fastsae.CrossCoder(8, 2, 64, 4),
    "Transcoder": lambda: fastsae.Transcoder(8, 8, 64, 4),
    "JumpReLUTranscoder": lambda: fastsae.JumpReLUTranscoder(8, 8, 64, 4, skip=True),
}


@pytest.mark.parametrize("name", SAES)
@torch.no_grad()
def test_no_other_length_of_the_encoder_reconstructs_better(name) -> None:
    """Pre-activations of zero biases scale with the encoder, so selections stay the same."""
    sae, batch = SAES[name]().train(), data()
    sae.initialize_rows_(batch)
    sae.initialize_from_data_(batch)
    sae.fit_encoder_scale_(batch)
    x, target, _ = sae.columns.split(batch)

    def error(factor: float) -> float:
        other = copy.deepcopy(sae)
        other._scale_encoder_(factor)
        return float(squared_error(target, other.reconstruct(x, other._encode(x))))

    best = error(1.0)
    assert best < squared_error(target, sae.b_dec.expand_as(target))
    assert all(error(factor) > best for factor in (0.8, 0.97, 1.03, 1.25))


@pytest.mark.parametrize("name", SAES)
def test_a_trainer_starts_where_the_data_are(name) -> None:
    sae, x = SAES[name](), data()
    before = copy.deepcopy(sae.state_dict())
    Trainer(sae, x, TrainConfig(steps=9, batch_size=50, normalize=False)).prepare()
    inputs = sae.columns.split(x).x
    centered = torch.nn.functional.normalize(inputs - inputs.mean(0))
    rows = torch.nn.functional.normalize(sae.W_enc_rows.detach())
    assert not torch.equal(sae.W_enc_rows, before["W_enc_rows"])
    assert (rows @ centered.t()).max(1).values.min() > 0.5
    if "Transcoder" not in name:
        assert_close(rows, sae.W_dec.detach())


def test_rows_of_a_transcoder_come_from_one_token() -> None:
    """Where y is x turned around, a decoder row is its encoder row turned so."""
    torch.manual_seed(1)
    x = torch.randn(300, 64)
    turn = torch.linalg.qr(torch.randn(64, 64))[0]
    sae = fastsae.Transcoder(64, 64, 200, 4)
    sae.initialize_rows_(torch.cat([x, x @ turn], 1))
    cosine = ((sae.W_enc_rows @ turn) * sae.W_dec).sum(1)
    assert_close(cosine.mean(), torch.tensor(0.8), rtol=0, atol=0.03)  # noise has the rest
    assert_close(sae.W_dec.norm(dim=1), torch.ones(200))


def test_a_transcoder_keeps_its_rows_while_its_biases_start() -> None:
    torch.manual_seed(1)
    x = torch.randn(300, 32) + 2
    y = torch.cat([x, x], 1) / math.sqrt(2)
    sae = fastsae.Transcoder(32, 64, 200, 4)
    sae.initialize_rows_(torch.cat([x, y], 1))
    cosine = (torch.cat([sae.W_enc_rows] * 2, 1) / math.sqrt(2) * sae.W_dec).sum(1)
    assert cosine.min() > 0.5  # the same token
    before = sae.W_dec.clone()
    sae.initialize_from_data_(torch.cat([x, y], 1), "mean")
    assert torch.equal(sae.W_dec, before)
    assert_close(sae.b_enc, -(sae.W_enc_rows @ x.mean(0)))
    assert_close(sae.b_dec, y.mean(0))


def changed_first_row(sae) -> None:
    sae.W_enc_rows.data[0] = torch.ones(16)


def loaded(sae) -> None:
    sae.load_state_dict(fastsae.TopKSAE(16, 64, 4).state_dict())


def assigned(sae) -> None:
    sae.W_enc = torch.randn(16, 64)


def biased(sae) -> None:
    sae.b_enc.data[3] = 0.1


@pytest.mark.parametrize("change", [changed_first_row, loaded, assigned, biased])
def test_weights_that_somebody_set_are_kept(change) -> None:
    sae = fastsae.TopKSAE(16, 64, 4)
    assert sae.is_fresh
    change(sae)
    assert not sae.is_fresh
    before = sae.W_enc_rows.detach().clone()
    Trainer(sae, data(), TrainConfig(steps=9, batch_size=50)).prepare()
    assert torch.equal(sae.W_enc_rows, before)


def test_random_rows_are_those_of_the_constructor() -> None:
    sae = fastsae.TopKSAE(16, 64, 4)
    before = sae.W_enc_rows.detach().clone()
    config = TrainConfig(steps=9, batch_size=50, weight_init="random")
    Trainer(sae, data(), config).prepare()
    assert torch.equal(sae.W_enc_rows, before)
    assert sae.b_dec.any()


@pytest.mark.parametrize("change", [copy.deepcopy, lambda sae: sae.to(torch.bfloat16)])
def test_a_copy_and_another_dtype_are_still_fresh(change) -> None:
    assert change(fastsae.TopKSAE(16, 64, 4)).is_fresh


def test_jumprelu_starts_with_k_latents_a_token() -> None:
    sae, x = fastsae.JumpReLUSAE(16, 64, 4), data()
    Trainer(sae, x, TrainConfig(steps=9, batch_size=50, normalize=False)).prepare()
    with torch.no_grad():
        l0 = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc > sae.threshold).sum(1).float().mean()
    assert l0 == pytest.approx(4, rel=0.02)


def test_what_comes_last_in_the_data_does_not_say_how_long_encoder_rows_are() -> None:
    """First a half in which few directions explain all, then one of noise: of both the length."""
    torch.manual_seed(3)
    low = torch.randn(4000, 3) @ torch.randn(3, 16)
    x = torch.cat([low / low.std(), torch.randn(4000, 16)])
    sae = fastsae.TopKSAE(16, 64, 4)
    trainer = Trainer(sae, x, TrainConfig(steps=2, batch_size=100, progress=False))
    trainer.prepare()

    def best_factor(rows: torch.Tensor) -> float:
        rows = trainer.scaler.scale(rows)
        with torch.no_grad():
            part = sae(rows) - sae.b_dec
            return float((part * (rows - sae.b_dec)).sum() / part.square().sum())

    assert best_factor(x) == pytest.approx(1, abs=0.03)
    assert best_factor(x[:4000]) < 0.95
    assert best_factor(x[4000:]) > 1.05
