"""A step with every way and format that is off by default, all at once: what `make gpu` times as
"training step (all on)"."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.testing import assert_close

import fastsae
from fastsae import TrainConfig, Trainer, _library
from fastsae.train import captured_step, update
from tests.conftest import EMULATED, emulated, encoding
from tests.ops.calls import NAMES
from tests.train.recorded_graph import RecordedGraph

pytestmark = pytest.mark.skipif(
    EMULATED is None, reason="built without FASTSAE_EMULATION=ON (make test turns it on)"
)
D, D_SAE, K, N, STEPS = 16, 400, 4, 64, 40
FORMATS = {"adam_dtype": "bfloat16", "decode_dtype": "bfloat16", "compute_dtype": "bfloat16"}


@pytest.fixture
def as_on_cuda(monkeypatch):
    """All kernels of CUDA in their ways, an encoder that converts, and a stand-in for graphs."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastsae.") and hasattr(module, "can_look"):
            monkeypatch.setattr(module, "can_look", lambda t: False)
    monkeypatch.setattr(update, "converts_weights", lambda _: True)
    monkeypatch.setattr(captured_step, "can_record", lambda device: True)
    monkeypatch.setattr(captured_step, "make_graph", lambda device: RecordedGraph())
    adam = _library.set_cuda_adam("staged", EMULATED)
    with emulated(*NAMES), encoding("hopper", "emulated"):
        yield
    _library.set_cuda_adam(adam, EMULATED)


def run(cls, **settings) -> tuple[list[float], dict[str, torch.Tensor], Trainer]:
    """The losses of a run, what it left, and its trainer."""
    torch.manual_seed(0)
    sae = cls(D, D_SAE, k=K, k_aux=8)
    config = TrainConfig(
        steps=STEPS, batch_size=N, lr=3e-3, dead_after_tokens=10 * N, progress=False, **settings
    )
    trainer = Trainer(sae, None, config)
    mix = torch.randn(6, D)
    data = torch.randn(1000, 6).relu() @ mix + 0.1 * torch.randn(1000, D)
    trainer.prepare(data)
    losses = [float(trainer.step(data[10 * i : 10 * i + N]).loss) for i in range(STEPS)]
    return losses, {name: t.clone() for name, t in sae.state_dict().items()}, trainer


@pytest.mark.parametrize("cls", [fastsae.TopKSAE, fastsae.BatchTopKSAE])
def test_all_at_once(cls, as_on_cuda) -> None:
    on = {**FORMATS, "weight_copies": True}
    losses, state, trainer = run(cls, capture=True, **on)
    assert trainer._captured is not None
    assert trainer._captured.replays > STEPS // 2
    # Replayed or not, the bits are the same; and copies of W_enc change none.
    for given in (on, FORMATS):
        again, other, _ = run(cls, **given)
        assert again == losses
        for name, t in state.items():
            assert torch.equal(t, other[name]), name
    # What is rounded is rounded, and no more than that: later on runs part.
    plain, _, _ = run(cls, compute_dtype="float32")
    assert plain[0] != losses[0]
    assert_close(losses[:5], plain[:5], rtol=0.05, atol=0)
    assert_close(sum(losses), sum(plain), rtol=0.1, atol=0)
    (copies,) = trainer._update.copies
    assert torch.equal(copies.W_enc.copy, trainer.sae.W_enc_rows.bfloat16())
    assert torch.equal(copies.W_dec.copy, trainer.sae.W_dec.bfloat16())
