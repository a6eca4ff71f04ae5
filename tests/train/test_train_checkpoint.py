"""Checkpoints: complete or absent, the newest few, and usable as a module."""

import copy
import shutil

import pytest
import torch

from fastsae import load
from fastsae.nn import BatchTopKSAE, TopKSAE
from fastsae.train import TrainConfig, Trainer, latest
from fastsae.train.autograd_update import _make_state
from fastsae.train.checkpoint import load_checkpoint, newest_state, save_checkpoint


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


def flip(path, place=-20):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: (p / "state.json").unlink(),
        lambda p: (p / "state.json").write_text('{"step": 2'),
        lambda p: (p / "state.json").write_bytes(b"\xff" + (p / "state.json").read_bytes()),
        lambda p: flip(p / "state.json", 400),
        lambda p: flip(p / "state.safetensors"),
        lambda p: (p / "state.safetensors").write_bytes(
            (p / "state.safetensors").read_bytes()[:-9]
        ),
        lambda p: (p / "sae_weights.safetensors").unlink(),
        lambda p: shutil.copy(p.with_name("step_000000001") / "state.safetensors", p),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_not_passed_over(damage, tmp_path):
    assert newest_state(tmp_path) is None
    assert latest(tmp_path / "none") is None
    good = save(tmp_path, trained(0))
    bad = save(tmp_path, trained(1))
    assert newest_state(tmp_path)[0] == latest(tmp_path) == bad
    damage(bad)
    with pytest.raises(ValueError, match=f"{bad}.*{good}.* goes on from the one before") as caught:
        newest_state(tmp_path)
    assert "\n" not in str(caught.value)
    assert load_checkpoint(good)["step"] == 1
    # the step is reached again and written again
    assert save(tmp_path, trained(1)) == latest(tmp_path)
    assert load_checkpoint(latest(tmp_path))["step"] == 2


def test_an_unreadable_name_is_not_a_checkpoint(tmp_path):
    good = save(tmp_path, trained(0))
    (tmp_path / "step_last").mkdir()
    assert latest(tmp_path) == good
    shutil.copytree(good, tmp_path / "step_000000007")
    with pytest.raises(ValueError, match="step_000000007 to hold its step, got 1"):
        load_checkpoint(tmp_path / "step_000000007")


def test_a_link_in_place_of_the_folder_is_refused(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "step_000000001").mkdir(parents=True)
    (tmp_path / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(RuntimeError, match="expected a folder, got a symlink"):
        save(tmp_path / "checkpoints", trained(0))
    assert [p.name for p in elsewhere.iterdir()] == ["step_000000001"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("step", 99, r"expected step in 0\.\.9 in the state, got 99"),
        ("step", 2.0, "expected step in"),
        ("tokens", -1, "expected tokens >= 2"),
        ("scales", [2.5, 1.0], "expected scales to be a list of 1"),
        ("scales", [float("nan")], r"expected scales\[0\] to be a finite number"),
        ("scales", [0.0], "expected scales > 0"),
        ("dead", {}, "expected dead to be a dict of tokens_since_fired"),
        ("update", None, "expected update to be a dict"),
    ],
)
def test_a_state_is_checked_before_anything_changes(name, value, message):
    state = trained(1).state_dict()
    other = fresh(6, BatchTopKSAE)
    before = copy.deepcopy(other.sae.state_dict())
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state | {name: value})
    with pytest.raises(ValueError, match=f"expected {name} in the state, got none"):
        other.load_state_dict({k: v for k, v in state.items() if k != name})
    state["sae"] = state["sae"] | {"b_enc": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"sae.b_enc to be torch.float32 \[20\] in .*\[1\]"):
        other.load_state_dict(state)
    assert_same(other.sae.state_dict(), before)
    assert other.steps_done == 0
