"""The linear part of an SAE's error is found where it is planted, and nowhere else."""

from __future__ import annotations

import math
import re

import pytest
import torch

from fastsae.analysis.error import ErrorAnatomy, error_anatomy
from fastsae.nn import BatchTopKSAE, TopKSAE, Transcoder
from fastsae.types import SparseActs

D, N = 12, 2400


class Planted(TopKSAE, register=False):
    """Reconstructs x - x A - noise * (normal numbers)."""

    def __init__(self, A: torch.Tensor, noise: float = 0.0) -> None:
        super().__init__(D, 20, k=3, dtype=torch.float64)
        self.A, self.noise = A, noise

    def reconstruct(self, x: torch.Tensor, acts: SparseActs) -> torch.Tensor:
        return x - x @ self.A - self.noise * torch.randn_like(x)


def rows(n: int = N) -> torch.Tensor:
    """Correlated rows with a mean."""
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.randn(n, D, dtype=torch.float64) @ mix + mix[0]


def matrix() -> torch.Tensor:
    return 0.3 * torch.randn(D, D, dtype=torch.float64)


def random_sae(**kwargs: object) -> TopKSAE:
    return TopKSAE(D, 20, k=3, dtype=torch.float64, **kwargs)


def by_definition(sae: TopKSAE, fit: torch.Tensor, held_out: torch.Tensor) -> ErrorAnatomy:
    """The same numbers from least squares on the rows themselves."""
    e_fit, e = ((x - sae(x)).detach() for x in (fit, held_out))
    guess = held_out @ torch.linalg.lstsq(fit, e_fit).solution
    q_fit, q = e_fit.square().sum(1, keepdim=True), e.square().sum(1, keepdim=True)
    q_guess = held_out @ torch.linalg.lstsq(fit, q_fit).solution

    def r2(y: torch.Tensor, y_hat: torch.Tensor) -> torch.Tensor:
        return 1 - (y - y_hat).square().sum(0) / (y - y.mean(0)).square().sum(0)

    total = (held_out - held_out.mean(0)).square().sum()
    left = (e - guess).square().sum()
    return ErrorAnatomy(
        fvu=float(e.square().sum() / total),
        fvu_nonlinear=float(left / total),
        r2_norm=float(r2(q, q_guess)),
        r2_vector=float(r2(e, guess).mean()),
        r2_vector_pooled=float(1 - left / (e - e.mean(0)).square().sum()),
    )


def test_a_linear_error_is_explained():
    got = error_anatomy(Planted(matrix()), rows(), rows(500))
    assert abs(got.r2_vector - 1) < 1e-6
    assert abs(got.r2_vector_pooled - 1) < 1e-6
    assert got.fvu_nonlinear < 1e-9
    assert got.fvu > 0.1
    assert got.r2_norm < 0.9  # |x A|^2 is not linear in x


def test_noise_is_not_explained():
    """On rows of its own the fit explains d / n of pure noise, on others about minus that."""
    sae, n, noise = Planted(torch.zeros(D, D, dtype=torch.float64), 0.5), 240, rows(24000)
    held_out = error_anatomy(sae, rows(n), noise)
    for r2 in (held_out.r2_vector, held_out.r2_vector_pooled):
        assert -2 * D / n < r2 < -D / n / 2
    assert held_out.r2_norm < 0
    many = error_anatomy(sae, noise, rows(24000))
    assert -0.02 < many.r2_vector < 0.002
    assert many.fvu_nonlinear == pytest.approx(many.fvu, rel=0.01)


def test_half_of_the_error_is_linear():
    """Linear error and noise of the same size: R^2 of about 1/2."""
    sae = Planted(torch.eye(D, dtype=torch.float64), 1.0)
    x = torch.randn(12000, D, dtype=torch.float64)
    got = error_anatomy(sae, x, torch.randn(12000, D, dtype=torch.float64))
    assert got.r2_vector == pytest.approx(0.5, abs=0.02)
    assert got.r2_vector_pooled == pytest.approx(0.5, abs=0.02)
    assert got.fvu == pytest.approx(2, abs=0.05)
    assert got.fvu_nonlinear == pytest.approx(1, abs=0.03)


def test_the_norm_test_is_linear_in_x_without_an_intercept():
    """An error of norm sqrt(x_0) has a squared norm of x_0."""

    class Root(Planted, register=False):
        def reconstruct(self, x: torch.Tensor, acts: SparseActs) -> torch.Tensor:
            return x - torch.nn.functional.normalize(x.roll(1, 1)) * x[:, :1].sqrt()

    x = torch.rand(N, D, dtype=torch.float64)
    got = error_anatomy(Root(matrix()), x[:2000], x[2000:])
    assert abs(got.r2_norm - 1) < 1e-6
    assert got.r2_vector < 0.99

    class Constant(Planted, register=False):
        def reconstruct(self, x: torch.Tensor, acts: SparseActs) -> torch.Tensor:
            return x - 1 - 0.01 * torch.randn_like(x)

    x = torch.randn(N, D, dtype=torch.float64)  # of mean 0: nothing to make an intercept from
    got = error_anatomy(Constant(matrix()), x[:2000], x[2000:])
    assert got.r2_vector < -100
    assert got.fvu_nonlinear == pytest.approx(got.fvu, rel=0.05)


@pytest.mark.parametrize("batch_size", [7, 100, 4096])
def test_every_number_is_the_formula_whatever_the_batch_size(batch_size):
    sae, fit, held_out = random_sae(), rows(500), rows(300)
    got = error_anatomy(sae, fit, held_out, batch_size=batch_size)
    expected = by_definition(sae, fit, held_out)
    assert vars(got) == pytest.approx(vars(expected), rel=1e-9)
    assert abs(got.r2_vector - got.r2_vector_pooled) > 1e-4


def test_on_the_rows_of_the_fit_the_linear_error_never_hurts():
    for sae in (random_sae(), Planted(matrix(), 1.0)):
        x = rows(50)
        got = error_anatomy(sae, x, x)
        assert got.fvu_nonlinear < got.fvu
        assert got.r2_vector > 0


@pytest.mark.parametrize("seed", range(4))
def test_directions_without_variance_take_no_part(seed):
    """A column of zeros and one that repeats another do not disturb the fit."""
    torch.manual_seed(seed)
    x = rows(600)
    x[:, 3], x[:, 5] = 0, x[:, 4]
    got = error_anatomy(Planted(matrix()), x[:400], x[400:])
    assert abs(got.r2_vector - 1) < 1e-6
    A = torch.eye(D, dtype=torch.float64)
    got = error_anatomy(Planted(A), x[:400], x[400:])  # the error of column 3 is 0 on every row
    assert abs(got.r2_vector - 1) < 1e-6


def test_no_error_has_no_anatomy():
    got = error_anatomy(Planted(torch.zeros(D, D, dtype=torch.float64)), rows(50), rows(50))
    assert got.fvu == got.fvu_nonlinear == 0
    assert math.isnan(got.r2_norm)
    assert math.isnan(got.r2_vector)
    assert math.isnan(got.r2_vector_pooled)


def test_the_error_of_a_transcoder_is_a_map_of_its_input():
    """y = x M and a transcoder that gives b_dec alone: the error is x M - b_dec."""
    coder = Transcoder(D, 5, 30, k=2, dtype=torch.float64)
    coder.W_dec = torch.zeros(30, 5, dtype=torch.float64)
    x = rows()
    data = torch.cat([x, x @ torch.randn(D, 5, dtype=torch.float64)], 1)
    got = error_anatomy(coder, data[:2000], data[2000:])
    assert abs(got.r2_vector - 1) < 1e-6
    assert got.fvu > 0.9
    assert got.fvu_nonlinear < 1e-9


def test_the_sae_runs_in_eval_mode_and_in_its_own_dtype():
    sae = BatchTopKSAE(D, 20, k=3).train()
    sae.threshold.fill_(0.1)
    fit, held_out = rows(500), rows(300)
    got = error_anatomy(sae, fit, held_out)
    assert sae.training
    again = error_anatomy(sae.eval(), fit.float(), held_out.float())
    assert vars(got) == pytest.approx(vars(again), rel=1e-9)
    assert not sae.training


@pytest.mark.parametrize(
    ("fit", "held_out", "message"),
    [
        ((11, D), (5, D), "expected fit to be [n, 12] with n >= 12, got [11, 12]"),
        ((30, D), (0, D), "expected held_out to be [n, 12] with n >= 1, got [0, 12]"),
        ((30, D + 1), (5, D), "expected fit to be [n, 12] with n >= 12, got [30, 13]"),
        ((30, D), (5,), "expected held_out to be [n, 12] with n >= 1, got [5]"),
    ],
)
def test_errors_say_what_was_expected(fit, held_out, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'error_anatomy: {message}')}$"):
        error_anatomy(random_sae(), torch.randn(fit), torch.randn(held_out))
