"""Each part of an SAE's error is what plain least squares and plain forward passes say."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional as F

from fastsae.analysis import dark_matter, error_anatomy, error_cost, fit_linear_error, token_errors
from fastsae.models import replace
from fastsae.nn import TopKSAE, Transcoder
from tests.analysis.test_error import D, Planted, matrix, random_sae, rows
from tests.models import tiny

CONTEXTS = torch.randint(3, tiny.VOCAB, (5, 14), generator=torch.Generator().manual_seed(3))


def regression(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.linalg.lstsq(x, y).solution


def mean_r2(y: torch.Tensor, y_hat: torch.Tensor) -> float:
    return float((1 - (y - y_hat).square().sum(0) / (y - y.mean(0)).square().sum(0)).mean())


def fvu(y: torch.Tensor, left: torch.Tensor) -> float:
    return float(left.square().sum() / (y - y.mean(0)).square().sum())


def test_errors_of_tokens_are_those_of_least_squares():
    sae, fit, held_out = random_sae(), rows(400), rows(90)
    got = token_errors(sae, fit_linear_error(sae, fit, batch_size=37), held_out, batch_size=40)
    e_fit, e = ((x - sae(x)).detach() for x in (fit, held_out))
    linear = held_out @ regression(fit, e_fit)
    square = held_out @ regression(fit, e_fit.square().sum(1, keepdim=True))
    expected = (
        held_out.norm(dim=1), e.norm(dim=1), linear.norm(dim=1), (e - linear).norm(dim=1),
        square[:, 0],
    )  # fmt: skip
    for name, value in zip(vars(got), expected, strict=True):
        torch.testing.assert_close(getattr(got, name), value, rtol=1e-9, atol=1e-9)


def loss_by_hand(model, fn) -> float:
    """The mean loss of predictions made from position 1 on, with rows from there on replaced."""
    with torch.no_grad(), replace(model, "resid_post.1", fn):
        logits = model(input_ids=CONTEXTS).logits[:, 1:-1]
    return float(F.cross_entropy(logits.flatten(0, 1), CONTEXTS[:, 2:].flatten()))


def test_costs_of_the_parts_are_losses_of_plain_passes():
    model, sae = tiny.tiny_model(), TopKSAE(tiny.D, 40, k=3).eval()
    linear = fit_linear_error(sae, torch.randn(300, tiny.D))
    B = linear.vector.float()
    got = error_cost(model, "resid_post.1", sae, linear, CONTEXTS.tolist(), batch_size=2)
    assert got.tokens == 5 * 12
    for name, fn in (
        ("clean", lambda x: x),
        ("sae", sae),
        ("linear_added", lambda x: sae(x) + x @ B),
        ("nonlinear_added", lambda x: x - x @ B),
    ):
        assert getattr(got, name) == pytest.approx(loss_by_hand(model, fn), abs=1e-5)
    lost = got.sae - got.clean
    assert got.recovered_by_linear == pytest.approx(1 - (got.linear_added - got.clean) / lost)
    assert got.recovered_by_nonlinear == pytest.approx(1 - (got.nonlinear_added - got.clean) / lost)


def test_a_linear_error_costs_all_of_the_loss():
    """x - sae(x) = x / 2: adding it gives x back."""

    class Half(TopKSAE, register=False):
        def forward(self, x):
            return x / 2

        def reconstruct(self, x, acts):
            return x / 2

    sae = Half(tiny.D, 40, k=3)
    linear = fit_linear_error(sae, torch.randn(300, tiny.D))
    got = error_cost(tiny.tiny_model(), "resid_post.1", sae, linear, CONTEXTS.tolist())
    assert abs(got.sae - got.clean) > 1e-2
    assert got.recovered_by_linear == pytest.approx(1, abs=1e-4)
    assert got.recovered_by_nonlinear == pytest.approx(0, abs=1e-4)


def test_the_linear_part_of_a_transcoder_is_a_map_of_what_it_reads():
    model = tiny.tiny_model()
    coder = Transcoder(tiny.D, tiny.D, 30, k=2)
    linear = fit_linear_error(coder, torch.randn(300, 2 * tiny.D))
    sites = ("mlp_in.1", "mlp_out.1")
    got = error_cost(model, sites, coder, linear, CONTEXTS.tolist())
    read = {}

    def keep(x):
        read["x"] = x
        return x

    with torch.no_grad(), replace(model, "mlp_in.1", keep):
        expected = loss_at(model, lambda own: own - read["x"] @ linear.vector.float())
    assert got.nonlinear_added == pytest.approx(expected, abs=1e-5)


def loss_at(model, fn) -> float:
    with replace(model, "mlp_out.1", fn):
        logits = model(input_ids=CONTEXTS).logits[:, 1:-1]
    return float(F.cross_entropy(logits.flatten(0, 1), CONTEXTS[:, 2:].flatten()))


@pytest.mark.parametrize("batch_size", [64, 4096])
def test_maps_of_earlier_outputs_are_least_squares(batch_size):
    sae, fit, held_out = random_sae(), rows(400), rows(150)
    e_fit, e = ((x - sae(x)).detach() for x in (fit, held_out))
    mix = torch.randn(D, 7, dtype=torch.float64)
    s_fit, s = ((y @ mix).tanh() for y in (e_fit, e))
    found = dark_matter([sae], fit, held_out, earlier={"before": (s_fit, s)}, batch_size=batch_size)
    got = found.saes[0].earlier["before"]
    B = regression(fit, e_fit)
    M, M_linear = regression(s_fit, e_fit), regression(s_fit, fit @ B)
    linear, nonlinear = held_out @ B, e - held_out @ B
    M_left = regression(s_fit, e_fit - fit @ B)
    assert vars(got) == pytest.approx(
        {
            "r2_error": mean_r2(e, s @ M),
            "r2_linear": mean_r2(linear, s @ M_linear),
            "r2_nonlinear": mean_r2(nonlinear, s @ (M - M_linear)),
            "fvu": fvu(held_out, e - s @ M),
            "fvu_nonlinear": fvu(held_out, nonlinear - s @ M_left),
        },
        rel=1e-8,
    )
    assert got.r2_error > 0.3


def test_pursuit_finds_what_a_bad_encoder_misses():
    """W_dec is the identity and x has two entries; the encoder reads each one column too far."""
    sae = TopKSAE(D, D, k=2, dtype=torch.float64)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(D))
        sae.W_enc_rows.copy_(torch.eye(D).roll(1, 1))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    x = torch.zeros(600, D, dtype=torch.float64)
    x.scatter_(1, torch.rand(600, D).topk(2).indices, 1 + torch.rand(600, 2, dtype=torch.float64))
    found = dark_matter([sae], x[:400], x[400:], pursuit_rows=300).saes[0].pursuit
    assert found.rows == 300
    assert vars(found.own) == pytest.approx(vars(error_anatomy(sae, x[:300], x[400:])))
    assert found.own.fvu > 0.5
    assert found.pursuit.fvu < 1e-2


def test_errors_of_the_same_tokens_go_together():
    """One SAE with half the error of another, and one whose error is noise."""
    torch.manual_seed(0)
    A, none = matrix(), torch.zeros(D, D, dtype=torch.float64)
    saes = [Planted(A), Planted(A / 2), Planted(none, 1.0)]
    fit, held_out = rows(600), rows(500)
    found = dark_matter(saes, fit, held_out)
    assert float(found.correlation[0, 1]) == pytest.approx(1)
    assert abs(float(found.correlation[0, 2])) < 0.2
    assert found.r2_by_norm == pytest.approx([1, 1, float(found.correlation[0, 2]) ** 2])
    assert all(b >= a - 1e-9 for a, b in zip(found.r2_by_norm, found.r2_by_parts, strict=True))
    first = found.saes[0]
    assert first.anatomy == error_anatomy(saes[0], fit, held_out)
    assert (first.d_sae, first.l0, first.cost, first.pursuit) == (20, 3.0, None, None)


@pytest.mark.parametrize(
    ("saes", "arguments", "message"),
    [
        ([], {}, "expected SAEs of the same columns, got none"),
        (
            [Transcoder(D, 5, 30, k=2), TopKSAE(D, 20, k=3)],
            {},
            "expected SAEs of the same columns, got (12, 5), (12,)",
        ),
        (
            [Transcoder(D, 5, 30, k=2)],
            {"pursuit_rows": 9},
            "expected pursuit_rows = 0 for Transcoder, whose output is not what it reads, got 9",
        ),
        ([TopKSAE(D, 20, k=3)], {"model": torch.nn.Linear(1, 1)},
         "expected a site and contexts with a model, got none"),
        ([TopKSAE(D, 20, k=3)], {"earlier": {"a": (torch.ones(50, 2), torch.ones(29, 2))}},
         "expected outputs of an earlier SAE to be [n, d] with n = 30, got [29, 2]"),
    ],
)  # fmt: skip
def test_refusals_say_what_was_expected(saes, arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'dark_matter: {message}')}$"):
        dark_matter(saes, torch.randn(50, D), torch.randn(30, D), **arguments)
