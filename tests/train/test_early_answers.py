"""Seconds of training, validation on the way, and what a run says about overfitting."""

import logging

import pytest
import torch

from fastsae.data.source import TensorSource
from fastsae.nn import TopKSAE
from fastsae.train import Gap, TrainConfig, Trainer
from fastsae.train.clock import Clock
from fastsae.train.early import EarlyValidations
from fastsae.train.schedule import make_plan

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
    config = TrainConfig(batch_size=batch_size, steps=steps)
    plan = make_plan(config, 5000, d_in=8, d_sae=16)
    early = EarlyValidations(TensorSource(rows(5000)), config, plan)
    assert early.steps == expected
    assert 7 * early.rows <= 0.0175 * steps * batch_size
    every = TrainConfig(batch_size=batch_size, eval_every=100)
    assert EarlyValidations(TensorSource(rows(5000)), every, plan).steps == set()
    assert EarlyValidations(None, config, plan).steps == set()


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


def gap(**arguments):
    numbers = {"val_fvu": 0.281, "train_fvu": 0.243, "error": 0.01, "outliers": 0}
    return Gap(**numbers | {"rows": 16_830, "passes": 31.2} | arguments)


def test_only_a_large_gap_of_rows_seen_again_is_large():
    assert gap().large
    assert not gap(passes=1.5).large  # the text is another one, not the SAE too fond of it
    assert not gap(val_fvu=0.26).large
    assert not gap(error=0.06).large  # 0.156 is less than 3 of these
    assert not gap(val_fvu=0.2).large
    assert str(gap()) == (
        "validation FVU 0.281 against 0.243 in training: the 16,830 rows were seen 31 times; more "
        "tokens would narrow the gap, more steps widen it"
    )
    assert "in training (both without 5 outliers): the" in str(gap(outliers=5))


def test_the_gap_is_measured_on_both_kinds_of_rows_and_logged(caplog):
    train, val = rows(60), rows(300, seed=7)
    outliers = torch.full((2, D_IN), 100.0)
    with caplog.at_level(logging.INFO, logger="fastsae"):
        data = torch.cat([train, outliers])
        result = Trainer(make(), data, settings(steps=1500), val=val).fit()
    found = result.gap
    norm = data.norm(dim=1)
    assert found.outliers >= 2
    bound = 3 * norm.median()
    drawn = TensorSource(val).sample(62)
    assert found.outliers == int((norm > bound).sum() + (drawn.norm(dim=1) > bound).sum())
    kept = [x[x.norm(dim=1) <= bound] for x in (data, drawn)]
    assert found.train_fvu == pytest.approx(fvu(result.sae, kept[0]), rel=1e-4)
    assert found.val_fvu == pytest.approx(fvu(result.sae, kept[1]), rel=1e-4)
    assert (found.rows, found.passes) == (62, 1500 * 20 / 62)
    assert found.large
    assert [r.getMessage() for r in caplog.records if "more tokens" in r.getMessage()] == [
        f"Trainer: {found}"
    ]


def test_enough_data_leave_no_large_gap_and_streams_none():
    config = settings(steps=150)
    result = Trainer(make(), rows(3000), config, val=rows(2000, seed=7)).fit()
    assert not result.gap.large
    stream = Trainer(make(), iter([rows(3000)]), config, val=rows(2000, seed=7)).fit()
    assert stream.gap is None
    assert Trainer(make(), rows(3000), config).fit().gap is None
