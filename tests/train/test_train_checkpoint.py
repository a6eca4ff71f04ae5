"""Checkpoints: complete or absent, the newest few, and usable as a module."""

import copy

import pytest
import torch

from fastsae import load
from fastsae.nn import BatchTopKSAE, TopKSAE
from fastsae.train import TrainConfig, Trainer, latest
from fastsae.train.autograd_update import _make_state
from fastsae.train.checkpoint import load_checkpoint, save_checkpoint


def rows(seed):
    return 4 * torch.randn(10, 6, generator=torch.Generator().manual_seed(seed)) + 1


def fresh(seed, cls, **settings):
    torch.manual_seed(seed)
    config = TrainConfig(batch_size=10, steps=9, dead_after_tokens=15, progress=False, **settings)
    return Trainer(cls(6, 20, k=2), None, config)


def trained(seed=0, cls=BatchTopKSAE, **settings):
    """A trainer after `seed + 1` steps."""
    trainer, x = fresh(seed, cls, **settings), rows(seed)
    trainer.prepare(x)
    for _ in range(seed + 1):
        trainer.step(x)
    return trainer


def save(folder, trainer, keep=2):
    raw = copy.deepcopy(trainer.sae)
    trainer.scaler.fold_(raw)
    return save_checkpoint(folder, raw, trainer.state_dict(), keep)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert_same(value, b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
    else:
        assert a == b


@pytest.mark.parametrize("update", ["fused", "autograd"])
@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE])
def test_everything_comes_back(cls, update, tmp_path):
    a = trained(0, cls, update=update)
    path = save(tmp_path, a)
    numbers = torch.rand(3)
    for b in (trained(5, cls, update=update), fresh(6, cls, update=update)):
        state = load_checkpoint(path)
        assert state["about"]["batch_size"] == 10
        b.load_state_dict(state)
        assert torch.equal(torch.rand(3), numbers)
        torch.set_rng_state(a.state_dict()["rng"]["cpu"])
        torch.set_rng_state(state["rng"]["cpu"])
        assert (b.steps_done, b.scaler.scales) == (1, a.scaler.scales)
        torch.set_rng_state(state["rng"]["cpu"])
        assert_same(b.state_dict(), {**a.state_dict(), "rng": state["rng"]})
        x = rows(1)
        torch.set_rng_state(state["rng"]["cpu"])
        again = copy.deepcopy(a)
        assert_same(again.step(x).loss, b.step(x).loss)
        assert_same(again.sae.state_dict(), b.sae.state_dict())


def test_prepared_adam_equals_an_unprepared_one():
    saes = [TopKSAE(6, 20, k=2) for _ in range(2)]
    saes[1].load_state_dict(saes[0].state_dict())
    adams = [torch.optim.Adam(sae.parameters(), fused=True) for sae in saes]
    _make_state(adams[0])
    x = torch.randn(10, 6)
    for sae, adam in zip(saes, adams, strict=True):
        for _ in range(3):
            adam.zero_grad()
            sae.loss(x).loss.backward()
            adam.step()
    assert torch.equal(saes[0].W_enc, saes[1].W_enc)


def test_the_exported_module_takes_raw_activations(tmp_path):
    a = trained()
    (scale,) = a.scaler.scales
    assert scale != 1
    exported = load(save(tmp_path, a, keep=1))
    x = torch.randn(7, 6)
    torch.testing.assert_close(exported(x), a.sae.eval()(scale * x) / scale)
    torch.testing.assert_close(a.sae.threshold, exported.threshold * scale)


def test_only_the_newest_stay(tmp_path):
    for seed in range(4):
        save(tmp_path, trained(seed))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000003", "step_000000004"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: (p / "state.json").unlink(),
        lambda p: (p / "state.json").write_text('{"step": 2'),
        lambda p: (p / "state.safetensors").write_bytes(
            (p / "state.safetensors").read_bytes()[:-9]
        ),
        lambda p: (p / "sae_weights.safetensors").unlink(),
        lambda p: p.rename(p.with_name(".tmp_step_000000002")),
    ],
)
def test_the_latest_complete_one_is_found(damage, tmp_path):
    assert latest(tmp_path) is None
    good = save(tmp_path, trained(0))
    bad = save(tmp_path, trained(1))
    assert latest(tmp_path) == bad
    damage(bad)
    assert latest(tmp_path) == good
    assert latest(tmp_path / "none") is None
    # the step is reached again and written again
    assert latest(tmp_path) != save(tmp_path, trained(1)) == latest(tmp_path)
