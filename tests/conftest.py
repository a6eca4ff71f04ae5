"""Fixtures shared by all tests: seeds, instruction-set levels, devices."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastsae import _host, _library
from tests.ops.calls import NAMES, has_kernel

LEVELS = ("scalar", "avx2", "avx512")
AVAILABLE = LEVELS[: LEVELS.index(_host.best_isa()) + 1]
if os.environ.get("FASTSAE_TEST_ISA") == "best":
    AVAILABLE = AVAILABLE[-1:]


# A shell starts what runs in the background with SIGINT ignored; the tests send it to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
# FASTSAE_EMULATED names another build of them, such as one for a sanitizer.
_named = os.environ.get("FASTSAE_EMULATED")
EMULATED = Path(_named) if _named else _library.find("libfastsae_emulated.so")
if EMULATED is not None:
    torch.ops.load_library(str(EMULATED))


def _emulated_kernel(op: str) -> Callable[..., object]:
    if has_kernel(op, "fastsae_emulated"):
        return getattr(torch.ops.fastsae_emulated, op)

    def skip(*_: object) -> None:
        pytest.skip(f"{op} has no CUDA kernel yet")

    return skip


@contextmanager
def emulated(*names: str) -> Iterator[None]:
    """Put the emulated CUDA kernels of some ops in place of those of the CPU."""
    kernels = torch.library.Library("fastsae", "IMPL")
    with warnings.catch_warnings():  # torch says once that it does what it was asked for
        warnings.simplefilter("ignore")
        for op in names:
            kernels.impl(op, _emulated_kernel(op), "CPU", allow_override=True)
    yield
    kernels._destroy()


def devices() -> list[str]:
    """The devices to test on; FASTSAE_TEST_DEVICES=cuda,cpu narrows or orders them."""
    wanted = os.environ.get("FASTSAE_TEST_DEVICES")
    if wanted:
        return wanted.split(",")
    found = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return found if EMULATED is None else [*found, "emulated"]


@contextmanager
def on_device(name: str) -> Iterator[str]:
    """Yield the device that torch calls it; "emulated" is the CPU with those kernels as its own."""
    if name != "emulated":
        yield name
        return
    with emulated(*NAMES):
        yield "cpu"


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every device that torch has here, and the CPU with the emulated CUDA kernels as its own."""
    with on_device(request.param) as device:
        yield device


@contextmanager
def encoding(way: str, device: str) -> Iterator[None]:
    """Let the CUDA encoders meet their pre-activations in another way."""
    library = EMULATED if device == "emulated" else None
    before = _library.set_cuda_encode(way, library)
    yield
    _library.set_cuda_encode(before, library)


ENCODE_WAYS = ("blocks", "overlap", "hopper")


def encode_devices() -> list[str]:
    """The devices, and those with CUDA's kernels again for every way that encoders have there."""
    there = [device for device in devices() if device != "cpu"]
    return [*devices(), *(f"{device}-{way}" for way in ENCODE_WAYS for device in there)]


@pytest.fixture(params=encode_devices())
def encode_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every device, in every way that encoders have there."""
    name, _, way = request.param.partition("-")
    with on_device(name) as device:
        if not way:
            yield device
            return
        with encoding(way, name):
            yield device


def _device_of(parameters: dict[str, object]) -> object:
    return parameters.get("device", parameters.get("encode_device", "cpu"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what no instruction set matters to once, not at every level."""
    items[:] = [
        item
        for item in items
        if (parameters := getattr(item, "callspec", None)) is None
        or _device_of(parameters.params) == "cpu"
        or parameters.params.get("isa", AVAILABLE[-1]) == AVAILABLE[-1]
    ]
