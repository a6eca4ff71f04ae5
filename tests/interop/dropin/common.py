"""What the tests of all drop-ins share: a peer's module or a skip, data, comparisons."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

# In float64 both sides differ by the order of their sums alone. In float32 that is 1e-7 of the
# largest term, and sums have up to 64 of them.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.0}


def peer(name: str) -> Any:
    """Return another library's module; skip the tests of the calling module without it."""
    # Read by sparsify at import: its Triton decoder takes no CPU tensors.
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    with warnings.catch_warnings():  # of their dependencies
        warnings.simplefilter("ignore")
        pytest.importorskip(name, exc_type=ImportError)
        return importlib.import_module(name)


def rows(n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return activations with a mean, of unequal variance."""
    made = torch.Generator().manual_seed(seed)
    scale = torch.rand(d, generator=made, dtype=dtype) + 0.5
    return torch.randn(n, d, generator=made, dtype=dtype) * scale + 0.3


def assert_same(ours: Tensor, theirs: Tensor, what: str, tolerance: float | None = None) -> None:
    """Compare two tensors, relative to the largest entry of theirs."""
    ours, theirs = ours.detach(), theirs.detach()
    ours, theirs = (t.to_dense() if t.is_sparse else t for t in (ours, theirs))
    assert ours.shape == theirs.shape, what
    assert ours.dtype == theirs.dtype, what
    tolerance = TOLERANCES[theirs.dtype] if tolerance is None else tolerance
    if theirs.is_floating_point():  # a float32 threshold in a float64 module may round otherwise
        tolerance = max(tolerance, 2 * torch.finfo(theirs.dtype).eps)
    largest = float(theirs.abs().max()) if theirs.numel() else 0.0
    difference = float((ours - theirs).abs().max()) if theirs.numel() else 0.0
    assert difference <= tolerance * max(largest, 1e-12), f"{what}: {difference} of {largest}"


def assert_same_state(ours: Any, theirs: Any, tolerance: float | None = None) -> None:
    """Compare all parameters and buffers of two modules."""
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for name, value in other.items():
        assert_same(mine[name], value, name, tolerance)


def assert_same_gradients(ours: Any, theirs: Any, *, all_nonzero: bool = True) -> None:
    """Compare the gradients of all parameters."""
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            assert mine[name].grad is None, name
            continue
        assert not all_nonzero or bool(parameter.grad.any()), f"{name} has gradients of 0 alone"
        assert_same(mine[name].grad, parameter.grad, f"gradient of {name}")
