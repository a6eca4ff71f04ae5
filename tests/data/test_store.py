"""The store gives every row once per epoch, the same order for the same seed, in bounded memory."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae._files.write import sealed
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
    monkeypatch.setattr(store, "_load", lambda *a: held.append(load(*a)) or held[-1])
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
    monkeypatch.setattr(store, "_load", lambda *a: reads.append(1) or load(*a))
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
    with pytest.raises(ValueError, match=r"shard-00004.safetensors to be a whole safetensors file"):
        ActivationStore(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00004\.safetensors, found none"):
        ActivationStore(tmp_path)
    shard.write_bytes((tmp_path / "shard-00010.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"shard-00004.safetensors to be the file with the seal"):
        ActivationStore(tmp_path)
    os.unlink(shard)
    os.mkfifo(shard)
    with pytest.raises(ValueError, match=r"shard-00004.safetensors to be a regular file"):
        ActivationStore(tmp_path)


def test_damage_is_found_when_rows_are_read(tmp_path):
    x = write(tmp_path)
    shard = tmp_path / "shard-00004.safetensors"
    data = bytearray(shard.read_bytes())
    place = data.index(x[44].numpy().tobytes())
    data[place + 1] ^= 4
    shard.write_bytes(data)
    store = ActivationStore(tmp_path)
    assert torch.equal(store.rows(slice(0, 40)), x[:40])
    for read in (store.rows, lambda: list(store.epoch(16)), lambda: store.sample(103)):
        with pytest.raises(ValueError, match=r"shard-00004\S+ to hold acts.a as it was written"):
            read()
    assert len(store.token_ids()) == ROWS  # another tensor of the same file


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def put(folder, values):
    """Write a manifest whose checksum is right, as somebody with bad intentions would."""
    values.pop("checksum", None)
    (folder / "manifest.json").write_text(json.dumps(sealed(values)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "trbin"}, "expected split in .* to be one of train, val, got 'trbin'"),
        ({"rows": -1}, "expected rows in .*, got -1"),
        ({"rows": 9}, r"to hold acts.a \[9, 3\], got \[10, 3\]"),
        ({"rows": True}, "expected rows in .*, got True"),
        ({"file": "../shard-00001.safetensors"}, "expected a file like shard-00000.safetensors"),
        ({"file": "/etc/passwd"}, "expected a file like shard-00000.safetensors"),
        ({"seal": 3}, "expected seal in .* to be str, got 3"),
    ],
)
def test_entries_of_a_manifest_are_checked(tmp_path, change, message):
    write(tmp_path)
    values = manifest_of(tmp_path)
    values["shards"][1] |= change
    put(tmp_path, values)
    with pytest.raises(ValueError, match=message):
        ActivationStore(tmp_path)


@pytest.mark.parametrize("change", [{"dtype": "int4"}, {"sites": {"a": 0}}, {"sites": {"a": "3"}}])
def test_values_of_a_manifest_are_checked(tmp_path, change):
    write(tmp_path)
    put(tmp_path, manifest_of(tmp_path) | change)
    with pytest.raises(ValueError, match=r"expected \w+ in .*manifest.json to be"):
        ActivationStore(tmp_path)


def test_a_link_must_stay_in_the_folder_or_in_the_cache_of_a_hub(tmp_path):
    store = tmp_path / "models--x" / "snapshots" / "abc"
    store.mkdir(parents=True)
    x = write(store)
    shard = store / "shard-00003.safetensors"
    for place, right in ((tmp_path / "outside", False), (store.parent.parent / "blobs", True)):
        place.mkdir()
        shutil.move(shard.resolve(), place / "file")
        shard.unlink(missing_ok=True)
        shard.symlink_to(place / "file")
        if right:
            assert torch.equal(ActivationStore(store).rows(), x)
        else:
            with pytest.raises(ValueError, match="inside its folder, got a link to elsewhere"):
                ActivationStore(store)


def test_a_store_without_checksums_opens_with_a_note(tmp_path, caplog):
    x = write(tmp_path)
    values = manifest_of(tmp_path)
    for shard in values["shards"]:
        path = tmp_path / shard.pop("file")
        save_file(load_file(path), path)
        shard["file"] = path.name
        del shard["seal"]
    for name in ("checksum", "settings"):
        del values[name]
    (tmp_path / "manifest.json").write_text(json.dumps(values | {"version": 1}))
    store = ActivationStore(tmp_path)
    assert torch.equal(store.rows(), x)
    assert "holds no checksums" in caplog.text
    assert store.fingerprint() == ActivationStore(tmp_path).fingerprint()


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    prints = set()
    for name, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS - 1)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, rows=rows)
        prints.add(ActivationStore(tmp_path / name).fingerprint())
    assert len(prints) == 2
