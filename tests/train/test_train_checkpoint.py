"""Checkpoints: complete or absent, the newest few, and usable as a module."""

import pytest
import torch

from fastsae.nn import BatchTopKSAE, TopKSAE, load
from fastsae.train import DeadLatents, latest
from fastsae.train.checkpoint import TrainState, load_checkpoint, prepare_adam, save_checkpoint


def state(seed=0, cls=BatchTopKSAE, scale=0.5):
    torch.manual_seed(seed)
    sae = cls(6, 20, k=2)
    adam = torch.optim.Adam(sae.parameters(), fused=True)
    prepare_adam(adam)
    sae.loss(torch.randn(10, 6)).loss.backward()
    adam.step()
    dead = DeadLatents(20, 100)
    dead.update(torch.rand(20) < 0.5, 10)
    return TrainState(sae, adam, dead, scales=[scale], step=seed + 1)


@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE])
def test_everything_comes_back(cls, tmp_path):
    a = state(0, cls)
    path = save_checkpoint(tmp_path, a, {}, keep=2)
    numbers = torch.rand(3)
    b = state(5, cls, scale=9.0)
    load_checkpoint(path, b)
    assert (b.step, b.scales) == (1, [0.5])
    assert torch.equal(torch.rand(3), numbers)
    assert torch.equal(b.dead.tokens_since_fired, a.dead.tokens_since_fired)
    for name, tensor in a.sae.state_dict().items():
        assert torch.equal(b.sae.state_dict()[name], tensor)
    for p, q in zip(a.sae.parameters(), b.sae.parameters(), strict=True):
        for key, tensor in a.optimizer.state[p].items():
            assert torch.equal(b.optimizer.state[q][key], tensor)
            assert b.optimizer.state[q][key].stride() == tensor.stride()


def test_prepared_adam_equals_an_unprepared_one():
    saes = [TopKSAE(6, 20, k=2) for _ in range(2)]
    saes[1].load_state_dict(saes[0].state_dict())
    adams = [torch.optim.Adam(sae.parameters(), fused=True) for sae in saes]
    prepare_adam(adams[0])
    x = torch.randn(10, 6)
    for sae, adam in zip(saes, adams, strict=True):
        for _ in range(3):
            adam.zero_grad()
            sae.loss(x).loss.backward()
            adam.step()
    assert torch.equal(saes[0].W_enc, saes[1].W_enc)


def test_the_exported_module_takes_raw_activations(tmp_path):
    a = state()
    exported = load(save_checkpoint(tmp_path, a, {}, keep=1))
    x = torch.randn(7, 6)
    torch.testing.assert_close(exported(x), a.sae.eval()(a.scales[0] * x) / a.scales[0])
    assert a.sae.threshold == exported.threshold * a.scales[0]


def test_only_the_newest_stay(tmp_path):
    for seed in range(4):
        save_checkpoint(tmp_path, state(seed), {}, keep=2)
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
    good = save_checkpoint(tmp_path, state(0), {}, keep=2)
    bad = save_checkpoint(tmp_path, state(1), {}, keep=2)
    assert latest(tmp_path) == bad
    damage(bad)
    assert latest(tmp_path) == good
    assert latest(tmp_path / "none") is None
    # the step is reached again and written again
    assert latest(tmp_path) != save_checkpoint(tmp_path, state(1), {}, keep=2) == latest(tmp_path)
