"""Data: shuffled epochs that are the same for the same seed, from any batch on."""

import pytest
import torch

from fastsae.nn import TopKSAE
from fastsae.train import TensorData, TrainConfig, Trainer
from fastsae.train.batches import bad_rows, sample_rows

X = torch.arange(23.0).unsqueeze(1).repeat(1, 3)


def epoch(number=0, seed=0, start=0):
    return list(TensorData(X).batches(5, seed, number, start))


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
    assert epoch(start=4) == []


@pytest.mark.parametrize(("n", "rows"), [(4, 4), (23, 23), (100, 23), (1, 1)])
def test_a_sample_is_spread_over_the_data(n, rows):
    sample = TensorData(X).sample(n)
    assert rows - 1 <= len(sample) <= max(n, rows)
    assert len(set(sample[:, 0].tolist())) == len(sample)


def test_data_without_sample_gives_its_first_batches():
    class Plain:
        d_in = 3

        def __len__(self):
            return len(X)

        def batches(self, batch_size, seed, epoch, start):
            return TensorData(X).batches(batch_size, seed, epoch, start)

    assert torch.equal(sample_rows(Plain(), 7, 5, 0), torch.cat(epoch()[:2]))


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
        ([1, 2], TypeError, "expected data to be a tensor .* got list"),
        (torch.zeros(40, 5), ValueError, "expected data with d_in = 4, got 5"),
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
        Trainer(TopKSAE(4, 8, 2), data, TrainConfig(batch_size=8))
