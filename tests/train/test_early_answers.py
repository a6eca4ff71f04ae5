"""Seconds of training, validation on the way, and what a run says about overfitting."""

import pytest
import torch

from fastsae.data.source import TensorSource
from fastsae.nn import TopKSAE
from fastsae.train import TrainConfig, Trainer
from fastsae.train.clock import Clock

D_IN, D_SAE = 8, 64


def rows(n, seed=3):
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(12, D_IN, generator=torch.Generator().manual_seed(0))
    return torch.rand(n, 12, generator=g).pow(4) @ basis


def make(seed=0):
    torch.manual_seed(seed)
    return TopKSAE(D_IN, D_SAE, k=3)


def settings(**arguments):
    defaults = {"batch_size": 20, "steps": 50, "lr": 3e-3, "log_every": 10, "progress": False}
    return TrainConfig(**defaults | arguments)


def fvu(sae, x):
    with torch.no_grad():
        error, x = (x - sae(x)).double(), x.double()
        return float(error.square().sum() / (x - x.mean(0)).square().sum())


class Slow(TensorSource):
    """Rows whose batches take one second each in training, and a pass in order takes 1000 s."""

    def __init__(self, x, time, stop_at=None):
        super().__init__(x)
        self.time, self.stop_at = time, stop_at

    def batches(self, batch_size, *, seed=0):
        if seed is None:
            self.time[0] += 1000.0
        return super().batches(batch_size, seed=seed)

    def _epoch(self, batch_size, seed, epoch, start):
        for batch in super()._epoch(batch_size, seed, epoch, start):
            self.time[0] += 1.0
            if self.time[0] % 1000 == self.stop_at:
                raise RuntimeError("crash")
            yield batch


@pytest.fixture
def time(monkeypatch):
    """Return a clock that only `Slow` moves."""
    now = [0.0]
    monkeypatch.setattr(Clock, "now", staticmethod(lambda: now[0]))
    return now


def test_seconds_count_training_and_neither_validation_nor_interruptions(time, tmp_path):
    config = settings(out=tmp_path, checkpoint_every=6, eval_every=10)
    with pytest.raises(RuntimeError, match="crash"):
        Trainer(make(), Slow(rows(400), time, 33), config, val=Slow(rows(90), time)).fit()
    time[0] += 5000.0  # until somebody looks
    val = Slow(rows(90), time)
    history = Trainer(make(9), Slow(rows(400), time), config, val=val).fit(resume=True).history
    assert [(row["step"], row["seconds"]) for row in history] == [(s, s) for s in range(10, 60, 10)]
    # Step 31, the first after the checkpoint and the row of 30, counts from there: 10 of 20 rows.
    assert [row["tokens_per_second"] for row in history] == [20.0] * 5


def test_a_checkpoint_without_a_clock_is_continued(tmp_path):
    trainer = Trainer(make(), None, settings())
    trainer.prepare(rows(400))
    trainer.step(rows(20))
    state = trainer.state_dict()
    assert state.pop("clock")["seconds"] == 0.0
    again = Trainer(make(1), None, settings())
    again.load_state_dict(state)
    assert again.state_dict()["clock"]["seconds"] == 0.0
    state["clock"] = {"began": 0.0, "seconds": float("nan")}
    with pytest.raises(ValueError, match=r"expected clock\.seconds to be a finite number"):
        again.load_state_dict(state)


def test_tensorboard_has_seconds_of_training_as_the_time(time, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(out=tmp_path, checkpoint_every=6, eval_every=10, tensorboard=True)
    with pytest.raises(RuntimeError, match="crash"):
        Trainer(make(), Slow(rows(400), time, 33), config, val=Slow(rows(90), time)).fit()
    val = Slow(rows(90), time)
    Trainer(make(), Slow(rows(400), time), config, val=val).fit(resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = events.Scalars("val_fvu")
    assert [event.step for event in found] == [10, 20, 30, 40, 50]
    since = [event.wall_time - found[0].wall_time for event in found]
    assert since == pytest.approx([0, 10, 20, 30, 40], abs=1e-3)
