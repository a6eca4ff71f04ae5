"""How many updates fit into a time, by a clock that the test moves."""

import pytest
import torch

from fastsae.data.source import IterableSource, TensorSource
from fastsae.nn import BatchTopKSAE, SampledSAE, TopKSAE
from fastsae.train import Rehearsal, TrainConfig, Trainer, rehearse, steps_within

D_IN, SETTINGS = 8, {"batch_size": 20, "lr": 3e-3, "progress": False}


def rows(n=400, seed=3):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed))


def make(cls=TopKSAE):
    torch.manual_seed(0)
    return cls(D_IN, 32, k=3)


class Slow(TensorSource):
    """Rows whose first 4 batches take 9 s, the next ones 1, 2, 3, 1, 2, 3, ..."""

    def __init__(self, x):
        super().__init__(x)
        self.time = 0.0

    def _epoch(self, batch_size, seed, epoch, start):
        for i, batch in enumerate(super()._epoch(batch_size, seed, epoch, start)):
            self.time += 9.0 if i < 4 else 1.0 + (i - 4) % 3
            yield batch


def test_what_is_left_is_divided_by_what_an_update_takes():
    rehearsal = Rehearsal(update=2.0, along=0.5, once=10.0, spent=5.0)
    assert rehearsal.steps_within(100) == 34  # 85 / 2.5
    assert rehearsal.steps_within(17.5) == 1
    with pytest.raises(ValueError, match=r"^rehearse: expected at least 17\.5 s, .* got 17 s$"):
        rehearsal.steps_within(17)


def test_the_median_of_later_updates_counts():
    data = Slow(rows())
    found = rehearse(make(), data, TrainConfig(**SETTINGS), 100, now=lambda: data.time)
    # 8 updates, the first half of which is slow; the others take 1, 2, 3 and 1 s.
    assert (found.update, found.spent) == (1.5, 43.0)
    assert found.along == found.once == 0.0
    data = Slow(rows(4000))
    found = rehearse(make(), data, TrainConfig(**SETTINGS), 1000, now=lambda: data.time)
    # 8 % of 1000 s: 36 s, then 23 updates of 1, 2, 3, ... 1, 2 s.
    assert (found.update, found.spent) == (2.0, 81.0)


def test_validation_on_the_way_and_at_the_end_has_its_time(monkeypatch):
    time = [0.0]

    def validate(trainer):
        time[0] += 0.5 * len(trainer.val)

    monkeypatch.setattr(Trainer, "validate", validate)
    config = TrainConfig(**SETTINGS, eval_every=50)
    found = rehearse(make(), rows(), config, 10, val=rows(1000), now=lambda: time[0])
    assert found.once == 0.5 * (1000 + 2 * 2048)
    assert found.along == 0.5 * 1000 / 50
    config = TrainConfig(**SETTINGS)
    found = rehearse(make(), rows(), config, 10, val=rows(1000), now=lambda: time[0])
    assert found.along == pytest.approx(0.5 * 7 * 20 / 400)
    found = rehearse(make(), rows(), config, 10, val=rows(511), now=lambda: time[0])
    assert found.along == 0.0
    found = rehearse(make(), rows(), config, 10, val=[rows(9)], now=lambda: time[0])
    assert found.once == found.along == 0.0


def test_thresholds_at_the_end_have_their_time(monkeypatch):
    time = [0.0]
    original = BatchTopKSAE.estimate_threshold_

    def estimate(self, batches):
        time[0] += 3.0 * len(batches)
        return original(self, batches)

    monkeypatch.setattr(BatchTopKSAE, "estimate_threshold_", estimate)
    config = TrainConfig(**SETTINGS, update="autograd")
    found = rehearse(make(BatchTopKSAE), rows(), config, 10, now=lambda: time[0])
    assert found.once == 3.0 * 32


@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE, SampledSAE])
def test_a_rehearsal_leaves_no_trace(cls):
    config = TrainConfig(**SETTINGS, steps=15)
    runs = []
    for rehearsed in (False, True):
        sae, stream = make(cls), IterableSource(iter(rows(1000).split(30)))
        if rehearsed:
            before = {name: t.clone() for name, t in sae.state_dict().items()}
            assert steps_within(sae, stream, config, 60, val=rows(100)) > 15
            assert all(torch.equal(before[name], t) for name, t in sae.state_dict().items())
            assert sae.training
        runs.append(Trainer(sae, stream, config).fit().sae.state_dict())
    for name, tensor in runs[0].items():
        assert torch.equal(runs[1][name], tensor), name


def test_waiting_for_a_stream_counts():
    time = [0.0]

    def stream():
        for part in rows(4000).split(10):
            time[0] += 1.0
            yield part

    data = IterableSource(stream())
    found = rehearse(make(), data, TrainConfig(**SETTINGS), 1000, now=lambda: time[0])
    # Of the 8 tensors of 4 batches, one was waiting already.
    assert found.update == pytest.approx(2.0 * 7 / 8)


def test_an_iterator_is_refused_before_anything_of_it_is_lost():
    stream = iter(rows(100).split(10))
    with pytest.raises(TypeError, match=r"expected data that are still whole .*IterableSource"):
        rehearse(make(), stream, TrainConfig(**SETTINGS), 60)
    with pytest.raises(TypeError, match=r"expected val that are still whole"):
        rehearse(make(), rows(), TrainConfig(**SETTINGS), 60, val=stream)
    assert len(list(stream)) == 10


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_a_time_that_is_none_is_refused(seconds):
    with pytest.raises(ValueError, match=r"^rehearse: expected seconds > 0, got"):
        rehearse(make(), rows(), TrainConfig(**SETTINGS), seconds)
