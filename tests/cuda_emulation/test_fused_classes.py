"""Every class is trained by the fused update of CUDA, its kernel executed on the host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastsae import ops
from fastsae.ops import _dense
from fastsae.ops._tape import Entries
from fastsae.train import fused_update
from fastsae.types import SparseActs
from tests.conftest import EMULATED, emulated
from tests.ops.inputs import acts
from tests.train.test_fused_classes import CLASSES, run

pytestmark = pytest.mark.skipif(
    EMULATED is None, reason="built without FASTSAE_EMULATION=ON (make test turns it on)"
)

# Not here, whose decoder gets what the encoder returned: one code says what both sums are of.
TWO_CODES = {
    "MultiTopK", "MultiAbsTopK", "by norm", "Matryoshka", "Hierarchical", "JumpReLU", "Gated",
    "skip", "JumpReLUTranscoder", "CLT", "CLT by layer", "CLT tied", "BatchTopK CLT",
    "JumpReLU CLT", "ReLU CLT",
}  # fmt: skip


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The update of CUDA: its kernels, and nobody may ask what is in a tensor."""
    for module in (fused_update, _dense):
        monkeypatch.setattr(module, "can_look", lambda _: False)
    with emulated("sparse_adam_step_", "sparse_decode_error"):
        yield monkeypatch


def wait(*_: object) -> None:
    raise AssertionError("a number of a tensor was read, which waits for the device")


def watch(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Fail where the update reads a number; return whether steps had two codes."""
    move, step, own = fused_update.FusedUpdate._move, ops.sparse_adam_step_, []

    def moved(*arguments):
        with pytest.MonkeyPatch.context() as strict:
            for name in ("__bool__", "__int__", "__float__", "item", "tolist", "nonzero"):
                strict.setattr(torch.Tensor, name, wait)
            return move(*arguments)

    def stepped(*arguments, **options):
        own.append(isinstance(arguments[4], SparseActs))
        more = options["more_grads"]
        assert more.W_enc is None
        assert more.W_dec is None
        return step(*arguments, **options)

    monkeypatch.setattr(fused_update.FusedUpdate, "_move", moved)
    monkeypatch.setattr(ops, "sparse_adam_step_", stepped)
    return own


@pytest.mark.parametrize("settings", [{}, {"clip_grad_norm": 0.02, "optimizer": "adam_mini"}])
@pytest.mark.parametrize("name", CLASSES)
def test_equals_autograd_in_float64(name, settings, as_on_cuda) -> None:
    if "CLT" in name:  # clipping is refused, as on the CPU
        settings = {key: value for key, value in settings.items() if key != "clip_grad_norm"}
    own = watch(as_on_cuda)
    fused, other = (run(name, update, **settings) for update in ("fused", "autograd"))
    assert set(own) == {name in TWO_CODES}
    # Where thresholds are float32, so is the number that clips them.
    tolerance = 1e-6 if "JumpReLU" in name and "clip_grad_norm" in settings else 1e-9
    expected = dict(other.sae.named_parameters())
    for parameter, p in fused.sae.named_parameters():
        torch.testing.assert_close(p, expected[parameter], rtol=tolerance, atol=tolerance)


def test_sums_are_stacked_without_a_look(monkeypatch) -> None:
    """As on the CPU: of several layouts, of one, of none."""
    W = torch.randn(20, 5, dtype=torch.float64)

    def sums(*layouts):
        codes = [acts(4, 20, k, torch.float64, layout) for layout, k in layouts]
        rows = (torch.randn(4, 5, dtype=torch.float64) for _ in codes)
        return [Entries(c.values, c.indices, c.offsets, next(rows)) for c in codes]

    mixed = [("fixed", 3), ("variable", 4), ("fixed", 2), ("variable", 1)]
    for parts in (mixed, [("fixed", 3)] * 2, [("variable", 3)] * 2, mixed[:1], []):
        found = sums(*parts)
        here = fused_update._stacked(found, W)
        with monkeypatch.context() as patch:
            patch.setattr(fused_update, "can_look", lambda _: False)
            there = fused_update._stacked(found, W)
        torch.testing.assert_close(there[0].to_dense(), here[0].to_dense())
        assert torch.equal(there[1], here[1])
        assert there[1].shape == (4 * len(parts), 5)
