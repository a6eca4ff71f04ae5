"""The comparison with other libraries: it hides no difference, with or without them."""

import importlib
import math

import pytest
import torch

from parity.__main__ import CASES, MODULES, run, unavailable
from parity.compare import Comparison, Differs, compare, difference, table
from parity.problem import problem


def test_a_difference_in_one_number_is_found():
    ours = {"loss": torch.tensor(2.0), "gradient of b_dec": torch.ones(3, 4)}
    theirs = {name: tensor.clone() for name, tensor in ours.items()}
    (row,) = compare("A", "B", Comparison("training", ours, theirs))
    assert row.ok
    assert table([row]).splitlines()[-1] == (
        "| A | B | training: loss, gradients (b_dec) | 0.0e+00 | equal |"
    )
    theirs["gradient of b_dec"][1, 2] += 1e-4
    (row,) = compare("A", "B", Comparison("training", ours, theirs))
    assert not row.ok
    assert row.verdict == "DIFFERS: gradient of b_dec"
    assert row.difference == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("theirs", [torch.ones(3, 1), torch.tensor([1.0, math.nan, 1.0])])
def test_another_shape_and_nan_are_differences(theirs):
    assert difference(torch.ones(3), theirs) == math.inf


def test_zeros_are_no_evidence():
    assert difference(torch.zeros(3), torch.zeros(3)) == math.inf


@pytest.mark.parametrize(("ratio", "ok"), [(0.5, True), (0.6, False), (None, True)])
def test_a_known_ratio_is_checked_and_does_not_cover_other_quantities(ratio, ok):
    ours, theirs = {"aux": torch.ones(2), "fvu": torch.ones(())}, {"aux": torch.full((2,), 0.5)}
    theirs["fvu"] = torch.tensor(1.1)
    differs = {"aux": Differs("a reason", ratio)}
    equal, known = compare("A", "B", Comparison("training", ours, theirs, differs))
    assert not equal.ok
    assert known.ok == ok
    assert "0.5" in known.verdict
    assert "a reason" in known.verdict


def test_every_case_has_a_row_without_the_other_libraries(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

    monkeypatch.setattr(importlib, "import_module", absent)
    rows = run(problem())
    assert [row.ours for row in rows] == [case[0] for case in CASES]
    assert {row.verdict for row in rows} == {"not installed"}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # other libraries warn about themselves
@pytest.mark.parametrize("package", MODULES)
def test_what_has_to_be_equal_is_equal(package):
    reason = unavailable(package)
    if reason:
        pytest.skip(f"{package}: {reason}; pip install 'fastsae[bench]'")
    rows = run(problem(), package)
    assert {row.ours for row in rows} == {case[0] for case in CASES if case[2] == package}
    assert [row for row in rows if not row.ok] == []
