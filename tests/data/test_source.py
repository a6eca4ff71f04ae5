"""Data: shuffled epochs that are the same for the same seed, from any batch on, and streams."""

import shutil
from itertools import islice

import pytest
import torch

from fastsae import BatchTopKSAE, TrainConfig, Trainer
from fastsae.data.source import IterableSource, TensorSource, as_source, sample_rows
from fastsae.nn import TopKSAE
from fastsae.train.precision import bad_rows

X = torch.arange(23.0).unsqueeze(1).repeat(1, 3)


def epoch(number=0, seed=0, start=0):
    batches = TensorSource(X).batches(5, seed=seed)
    batches.load_state_dict({"epoch": number, "batch": start})
    return list(islice(batches, 4 - start))


def test_an_epoch_is_a_permutation_without_the_last_partial_batch():
    batches = epoch()
    assert [b.shape for b in batches] == [(5, 3)] * 4
    rows = torch.cat(batches)[:, 0].tolist()
    assert len(set(rows)) == 20
    assert rows != sorted(rows)


def test_seed_and_epoch_decide_the_order():
    assert torch.equal(torch.cat(epoch()), torch.cat(epoch()))
    assert not torch.equal(torch.cat(epoch()), torch.cat(epoch(1)))
    assert not torch.equal(torch.cat(epoch()), torch.cat(epoch(seed=1)))
    left_out = {*range(23)} - {int(v) for v in torch.cat(epoch())[:, 0]}
    assert left_out != {*range(23)} - {int(v) for v in torch.cat(epoch(1))[:, 0]}


def test_start_skips_batches():
    assert torch.equal(torch.cat(epoch(start=3)), epoch()[3])
    batches = TensorSource(X).batches(5)
    batches.load_state_dict({"epoch": 0, "batch": 4})
    assert torch.equal(next(batches), epoch(1)[0])  # the epoch is over


def test_epochs_follow_each_other_and_the_state_says_where():
    batches = TensorSource(X).batches(5)
    assert torch.equal(torch.cat(list(islice(batches, 8))), torch.cat(epoch() + epoch(1)))
    for taken in range(1, 10):
        batches = TensorSource(X).batches(5)
        for _ in range(taken):
            next(batches)
        again = TensorSource(X).batches(5)
        again.load_state_dict(batches.state_dict())
        for _ in range(5):
            assert torch.equal(next(again), next(batches))


def test_without_a_seed_all_rows_come_once_in_order():
    batches = list(TensorSource(X).batches(5, seed=None))
    assert [len(b) for b in batches] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat(batches), X)
    assert list(TensorSource(X[:0]).batches(5, seed=None)) == []


@pytest.mark.parametrize(("n", "rows"), [(4, 4), (23, 23), (100, 23), (1, 1)])
def test_a_sample_is_drawn_at_random_from_all_data(n, rows):
    sample = TensorSource(X).sample(n)[:, 0].tolist()
    assert len(sample) == len(set(sample)) == rows
    assert sample == sorted(sample)
    assert sample == TensorSource(X).sample(n)[:, 0].tolist()
    # No period in the data can hide from it, as it can from a stride.
    seen = {row for seed in range(200) for row in TensorSource(X).sample(n, seed)[:, 0].tolist()}
    assert seen == set(range(23))


def test_data_without_sample_gives_its_first_batches():
    class Plain:
        d_in = 3

        def batches(self, batch_size, *, seed=0):
            return TensorSource(X).batches(batch_size, seed=seed)

    assert torch.equal(sample_rows(Plain(), 7, 5, 0), torch.cat(epoch()[:2]))


# -- streams -----------------------------------------------------------------------------------


def uneven(x=X, sizes=(1, 7, 2, 4, 9)):
    return list(x.split(list(sizes)))


def test_batches_are_cut_from_uneven_chunks_in_order():
    source = as_source("test", "data", uneven())
    assert isinstance(source, IterableSource)
    assert source.d_in == 3
    endless = source.batches(5)
    twice = torch.cat([X, X])
    for i in range(9):
        assert torch.equal(next(endless), twice[5 * i : 5 * i + 5])  # chunks and passes adjoin
    one_pass = list(IterableSource(uneven()).batches(5, seed=None))
    assert [len(b) for b in one_pass] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat(one_pass), X)
    assert torch.equal(torch.cat(list(IterableSource([X]).batches(100, seed=None))), X)


def test_a_sample_of_a_stream_is_not_lost_by_it():
    source = IterableSource(iter(uneven()))
    assert torch.equal(source.sample(6), X[:6])
    assert torch.equal(torch.cat(list(source.batches(5, seed=None))), X)
    assert len(IterableSource(uneven()).sample(1000)) == 23


class Stream:
    """An endless iterator of uneven chunks, with a state."""

    def __init__(self, x):
        self.x, self.at = x, 0

    def __iter__(self):
        return self

    def __next__(self):
        size = 3 + self.at % 11
        rows = torch.arange(self.at, self.at + size) % len(self.x)
        self.at += size
        return self.x[rows]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Loader:
    """An iterable whose state is that of the pass under way, as a stateful DataLoader has it."""

    def __init__(self, x):
        self.x, self.at = x, 0

    def __iter__(self):
        while self.at < len(self.x):
            start, self.at = self.at, self.at + 3 + self.at % 11
            yield self.x[start : self.at]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("kind", [Stream, Loader])
@pytest.mark.parametrize("sampled", [0, 20, 1000])
def test_a_stateful_stream_continues_from_any_batch(kind, sampled):
    x = torch.randn(101, 3)
    batches = IterableSource(kind(x)).batches(8)
    whole = [next(batches) for _ in range(60)]
    for stop in range(1, 30):
        source = IterableSource(kind(x))
        if sampled:
            source.sample(sampled)
        first = source.batches(8)
        assert all(torch.equal(next(first), whole[i]) for i in range(stop))
        again = IterableSource(kind(x)).batches(8)
        again.load_state_dict(first.state_dict())
        assert all(torch.equal(next(again), whole[i]) for i in range(stop, 60))


def settings(**arguments):
    return TrainConfig(**{"batch_size": 8, "steps": 50, "lr": 3e-3, "progress": False, **arguments})


@pytest.mark.parametrize("kind", [Stream, Loader])
@pytest.mark.parametrize("stop", [5, 30])  # before, and within the last 32 steps
def test_a_run_on_a_stateful_stream_resumes_to_the_last_bit(kind, stop, tmp_path):
    x = torch.randn(211, 4) @ torch.randn(4, 4) + 2

    def fit(out, **how):
        torch.manual_seed(1)
        config = settings(out=out, checkpoint_every=1, keep_checkpoints=99, sample_rows=16)
        return Trainer(BatchTopKSAE(4, 16, 2), kind(x), config).fit(**how).sae

    whole = fit(tmp_path / "a")
    found = f"checkpoints/step_{stop:09d}"
    shutil.copytree(tmp_path / "a" / found, tmp_path / "b" / found)
    resumed = fit(tmp_path / "b", resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_stream_without_a_state_cannot_be_resumed(tmp_path):
    x = torch.randn(211, 4)

    def chunks(count):
        yield from (x[i % 20 * 10 :][:10] for i in range(count))

    config = settings(out=tmp_path, checkpoint_every=5)
    with pytest.raises(RuntimeError, match=r"^Trainer: expected data for 50 steps, got 25$"):
        Trainer(TopKSAE(4, 16, 2), chunks(20), config).fit()
    sae = TopKSAE(4, 16, 2)
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    with pytest.raises(ValueError, match="have state_dict and load_state_dict to resume, got Iter"):
        Trainer(sae, chunks(99), config).fit(resume=True)
    assert all(torch.equal(before[name], t) for name, t in sae.state_dict().items())


@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE])
def test_a_finished_run_on_a_stream_without_a_state_is_read_back(cls, tmp_path):
    x = torch.randn(500, 4)
    done = Trainer(cls(4, 16, 2), iter(x.split(10)), settings(out=tmp_path)).fit().sae
    other = torch.randn(500, 4)
    again = Trainer(cls(4, 16, 2), iter(other.split(10)), settings(out=tmp_path)).fit(resume=True)
    for name, tensor in done.state_dict().items():
        assert torch.equal(again.sae.state_dict()[name], tensor), name


def test_an_iterator_ends_the_run_with_one_clear_line():
    x = torch.randn(211, 4)
    with pytest.raises(RuntimeError, match=r"^Trainer: expected data for 50 steps, got 26$") as e:
        Trainer(TopKSAE(4, 16, 2), iter(x.split(7)), settings()).fit()
    assert "\n" not in str(e.value)
    again = Trainer(TopKSAE(4, 16, 2), x.split(7), settings())  # a tuple: as often as needed
    assert again.fit().final["step"] == 50
    with pytest.raises(ValueError, match="expected steps or total_tokens for data without a"):
        Trainer(TopKSAE(4, 16, 2), iter(x.split(7)), settings(steps=None))


def test_what_is_no_stream():
    with pytest.raises(ValueError, match="expected at least one tensor, got none"):
        IterableSource([])
    bad = IterableSource([X, X[0]])
    with pytest.raises(TypeError, match=r"expected floating tensors \[m, d_in\], got \[3\]"):
        list(bad.batches(50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_bad_rows_are_counted_exactly(dtype):
    x = torch.randn(6, 4).to(dtype)
    assert bad_rows(x) == 0
    x[1, 2] = torch.nan
    x[4] = torch.inf
    x[4, 0] = -torch.inf
    assert bad_rows(x) == 2
    huge = torch.full((6, 4), torch.finfo(dtype).max, dtype=dtype)  # finite, but its sum is not
    assert bad_rows(huge) == 0


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (3, TypeError, "expected data to be a tensor .* got int"),
        ("rows.pt", TypeError, "expected data to be a tensor .* got str"),
        ([1, 2], TypeError, "expected floating tensors .* got int"),
        (torch.zeros(40, 5), ValueError, "expected data with d_in = 4, got 5"),
        ([torch.zeros(40, 5)], ValueError, "expected data with d_in = 4, got 5"),
        (
            torch.zeros(40, 2, 4),
            ValueError,
            r"expected floating x \[n, d_in\], got .* \[40, 2, 4\]",
        ),
        (torch.zeros(40, 4, dtype=torch.int32), ValueError, "got torch.int32"),
    ],
)
def test_data_errors(data, error, message):
    with pytest.raises(error, match=message):
        Trainer(TopKSAE(4, 8, 2), data, TrainConfig(batch_size=8, steps=3))
