"""Metrics equal their definitions computed by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastsae.data.source import TensorSource
from fastsae.eval import FVU, evaluate, fvu, norm_limit
from fastsae.nn import Columns
from fastsae.types import SparseActs


class Dense(nn.Module):
    """An SAE in plain torch: relu(x W) V, every positive latent active."""

    def __init__(self, d_in: int = 6, d_sae: int = 10) -> None:
        super().__init__()
        self.d_in, self.d_sae = d_in, d_sae
        self.columns = Columns((d_in,))
        self.W_enc_rows = nn.Parameter(torch.randn(d_sae, d_in))
        self.W_dec = nn.Parameter(torch.randn(d_sae, d_in))

    @property
    def W_enc(self):
        return self.W_enc_rows.t()

    def encode_sparse(self, x):
        assert not self.training
        return SparseActs.from_dense((x @ self.W_enc - 1).relu())

    def decode(self, acts):
        return acts.to_dense() @ self.W_dec

    def reconstruct(self, x, acts):
        return self.decode(acts)


def by_hand(x, x_hat):
    x, x_hat = x.double(), x_hat.double()
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def test_fvu_is_pooled_and_centred():
    x = torch.randn(50, 6) * 3 + 100
    x_hat = x + torch.randn(50, 6)
    assert fvu(x, x_hat) == pytest.approx(by_hand(x, x_hat), rel=1e-12)
    assert fvu(x, x) == 0
    assert fvu(x, x.double().mean(0).expand_as(x)) == pytest.approx(1, rel=1e-9)


def test_one_outlier_hides_a_bad_reconstruction():
    x = torch.randn(1000, 6)
    x_hat = x + 0.5 * torch.randn(1000, 6)
    assert fvu(x, x_hat) > 0.2
    x[0] = x_hat[0] = 300.0
    assert fvu(x, x_hat) < 0.003


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [7, 0, 30, 13]])
def test_batches_do_not_change_the_numbers(sizes):
    x = torch.randn(50, 6) + 1e4  # a large mean, where sum x^2 - (sum x)^2 / n would cancel
    x_hat = x + 0.3 * torch.randn(50, 6)
    total = FVU()
    for a, b in zip(x.split(sizes), x_hat.split(sizes), strict=True):
        total.update(a, b)
    assert total.value == pytest.approx(by_hand(x, x_hat), rel=1e-10)
    mse = (x.double() - x_hat.double()).square().sum(1).mean()
    assert total.mse == pytest.approx(float(mse), rel=1e-12)
    torch.testing.assert_close(total.mean, x.double().mean(0))


def test_nothing_to_measure_is_nan():
    assert math.isnan(FVU().value)
    assert math.isnan(FVU().mse)
    assert math.isnan(fvu(torch.ones(3, 2), torch.ones(3, 2)))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"to be \[n, d\], got \[3, 2\] and \[3, 1\]"):
        fvu(torch.zeros(3, 2), torch.zeros(3, 1))


def test_zeros_do_not_fire():
    values = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    indices = torch.tensor([[0, 1], [0, 3]], dtype=torch.int32)
    assert SparseActs(values, indices, None, 5).counts().tolist() == [2, 0, 0, 1, 0]


def test_norm_limit_is_a_multiple_of_the_median():
    x = torch.diag(torch.tensor([1.0, 2.0, 9.0]))
    assert norm_limit(x, 3.0) == 6.0


@pytest.mark.parametrize("batch_size", [7, 64, 1000])
def test_evaluate_equals_the_definitions(batch_size):
    sae = Dense().train()
    x = torch.randn(200, 6)
    x[17] *= 100
    result = evaluate(sae, x, batch_size=batch_size)
    assert sae.training
    with torch.no_grad():
        code = (x @ sae.W_enc - 1).relu()
        x_hat = code @ sae.W_dec
    small = torch.arange(200) != 17
    assert result.rows == 200
    assert result.outliers == 1
    assert result.fvu == pytest.approx(by_hand(x, x_hat), rel=1e-6)
    assert result.fvu_inliers == pytest.approx(by_hand(x[small], x_hat[small]), rel=1e-6)
    assert result.mse == pytest.approx(float((x - x_hat).square().sum(1).mean()), rel=1e-5)
    assert result.l0 == pytest.approx(float((code > 0).sum(1).double().mean()))
    assert result.dead == int((code == 0).all(0).sum())
    torch.testing.assert_close(result.frequency, (code > 0).double().mean(0))
    assert set(result.to_dict()) >= {"fvu", "fvu_inliers", "mse", "l0", "dead", "d_sae", "rows"}


def test_evaluate_reads_any_source():
    sae = Dense()
    x = torch.randn(200, 6)
    x[17] *= 100
    whole = evaluate(sae, x).to_dict()
    for source in (TensorSource(x), list(x.split(31)), iter(x.split(31))):
        assert evaluate(sae, source, batch_size=13).to_dict() == pytest.approx(whole, rel=1e-6)


def test_dead_latents_are_those_that_never_fire():
    sae = Dense()
    with torch.no_grad():
        sae.W_enc[:, [2, 5]] = 0
    assert evaluate(sae, torch.randn(500, 6)).dead == 2


def test_max_rows_and_empty_data():
    assert evaluate(Dense(), torch.randn(100, 6), batch_size=30, max_rows=50).rows == 50
    with pytest.raises(ValueError, match="expected at least one row, got none"):
        evaluate(Dense(), torch.zeros(0, 6))
    with pytest.raises(ValueError, match=r"expected floating x \[n, d_in\], got .* \[2, 3, 6\]"):
        evaluate(Dense(), torch.zeros(2, 3, 6))
