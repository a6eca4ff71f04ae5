"""Seconds of training, validation on the way, and what a run says about overfitting."""

import pytest
import torch

from fastsae.data.source import TensorSource
from fastsae.nn import TopKSAE
from fastsae.train import TrainConfig, Trainer
from fastsae.train.clock import Clock
from fastsae.train.early import EarlyValidations

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


@pytest.mark.parametrize(
    ("steps", "batch_size", "expected"),
    [
        (6400, 64, {100, 200, 400, 800, 1600, 3200}),
        (1000, 256, {15, 31, 62, 125, 250, 500}),
        (200, 1024, {12, 25, 50, 100}),  # 3 and 6 are too early
        (199, 1024, set()),  # a sample of 509 rows
    ],
)
def test_validations_on_the_way_are_halvings_of_the_run(steps, batch_size, expected):
    config = TrainConfig(batch_size=batch_size)
    early = EarlyValidations(TensorSource(rows(5000)), config, steps)
    assert early.steps == expected
    assert 7 * early.rows <= 0.0175 * steps * batch_size
    every = TrainConfig(batch_size=batch_size, eval_every=100)
    assert EarlyValidations(TensorSource(rows(5000)), every, steps).steps == set()
    assert EarlyValidations(None, config, steps).steps == set()


def test_a_sample_is_the_same_rows_each_time_and_never_called_val_fvu():
    val = rows(3000, seed=5)
    config = settings(batch_size=1024, steps=210, log_every=1000)
    result = Trainer(make(), rows(4096), config, val=val).fit()
    assert [row["step"] for row in result.history] == [13, 26, 52, 105, 210]
    assert ["val_fvu" in row for row in result.history] == [False] * 4 + [True]
    curve = [row["val_fvu_sample"] for row in result.history]
    sample = TensorSource(val).sample(1024 * 210 // 400)
    assert curve[-1] == pytest.approx(fvu(result.sae, sample), rel=1e-4)
    assert result.final["val_fvu"] == pytest.approx(fvu(result.sae, val), rel=1e-4)
    assert curve[-1] < 0.8 * curve[0]


def test_small_validation_data_are_read_whole():
    val = rows(530, seed=5)
    config = settings(batch_size=1024, steps=210, log_every=1000)
    history = Trainer(make(), rows(4096), config, val=val).fit().history
    assert [row["step"] for row in history if "val_fvu" in row] == [13, 26, 52, 105, 210]
    assert not any("val_fvu_sample" in row for row in history)
    once = Trainer(make(), rows(4096), config, val=iter([val])).fit().history
    assert [row["step"] for row in once if "val_fvu" in row] == [210]
    assert once[-1]["val_fvu"] == history[-1]["val_fvu"]


def test_validating_on_the_way_does_not_change_the_run():
    config = settings(batch_size=1024, steps=210)
    plain = Trainer(make(), rows(4096), config).fit().sae
    watched = Trainer(make(), rows(4096), config, val=rows(3000, seed=5)).fit().sae
    for name, tensor in plain.state_dict().items():
        assert torch.equal(watched.state_dict()[name], tensor), name
