"""The asynchronous units of Hopper as they are emulated, and the product that is made of them.

hopper_cases.cpp has the cases and their expected values; it is a program, so that a mistake can be
planted in it, and a sanitizer can watch it, without Python.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from fastsae import _library
from tests.cuda_emulation import sanitizers
from tests.cuda_emulation.bugs import SIGNS, Bug, plant
from tests.cuda_emulation.hopper_bugs import HOPPER_BUGS

recipe = _library.find("emulated_build.json")
pytestmark = pytest.mark.skipif(recipe is None, reason="built without the emulated kernels")
CASES = Path(__file__).with_name("hopper_cases.cpp")
LAUNCHERS = ("hopper_product", "hopper_topk", "hopper_select", "row_candidates", "block_select")
ORDERS = ("", "reverse", "random", "random:7")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> sanitizers.Build:
    assert recipe is not None
    return sanitizers.Build.of(recipe, tmp_path_factory.mktemp("hopper"))


def program(build: sanitizers.Build, kind: str, bug: Bug | None = None) -> Path:
    """Build the cases and the launcher, with the mistake planted."""
    folder = build.folder / (bug.name.replace(" ", "_") if bug else f"right_{kind}")
    folder.mkdir()
    shutil.copy(CASES, folder)
    csrc = sanitizers.ROOT / "csrc"
    if bug and bug.file == CASES.name:
        plant(bug, folder)
    elif bug:
        csrc = shutil.copytree(csrc, folder / "csrc")
        plant(bug, csrc)
    return build.program(csrc, folder / CASES.name, LAUNCHERS, kind)


@pytest.mark.parametrize("kind", ["plain", "asan", "tsan"])
def test_every_case_in_every_order(build: sanitizers.Build, kind: str) -> None:
    built = program(build, kind)
    for order in ORDERS:
        done = sanitizers.run_program(built, kind, order)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert re.search(r"ran [1-9]\d* cases, 0 wrong", said), said
        assert not sanitizers.REPORT.search(said), said


@pytest.mark.parametrize("bug", HOPPER_BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_noticed(build: sanitizers.Build, bug: Bug) -> None:
    built = program(build, bug.kind, bug)
    said = ""
    for order in ORDERS[:2]:
        done = sanitizers.run_program(built, bug.kind, order)
        said += done.stdout + done.stderr
    assert re.search(SIGNS[bug.noticed_by], said), f"{bug.noticed_by} did not notice:\n{said}"
