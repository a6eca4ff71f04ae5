"""What does not need the other libraries: that nothing imports them, and the passes over memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastsae.interop.dropin import _updates as updates
from tests.interop.dropin.common import assert_same, rows

PEERS = {
    "sae_lens": "sae-lens",
    "sparsify": "eai-sparsify",
    "dictionary_learning": "dictionary-learning",
}
ABSENT = "import sys; sys.modules.update(dict.fromkeys({!r}));"  # an import of these raises


def run(code: str) -> subprocess.CompletedProcess[str]:
    absent = ABSENT.format([*PEERS])
    return subprocess.run([sys.executable, "-c", absent + code], capture_output=True, text=True)


def test_fastsae_imports_no_peer():
    ended = run("import fastsae, fastsae.interop, fastsae.interop.dropin")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("module", list(PEERS))
def test_a_missing_peer_is_one_line(module):
    ended = run(f"import fastsae.interop.dropin.{module}")
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 1
    assert last.startswith(
        f"ImportError: fastsae's drop-in for {PEERS[module]}: expected to import"
    )
    assert f"pip install {PEERS[module]}==" in last


@pytest.mark.parametrize("block", [1, 50, 1 << 22])
@pytest.mark.parametrize("eps", [None, 1e-6])
def test_projection_and_norms(eps, block, monkeypatch):
    monkeypatch.setattr(updates, "BLOCK", block)
    W, grad = rows(30, 7), rows(30, 7, seed=1)
    unit = W if eps is None else W / (W.norm(dim=1, keepdim=True) + eps)
    expected = grad - (grad * unit).sum(1, keepdim=True) * unit
    updates.project_(grad, W, eps)
    assert_same(grad, expected, "gradient")
    expected = W / (W.norm(dim=1, keepdim=True) + torch.finfo(W.dtype).eps)
    updates.normalize_(W)
    assert_same(W, expected, "rows")


@pytest.mark.parametrize("block", [1, 50, 1 << 22])
def test_signum(block, monkeypatch):
    monkeypatch.setattr(updates, "BLOCK", block)
    p, z, grad = (rows(30, 7, seed=seed) for seed in range(3))
    x = p + (1 - 1 / 0.95) * (z - p)
    moved = z - 0.1 * grad.sign()
    x = x + 0.3 * (moved - x)
    expected = x + (1 - 0.95) * (moved - x)
    updates.signum_(p, z, grad, lr=0.1, momentum=0.95, average=0.3)
    assert_same(z, moved, "z")
    assert_same(p, expected, "p")
