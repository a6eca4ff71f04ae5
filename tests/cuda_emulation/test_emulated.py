"""The CUDA kernels executed on the host, against the reference; the CUDA library without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastsae import _library, reference
from tests.conftest import EMULATED
from tests.ops.calls import NAMES, calls, check, has_kernel
from tests.ops.inputs import DTYPES, KINDS, matrix, same
from tests.properties import given, settings, st

needs_emulation = pytest.mark.skipif(
    EMULATED is None, reason="built without FASTSAE_EMULATION=ON (make test turns it on)"
)
SHAPES = ((1, 1, 1), (3, 7, 3), (2, 256, 256), (3, 257, 9), (2, 1000, 500), (2, 5000, 33))


@needs_emulation
@pytest.mark.parametrize("sorted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_equals_reference(dtype, kind, sorted) -> None:
    for n, m, k in SHAPES:
        x = matrix(kind, n, m, dtype)
        values, indices = torch.ops.fastsae_emulated.topk(x, k, sorted)
        want = reference.topk(x, k, sorted=sorted)
        assert same(values, want.values), (n, m, k)
        assert torch.equal(indices, want.indices), (n, m, k)


@needs_emulation
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4), st.integers(1, 600), st.data(), st.sampled_from(KINDS), st.booleans())
def test_topk_any_shape(n, m, data, kind, sorted) -> None:
    k = data.draw(st.integers(1, m))
    x = matrix(kind, n, m, torch.float32)
    values, indices = torch.ops.fastsae_emulated.topk(x, k, sorted)
    want = reference.topk(x, k, sorted=sorted)
    assert same(values, want.values)
    assert torch.equal(indices, want.indices)


@needs_emulation
@pytest.mark.parametrize("op", NAMES)
def test_calls_equal_the_cpu(op) -> None:
    if not has_kernel(op, "fastsae_emulated"):
        pytest.skip(f"{op} has no CUDA kernel yet")
    for call in calls(only=op):
        check(call, call("fastsae_emulated"), call())


@pytest.mark.skipif(
    _library.find("libfastsae_cuda.so") is None, reason="built without nvcc: no CUDA library"
)
def test_cuda_library_loads_and_registers_without_a_gpu() -> None:
    # In a process of its own: this torch may have no CUDA, and the package then skips the library.
    code = (
        "import torch\nfrom fastsae import _library\n"
        "torch.ops.load_library(str(_library.find('libfastsae_cuda.so')))\n"
        "assert _library.has_kernel('topk', 'cuda')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
