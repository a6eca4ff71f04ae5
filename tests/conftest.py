"""Fixtures shared by all tests: seeds, instruction-set levels, devices."""

from __future__ import annotations

import os

import pytest
import torch

from fastsae import _host

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


def devices() -> list[str]:
    """The devices to test on; FASTSAE_TEST_DEVICES=cuda,cpu narrows or orders them."""
    wanted = os.environ.get("FASTSAE_TEST_DEVICES")
    if wanted:
        return wanted.split(",")
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> str:
    """Every device that torch has here."""
    return request.param
