"""The emulated kernels under sanitizers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from fastsae import _library
from tests.cuda_emulation import sanitizers
from tests.cuda_emulation.bugs import BUGS, SIGNS, Bug, plant
from tests.ops.calls import NAMES, calls, has_kernel

watched = _library.find("libfastsae_emulated_tsan.so")


@pytest.mark.skipif(
    watched is None, reason="built without the emulated kernels, or for a sanitizer"
)
def test_no_race() -> None:
    assert watched is not None
    assert b"__tsan_write4" in watched.read_bytes(), "the kernels are not instrumented"
    done = sanitizers.run_calls(watched, "tsan")
    said = done.stdout + done.stderr
    assert not sanitizers.REPORT.search(said), said
    assert done.returncode == 0, said
    # The whole table ran, for every operator that has a kernel.
    here = {op for op in NAMES if has_kernel(op, "fastsae_emulated")}
    expected = sum(call.op in here for call in calls())
    assert re.search(rf"ran {expected} calls, 0 wrong", said), said
    assert "under ThreadSanitizer" in said, said


recipe = _library.find("emulated_build.json")


def _output_with(
    bug: Bug, build: sanitizers.Build, emulators: dict[str, Future[list[Path]]]
) -> str:
    """Plant one bug, build, run; return what was said."""
    name = bug.name.replace(" ", "_")
    csrc = sanitizers.narrowed_copy(build.folder / name)
    plant(bug, csrc)
    launcher = bug.launcher or bug.op
    changed = {launcher: build.launcher(launcher, csrc, bug.kind)}
    library = build.library(name, changed, bug.kind, emulators[bug.kind].result())
    done = sanitizers.run_calls(library, bug.kind, "--only", bug.op, "--dtype", "float32")
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def outputs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[str]]]:
    """What is said with every bug that is asked for, two at a time."""
    assert recipe is not None
    specs = (getattr(item, "callspec", None) for item in request.session.items)
    bugs = [spec.params["bug"] for spec in specs if spec is not None and "bug" in spec.params]
    build = sanitizers.Build.of(recipe, tmp_path_factory.mktemp("bugs"))
    with ThreadPoolExecutor(2) as pool:
        emulators = {k: pool.submit(build.emulator, k) for k in sorted({b.kind for b in bugs})}
        yield {b.name: pool.submit(_output_with, b, build, emulators) for b in bugs}
        pool.shutdown(cancel_futures=True)


@pytest.mark.skipif(recipe is None, reason="built without the emulated kernels")
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_noticed(bug: Bug, outputs: dict[str, Future[str]]) -> None:
    said = outputs[bug.name].result()
    assert re.search(SIGNS[bug.noticed_by], said), f"{bug.noticed_by} did not notice:\n{said}"
