"""The store gives every row once per epoch, the same order for the same seed, in bounded memory."""

from __future__ import annotations

import pytest
import torch

from fastsae.data import ActivationStore
from fastsae.data.shards import Manifest, ShardWriter

D, ROWS = 3, 103


def write(folder, rows=ROWS, shard_rows=10, split="train", sites=("a",)):
    """Write a store in which row i holds (i, i + 0.25, 7)."""
    x = torch.arange(rows).unsqueeze(1) + torch.tensor([0.0, 0.25, 7.0])
    x[:, 2] = 7
    manifest = Manifest(model="m", dtype="float32", sites=dict.fromkeys(sites, D))
    writer = ShardWriter(folder, manifest, shard_rows)
    index = torch.arange(rows, dtype=torch.int32)
    columns = {"token_ids": index, "doc_ids": index // 8, "positions": index % 8}
    writer.add(split, {**columns, **{f"acts.{site}": x for site in sites}})
    writer.close()
    return x


def ids(batches):
    """Return the row numbers of a list of batches, in order."""
    return [int(row[0]) for batch in batches for row in batch]


@pytest.fixture(params=[1 << 30, 30 * D * 4, 1], ids=["in one piece", "3 shards", "1 shard"])
def store(request, tmp_path):
    write(tmp_path)
    return ActivationStore(tmp_path, buffer_bytes=request.param)


@pytest.mark.parametrize("batch_size", [1, 7, 10, 16, 103, 500])
def test_an_epoch_visits_every_row_once(store, batch_size):
    batches = list(store.epoch(batch_size, seed=3, epoch=1))
    assert sorted(ids(batches)) == list(range(ROWS))
    assert [len(b) for b in batches[:-1]] == [batch_size] * ((ROWS - 1) // batch_size)
    assert torch.equal(torch.cat(batches)[:, 1], torch.cat(batches)[:, 0] + 0.25)
    assert batches[0].dtype == torch.float32


def test_the_order_depends_on_seed_and_epoch_only(store):
    first = ids(store.epoch(16, seed=1, epoch=2))
    assert first == ids(store.epoch(16, seed=1, epoch=2))
    assert first == ids(store.epoch(5, seed=1, epoch=2))
    orders = {tuple(ids(store.epoch(16, seed=s, epoch=e))) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4
    assert first != sorted(first)


@pytest.mark.parametrize("batch_size", [4, 10, 16])
def test_start_continues_exactly(store, batch_size):
    every = list(store.epoch(batch_size, seed=5, epoch=1))
    for start in range(len(every) + 2):
        rest = list(store.epoch(batch_size, seed=5, epoch=1, start=start))
        assert len(rest) == max(0, len(every) - start)
        for a, b in zip(rest, every[start:], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("batch_size", [4, 16])
def test_batches_are_the_full_ones_of_epoch_after_epoch(store, batch_size):
    count = ROWS // batch_size
    batches = store.batches(batch_size, seed=2)
    epochs = [list(store.epoch(batch_size, seed=2, epoch=e))[:count] for e in range(3)]
    for expected in [b for epoch in epochs for b in epoch]:
        assert torch.equal(next(batches), expected)


@pytest.mark.parametrize("taken", [0, 1, 5, 6, 7, 13])
def test_batches_continue_where_their_state_was_taken(store, taken):
    batches = store.batches(16, seed=2)  # 6 an epoch
    for _ in range(taken):
        next(batches)
    again = store.batches(16, seed=2)
    again.load_state_dict(batches.state_dict())
    for _ in range(9):
        assert torch.equal(next(again), next(batches))


def test_without_a_seed_all_rows_come_once_in_the_order_of_the_text(store):
    batches = list(store.batches(7, seed=None))
    assert ids(batches) == list(range(ROWS))
    assert max(len(b) for b in batches) == 7
    assert all(b.dtype == torch.float32 for b in batches)


def test_memory_is_bounded_by_the_buffer(tmp_path, monkeypatch):
    write(tmp_path)
    store = ActivationStore(tmp_path, buffer_bytes=30 * D * 4)
    held = []
    load = store._load
    monkeypatch.setattr(store, "_load", lambda group: held.append(load(group)) or held[-1])
    ids(store.epoch(16))
    assert max(len(x) for x in held) == 30
    assert store._held is None
    # Rows are mixed across shards, not only inside each.
    assert len({i // 10 for i in ids(store.epoch(16))[:30]}) == 3


def test_skipped_groups_are_not_read(tmp_path, monkeypatch):
    write(tmp_path)
    store = ActivationStore(tmp_path, buffer_bytes=30 * D * 4)
    reads = []
    load = store._load
    monkeypatch.setattr(store, "_load", lambda group: reads.append(1) or load(group))
    ids(store.epoch(10, start=6))
    assert len(reads) == 2  # of 4 groups, the last two


def test_rows_and_columns_are_in_the_order_of_the_text(store):
    assert store.rows(slice(8, 23))[:, 0].tolist() == list(range(8, 23))
    assert store.token_ids(slice(98, None)).tolist() == list(range(98, 103))
    assert store.doc_ids().tolist() == [i // 8 for i in range(ROWS)]
    assert store.positions(slice(5, 5)).tolist() == []
    assert store.rows(slice(0, 0)).shape == (0, D)
    assert len(store) == ROWS
    assert store.d_in == D
    with pytest.raises(ValueError, match="slice of step 1, got step 2"):
        store.rows(slice(0, 9, 2))


def test_a_sample_is_distinct_rows_of_the_whole_split(store):
    sample = store.sample(40, seed=1)[:, 0].tolist()
    assert len(set(sample)) == 40
    assert max(sample) > 70
    assert sample == store.sample(40, seed=1)[:, 0].tolist()
    assert sample != store.sample(40, seed=2)[:, 0].tolist()
    assert store.sample(1000)[:, 0].tolist() == list(range(ROWS))


def test_an_empty_split_is_an_empty_store(tmp_path):
    write(tmp_path)
    store = ActivationStore(tmp_path, split="val")
    assert len(store) == 0
    assert list(store.epoch(4)) == list(store.batches(4, seed=None)) == []
    assert store.sample(4).shape == (0, D)


def test_the_trainer_takes_a_store(tmp_path):
    from fastsae.nn import TopKSAE
    from fastsae.train import TrainConfig, Trainer

    write(tmp_path)
    sae = TopKSAE(D, 4, k=2, k_aux=2)
    config = TrainConfig(batch_size=16, epochs=2)
    final = Trainer(sae, ActivationStore(tmp_path), config).fit().final
    assert final["step"] == 12


def test_a_site_must_be_chosen_when_there_are_several(tmp_path):
    write(tmp_path, sites=("a", "b"))
    assert ActivationStore(tmp_path, "b").site == "b"
    for site in (None, "c"):
        with pytest.raises(ValueError, match=f"one of a, b in .*, got {site}"):
            ActivationStore(tmp_path, site)
    with pytest.raises(ValueError, match="expected split 'train' or 'val', got 'test'"):
        ActivationStore(tmp_path, "a", split="test")


def test_damage_is_found_when_the_store_is_opened(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected a harvest in .*, found no manifest\.json"
    ):
        ActivationStore(tmp_path)
    write(tmp_path)
    shard = tmp_path / "shard-00004.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-5])
    with pytest.raises(ValueError, match=r"shard-00004.safetensors is truncated or damaged"):
        ActivationStore(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00004\.safetensors is missing"):
        ActivationStore(tmp_path)
    shard.write_bytes((tmp_path / "shard-00010.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"to hold acts.a \[10, 3\], got \[3, 3\]"):
        ActivationStore(tmp_path)
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="expected batch_size >= 1, got 0"):
        ActivationStore(tmp_path).batches(0)


def test_several_sites_lie_side_by_side(tmp_path):
    x = write(tmp_path, sites=("a", "b"))
    one, two = ActivationStore(tmp_path, "b"), ActivationStore(tmp_path, ["b", "a"])
    assert (one.d_in, two.d_in) == (D, 2 * D)
    assert torch.equal(two.rows(slice(5, 31)), x[5:31].repeat(1, 2))
    assert two.sample(7).shape == (7, 2 * D)
    for a, b in zip(one.epoch(16, seed=1), two.epoch(16, seed=1), strict=True):
        assert torch.equal(a.repeat(1, 2), b)
    with pytest.raises(ValueError, match=r"expected site to be one of a, b in .*, got c"):
        ActivationStore(tmp_path, ["a", "c"])
    with pytest.raises(ValueError, match=r"expected site to be one of a, b in .*, got None"):
        ActivationStore(tmp_path, [])
