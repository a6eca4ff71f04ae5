"""Rows held back: none is lost, none is in both parts, and the rest is a source as ever."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from fastsae.data import ActivationStore
from fastsae.data.source import IterableSource, TensorSource, hold_back, known_rows, spread
from tests.data.test_store import D, write

ROWS = 1003
X = torch.arange(float(ROWS)).unsqueeze(1).repeat(1, D)


def ids(batches):
    """Return the row numbers of a list of batches, in order."""
    return [int(row[0]) for batch in batches for row in batch]


@pytest.mark.parametrize(
    ("rows", "n"), [(2, 1), (100, 50), (1000, 64), (1003, 200), (129, 64), (10_000, 777)]
)
def test_pieces_are_short_and_at_equal_distances(rows, n):
    rest, held = spread(rows, n)
    taken = [row for a, b in held for row in range(a, b)]
    left = [row for a, b in rest for row in range(a, b)]
    assert len(taken) == n
    assert sorted(taken + left) == list(range(rows))
    assert left == sorted(left)
    assert taken == sorted(taken)
    assert max(b - a for a, b in held) <= 64
    assert len(held) == -(-n // 64)
    middles = [(a + b) / 2 for a, b in held]
    step = rows / len(held)
    assert all(abs(m - (i + 0.5) * step) <= 2 for i, m in enumerate(middles))


@pytest.fixture(params=["tensor", "one piece", "3 shards", "1 shard"])
def source(request, tmp_path):
    if request.param == "tensor":
        return TensorSource(X)
    write(tmp_path, rows=ROWS, shard_rows=100)
    buffer = {"one piece": 1 << 30, "3 shards": 300 * D * 4, "1 shard": 1}[request.param]
    return ActivationStore(tmp_path, buffer_bytes=buffer)


def test_the_rest_is_a_source_of_the_other_rows(source):
    rest, held = hold_back(source, 200)
    out = ids(held.batches(1000, seed=None))
    left = ids(rest.batches(17, seed=None))
    assert (len(rest), len(held), len(source)) == (803, 200, ROWS)
    assert sorted(left + out) == list(range(ROWS))
    assert left == sorted(left)
    assert ids(source.batches(50, seed=None)) == list(range(ROWS))  # as it was
    first = ids(islice(rest.batches(11, seed=4), 73))  # 803 = 73 * 11
    second = ids(list(islice(rest.batches(11, seed=4), 146))[73:])
    assert sorted(first) == sorted(second) == left
    assert first != second
    assert sorted(ids([rest.sample(5000)])) == left
    assert set(ids([rest.sample(300)])) < set(left)
    again = hold_back(source, 200)
    assert ids(again[1].batches(64, seed=None)) == out


def test_the_rest_continues_where_its_state_was_taken(source):
    rest, _ = hold_back(source, 100)
    for taken in (0, 3, 44, 45, 46, 60):  # 903 rows: 45 batches an epoch
        batches = rest.batches(20, seed=2)
        for _ in range(taken):
            next(batches)
        again = rest.batches(20, seed=2)
        again.load_state_dict(batches.state_dict())
        for _ in range(6):
            assert torch.equal(next(again), next(batches))


def test_a_part_can_be_parted_again(source):
    rest, held = hold_back(source, 150)
    rest2, held2 = hold_back(rest, 90)
    parts = [ids(part.batches(40, seed=None)) for part in (held, held2, rest2)]
    assert [len(part) for part in parts] == [150, 90, 763]
    assert sorted(row for part in parts for row in part) == list(range(ROWS))


def test_a_parted_store_reads_no_more_at_once_and_keeps_its_columns_aligned(tmp_path, monkeypatch):
    write(tmp_path, rows=ROWS, shard_rows=100)
    rest, held = hold_back(ActivationStore(tmp_path, buffer_bytes=300 * D * 4), 200)
    loaded = []
    load = rest._load
    monkeypatch.setattr(rest, "_load", lambda *a: loaded.append(load(*a)) or loaded[-1])
    ids(rest.epoch(16))
    assert max(len(x) for x in loaded) == 300
    ids(held.batches(16, seed=None))
    for part in (rest, held):
        assert part.token_ids().tolist() == part.rows()[:, 0].int().tolist()
        assert part.doc_ids(slice(30, 90)).tolist() == [
            int(row) // 8 for row in part.rows(slice(30, 90))[:, 0]
        ]


def test_a_subclass_keeps_its_batches():
    class Doubled(TensorSource):
        def batches(self, batch_size, *, seed=0):
            return (2 * batch for batch in super().batches(batch_size, seed=seed))

    rest, held = hold_back(Doubled(X), 64)
    rows = torch.cat([*rest.batches(50, seed=None), *held.batches(50, seed=None)])
    assert sorted(rows[:, 0].tolist()) == [2.0 * i for i in range(ROWS)]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_tensors_is_parted_like_one_tensor(kind):
    source = IterableSource(kind(X.split([1, 500, 2, 300, 200])))
    assert known_rows(source) == ROWS
    rest, held = hold_back(source, 200)
    expected = [ids(part.batches(99, seed=None)) for part in hold_back(TensorSource(X), 200)]
    assert ids(rest.batches(99, seed=None)) == expected[0]
    assert ids(held.batches(99, seed=None)) == expected[1]
    assert ids(islice(rest.batches(803), 2)) == 2 * expected[0]  # every pass without them


def test_a_stream_gives_the_rows_that_come_next():
    source = IterableSource(iter(X.split(7)))
    assert known_rows(source) is None
    rest, held = hold_back(source, 20)
    assert ids(islice(rest.batches(10), 3)) == list(range(30))
    # The rows 30 to 34 came with a tensor that training had begun.
    assert ids(held.batches(5, seed=None)) == list(range(35, 55))
    assert len(ids(islice(rest.batches(10), 99))) == 940
    assert ids(held.batches(5, seed=None)) == []  # too few are left


def test_a_source_of_your_own_need_not_hold_back():
    class Plain:
        d_in = D

        def batches(self, batch_size, *, seed=0):
            return iter(X.split(batch_size))

    assert hold_back(Plain(), 10) is None
    assert known_rows(Plain()) is None
