"""Fixtures shared by all tests: seeds, instruction-set levels, devices."""

from __future__ import annotations

import os

import pytest
import torch

from fastsae import _host, _library

LEVELS = ("scalar", "avx2", "avx512")
AVAILABLE = LEVELS[: LEVELS.index(_host.best_isa()) + 1]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=AVAILABLE)
def isa(request: pytest.FixtureRequest):
    """Every instruction-set level that this machine has."""
    before = _host.isa()
    _host.set_isa(request.param)
    yield request.param
    _host.set_isa(before)


# The CUDA kernels, executed on the host: operators of a namespace of their own, on CPU tensors.
EMULATED = _library.find("libfastsae_emulated.so")
if EMULATED is not None:
    torch.ops.load_library(str(EMULATED))


def devices() -> list[str]:
    """The devices to test on; FASTSAE_TEST_DEVICES=cuda,cpu narrows or orders them."""
    wanted = os.environ.get("FASTSAE_TEST_DEVICES")
    if wanted:
        return wanted.split(",")
    found = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return found if EMULATED is None else [*found, "emulated"]


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every device that torch has here, and the CPU with the emulated CUDA kernels as its ops."""
    if request.param != "emulated":
        return request.param
    monkeypatch.setattr(torch.ops, "fastsae", torch.ops.fastsae_emulated)
    return "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what no instruction set matters to once, not at every level."""
    items[:] = [
        item
        for item in items
        if (parameters := getattr(item, "callspec", None)) is None
        or parameters.params.get("device", "cpu") == "cpu"
        or parameters.params.get("isa", AVAILABLE[-1]) == AVAILABLE[-1]
    ]
