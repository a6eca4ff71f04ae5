"""What the peers share: folders of cases, their random numbers, and what is expected of them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, N, K = 12, 32, 12, 4

# What was made: format, case and peer.
made: list[tuple[str, str, str]] = []

Compute = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class Case:
    """One folder of a peer's files, and the generator that its numbers come from."""

    folder: Path
    peer: str
    rng: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        name = f"{self.folder.parent.name}/{self.folder.name}"
        self.rng.manual_seed(zlib.crc32(name.encode()))

    def randn(self, *shape: int) -> Tensor:
        """Normal float32 numbers."""
        return torch.randn(*shape, generator=self.rng)

    def rand(self, *shape: int) -> Tensor:
        """Uniform float32 numbers in [0, 1)."""
        return torch.rand(*shape, generator=self.rng)

    def x(self, d_in: int = D_IN, n: int = N) -> Tensor:
        """Activations in float32, with a mean that is not zero."""
        return 1.5 * self.randn(n, d_in) + self.randn(d_in)

    def rows(self, n: int = D_SAE, d: int = D_IN) -> Tensor:
        """Decoder rows of norms between 0.3 and 2."""
        rows = self.randn(n, d)
        norms = 0.3 + 1.7 * self.rand(n, 1)
        return rows / rows.norm(dim=1, keepdim=True) * norms

    def encoder(self, n: int = D_SAE, d: int = D_IN) -> Tensor:
        """Encoder rows [n, d] whose pre-activations are about as large as the activations."""
        return self.randn(n, d) / d**0.5

    def thresholds(self, n: int = D_SAE) -> Tensor:
        """A threshold for each latent, every sixth of them 0."""
        thresholds = 0.05 + 0.9 * self.rand(n)
        thresholds[::6] = 0
        return thresholds

    def expect(self, x: Tensor, at32: Compute, at64: Compute, what: str, **notes: str) -> None:
        """Write what the peer computes of x in float32 and in float64."""
        with torch.no_grad():
            code32, out32 = at32(x)
            code64, out64 = at64(x.double())
            for _ in range(4):
                noise = 1e-5 * torch.randn(x.shape, generator=self.rng, dtype=torch.float64)
                same = (at64(x.double() + noise)[0] != 0) == (code64 != 0)
                assert same.all(), f"{self.folder}: a latent is at its threshold, choose others"
        check(self.folder, code32, code64, out32, out64)
        tensors = {"code32": code32, "out32": out32, "code64": code64, "out64": out64}
        self._write({"x": x.double(), **tensors}, {"what": what, "loads": "yes", **notes})

    def expect_module(self, x: Tensor, module: torch.nn.Module, what: str, **notes: str) -> None:
        """Write what encode and forward of a float32 module say, and of its float64 copy."""

        def at(dtype: torch.dtype) -> Compute:
            def compute(x: Tensor) -> tuple[Tensor, Tensor]:
                module.to(dtype)
                return module.encode(x), module(x)

            return compute

        module.eval()
        self.expect(x, at(torch.float32), at(torch.float64), what, **notes)

    def refuse(self, x: Tensor, what: str, reason: str, **notes: str) -> None:
        """Say that the file holds what no SAE or transcoder of one layer computes."""
        self._write({"x": x.double()}, {"what": what, "loads": "refuse", "reason": reason, **notes})

    def _write(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        metadata = {"peer": self.peer, **metadata}
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self.folder / "expected.safetensors", metadata)
        made.append((self.folder.parent.name, self.folder.name, self.peer))


def check(where: Path, code32: Tensor, code64: Tensor, out32: Tensor, out64: Tensor) -> None:
    """Compare the two precisions, and see that the case is not an empty one."""
    assert (code32.dtype, out32.dtype) == (torch.float32, torch.float32), where
    assert (code64.dtype, out64.dtype) == (torch.float64, torch.float64), where
    assert torch.equal(code32 != 0, code64 != 0), where
    torch.testing.assert_close(code32.double(), code64, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out32.double(), out64, rtol=1e-4, atol=1e-5)
    active = (code64 != 0).double().mean().item()
    assert 0.05 < active < 0.9, f"{where}: {active:.0%} of the latents are active"


class Cases:
    """Makes the cases of one format, each in a folder that is emptied first."""

    def __init__(self, out: Path, format: str, package: str | None) -> None:
        self.out = out / format
        self.peer = f"{package} {version(package)}" if package else "formula"

    def __call__(self, name: str, peer: str | None = None) -> Case:
        folder = self.out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return Case(folder, peer or self.peer)


@contextmanager
def default_dtype(dtype: torch.dtype):
    """Set torch's default dtype for a block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def write_json(file: Path, value: object) -> None:
    """Write a value as JSON."""
    file.write_text(json.dumps(value))


def read_json(file: Path) -> dict:
    """Read an object from JSON."""
    return json.loads(file.read_text())


def without_init(package: str) -> None:
    """Import a package's modules without its `__init__`, which asks for what we do not need."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(package)
        sys.modules[package] = importlib.util.module_from_spec(spec)
