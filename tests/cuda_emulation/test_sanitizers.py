"""The emulated kernels under sanitizers."""

from __future__ import annotations

import re

import pytest

from fastsae import _library
from tests.cuda_emulation import sanitizers
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
