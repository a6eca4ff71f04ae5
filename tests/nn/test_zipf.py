"""Zipf's law: the fit, budgets that follow it, and who falls short of it."""

import pytest
import torch

from fastsae.nn.zipf import budgets, fit_zipf, underused
from tests.properties import given, settings, st


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.3])
def test_a_law_is_found_in_any_order(exponent):
    law = 0.2 * torch.arange(1, 301).double() ** -exponent
    shuffled = torch.randperm(300)
    fit = fit_zipf(law[shuffled])
    assert abs(float(fit.exponent) - exponent) < 1e-9
    torch.testing.assert_close(fit.expected, law)
    torch.testing.assert_close(law[shuffled][fit.order], law)


def test_the_tail_does_not_count():
    law = torch.arange(1, 301).double() ** -0.7
    broken = torch.where(torch.arange(300) < 200, law, 1e-9)
    assert abs(float(fit_zipf(broken, smallest=1e-6).exponent) - 0.7) < 1e-9
    assert float(fit_zipf(broken).exponent) > 1


def test_nothing_to_fit_is_flat():
    for density in (torch.zeros(5), torch.tensor([0.0, 0.3, 0.0])):
        fit = fit_zipf(density)
        assert fit.exponent == 0
        assert fit.expected.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.floats(0, 1), st.integers(0, 2**31))
def test_budgets_add_up(F, most, fill, seed):
    share = torch.rand(F, generator=torch.Generator().manual_seed(seed)) ** 4
    total = int(fill * F * most)
    m = budgets(share, total, most)
    assert m.sum() == total
    assert m.min() >= (1 if total >= F else 0)
    assert m.max() <= most
    # More share, not less budget.
    order = share.argsort(descending=True)
    assert (m[order].diff() <= 0).all()


def test_budgets_are_proportional_and_rounded_by_the_largest_remainder():
    assert budgets(torch.tensor([5.0, 3.0, 2.0]), 13, 100).tolist() == [6, 4, 3]
    assert budgets(torch.ones(4), 6, 100).tolist() == [2, 2, 1, 1]
    assert budgets(torch.tensor([1000.0, 1.0, 1.0]), 12, 8).tolist() == [8, 2, 2]
    with pytest.raises(ValueError, match=r"budgets: expected total in 0\.\.6, got 7"):
        budgets(torch.ones(3), 7, 2)


def test_underused_is_what_falls_under_the_line_and_only_the_dead_in_the_limit():
    law = 0.2 * torch.arange(1, 301).double() ** -0.8
    law[290:] = 0
    law[250] *= 1e-3
    found = underused(law, 0.5, smallest=1e-5)
    assert found[250]
    assert found[290:].all()
    assert not found[:200].any()
    assert torch.equal(underused(law, 1e-9, smallest=1e-5), law == 0)
