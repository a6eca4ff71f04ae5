"""Checkpoints that a thread writes while training goes on."""

import signal
import threading

import pytest
import torch

from fastsae import TopKSAE, TrainConfig, Trainer
from fastsae.train import trainer
from fastsae.train.checkpoint import load_checkpoint
from fastsae.train.saver import Saver, copied

ROWS = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0))


def make(out, **settings):
    torch.manual_seed(0)
    settings = {"steps": 40, "batch_size": 64, "checkpoint_every": 10, **settings}
    config = TrainConfig(**settings, keep_checkpoints=9, out=str(out), progress=False)
    return Trainer(TopKSAE(8, 32, 3), ROWS, config)


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"about", "clock", "metrics", "pending"}:
            assert_same(one[key], other[key])
    else:
        assert one == other


def test_checkpoints_hold_the_step_they_are_of(tmp_path, monkeypatch):
    make(tmp_path / "now").fit()
    written, gate = [], threading.Event()

    def late(folder, sae, state, *rest):
        assert gate.wait(30)
        written.append((state["step"], run.steps_done))
        return trainer_save(folder, sae, state, *rest)

    trainer_save = trainer.save_checkpoint
    monkeypatch.setattr(trainer, "save_checkpoint", late)
    run = make(tmp_path / "beside", async_checkpoints=True)
    step = run._step

    def opened(x):
        if run.steps_done == 19:  # the checkpoint of step 10 has waited until now
            gate.set()
        return step(x)

    run._step = opened
    run.fit()
    assert written[0][0] == 10
    assert written[0][1] >= 19
    for name in ("step_000000010", "step_000000020", "step_000000040"):
        now, beside = (
            load_checkpoint(tmp_path / folder / "checkpoints" / name)
            for folder in ("now", "beside")
        )
        assert_same(now, beside)


def test_interrupted_run_goes_on_to_the_same_bits(tmp_path):
    whole = make(tmp_path / "whole").fit()
    run = make(tmp_path / "parts", async_checkpoints=True)
    step = run._step

    def interrupted(x):
        if run.steps_done == 23:
            signal.raise_signal(signal.SIGTERM)
        return step(x)

    run._step = interrupted
    with pytest.raises(KeyboardInterrupt, match="a checkpoint is in"):
        run.fit()
    assert (tmp_path / "parts/checkpoints/step_000000024/state.json").exists()
    result = make(tmp_path / "parts").fit(resume=True)
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(result.sae.state_dict()[name], value)


def test_checkpoint_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("checkpoint: could not write, the disk is full")

    monkeypatch.setattr(trainer, "save_checkpoint", fails)
    run = make(tmp_path, async_checkpoints=True)
    with pytest.raises(RuntimeError, match="the disk is full"):
        run.fit()
    assert run.steps_done == 20  # the next checkpoint


def test_saver_waits_for_the_one_before():
    order, gate = [], threading.Event()
    saver = Saver(beside=True)
    saver.save(lambda: (gate.wait(10), order.append(1)))
    threading.Timer(0.05, gate.set).start()
    saver.save(lambda: order.append(2))
    saver.wait()
    assert order == [1, 2]


def test_copied_state_stays_as_it_was():
    t = torch.zeros(2)
    state = {"a": [t, {"b": t}], "c": 1}
    kept = copied(state)
    t += 1
    assert torch.equal(kept["a"][0], torch.zeros(2))
    assert torch.equal(kept["a"][1]["b"], torch.zeros(2))
    assert kept["c"] == 1
