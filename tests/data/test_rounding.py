"""Stores of int8: half the bytes of bfloat16, an error of half a step of each row, and checks."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastsae import TopKSAE, TrainConfig, Trainer, verify
from fastsae.data import ActivationStore, harvest
from fastsae.data.rounding import to_int8
from tests.models.tiny import DOCUMENTS, CharTokenizer, D, tiny_model

SITES = ["resid_post.1", "attn_z.0"]
SMALL = {"context": 20, "batch_size": 3, "val_fraction": 0, "shard_rows": 100}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The same rows as float32 and as int8."""
    folder = tmp_path_factory.mktemp("stores")
    for dtype in ("float32", "int8"):
        harvest(
            tiny_model(), CharTokenizer(), DOCUMENTS, SITES, folder / dtype, dtype=dtype, **SMALL
        )
    return folder / "float32", folder / "int8"


def rounded(x):
    """What int8 makes of rows, in float64 and row by row."""
    rows = []
    for row in x.double().numpy():
        scale = np.abs(row).max() / 127
        rows.append(np.rint(row / scale) * scale if scale else row)
    return torch.from_numpy(np.stack(rows))


def test_an_entry_is_off_by_at_most_half_a_step_of_its_row(stores):
    exact, rough = (ActivationStore(path, SITES) for path in stores)
    x, y = exact.rows().double(), rough.rows().double()
    for block, read in zip(x.split(D, 1), y.split(D, 1), strict=True):
        step = block.abs().amax(1, keepdim=True) / 127
        error = (block - read).abs()
        assert bool((error <= step / 2 * (1 + 1e-5)).all())
        assert float((error / step).max()) > 0.45  # the bound is reached, so it is the right one
        torch.testing.assert_close(read, rounded(block), rtol=1e-5, atol=1e-7)
    assert exact.token_ids().tolist() == rough.token_ids().tolist()


def test_all_ways_to_read_give_the_same_rows(stores):
    store = ActivationStore(stores[1], SITES[::-1], buffer_bytes=150 * 2 * D)  # two shards at once
    rows = store.rows()
    assert rows.dtype == torch.float32
    one = ActivationStore(stores[1], SITES[0]).rows()
    assert torch.equal(rows[:, D:], one)
    assert torch.equal(torch.cat(list(store.batches(7, seed=None))), rows)
    shuffled = torch.cat(list(store.epoch(16, seed=3)))
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, rows.tolist()))
    assert not torch.equal(shuffled, rows)
    every = {tuple(row) for row in rows.tolist()}
    assert {tuple(row) for row in store.sample(30).tolist()} <= every
    rest, held = store.hold_back(64)
    assert sorted(
        map(tuple, torch.cat([x for s in (rest, held) for x in s.batches(50, seed=None)]).tolist())
    ) == sorted(map(tuple, rows.tolist()))


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-39, 1e-30, 1.0, 3e38])
def test_rows_of_any_size(largest):
    x = torch.tensor([[largest, -largest / 3, largest / 1000, 0.0]])
    q, scale = to_int8(x)
    assert q.dtype == torch.int8
    assert int(q.abs().max()) <= 127
    assert bool(scale.isfinite().all() and (scale > 0).all())
    error = (x.double() - q.double() * scale.double().unsqueeze(1)).abs()
    assert bool((error <= scale.double() / 2 * (1 + 1e-5)).all())


def test_an_outlier_costs_its_row_the_small_entries():
    x = torch.ones(2, 8)
    x[1, 0] = 300
    q, scale = to_int8(x)
    assert q[0].tolist() == [127] * 8
    assert q[1].tolist() == [127] + [0] * 7
    torch.testing.assert_close(scale, torch.tensor([1 / 127, 300 / 127]))


def test_half_the_bytes_of_bfloat16(tmp_path):
    sizes = {}
    for dtype in (torch.bfloat16, torch.int8):
        harvest(tiny_model(), CharTokenizer(), DOCUMENTS, SITES[0], tmp_path / str(dtype),
                dtype=dtype, **SMALL)  # fmt: skip
        store = ActivationStore(tmp_path / str(dtype))
        files = [store._checked(shard) for shard in store.shards]
        sizes[dtype] = sum(
            np.prod(file.shapes[name]) * {"BF16": 2, "I8": 1, "F32": 4}[file.dtypes[name]]
            for file in files
            for name in file.shapes
            if name.startswith(("acts", "scale"))
        )
        rows = len(store)
    assert sizes[torch.bfloat16] == rows * D * 2
    assert sizes[torch.int8] == rows * (D + 4)


def test_an_interrupted_harvest_continues_to_the_same_bytes(tmp_path):
    def texts(stop):
        yield from DOCUMENTS[:stop]
        raise KeyboardInterrupt

    def call(folder, documents):
        return harvest(
            tiny_model(), CharTokenizer(), documents, SITES, folder, dtype="int8",
            **SMALL | {"batch_size": 1, "shard_rows": 30},
        )  # fmt: skip

    call(tmp_path / "whole", DOCUMENTS)
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path / "cut", texts(4))
    with pytest.raises(ValueError, match="expected dtype = 'int8' as in the interrupted"):
        harvest(tiny_model(), CharTokenizer(), DOCUMENTS, SITES, tmp_path / "cut")
    call(tmp_path / "cut", DOCUMENTS)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()


def test_damage_of_a_scale_is_found(tmp_path):
    harvest(tiny_model(), CharTokenizer(), DOCUMENTS, SITES[0], tmp_path, dtype="int8", **SMALL)
    assert verify(tmp_path).ok
    store = ActivationStore(tmp_path)
    path = tmp_path / store.shards[0].file
    place = store._files[path.name].offset(f"scale.{SITES[0]}")
    data = bytearray(path.read_bytes())
    data[place + 2] ^= 8
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"to hold scale.resid_post.1 as it was written"):
        ActivationStore(tmp_path).rows()
    (problem,) = verify(tmp_path).problems
    assert "scale.resid_post.1" in problem


def test_a_run_trains_on_them_and_resumes(stores, tmp_path):
    def train(out):
        torch.manual_seed(0)
        config = TrainConfig(steps=12, batch_size=50, out=str(tmp_path / out), checkpoint_every=5,
                             progress=False)  # fmt: skip
        return Trainer(TopKSAE(D, 32, k=4), ActivationStore(stores[1], SITES[0]), config)

    result = train("a").fit()
    assert 0 < result.final["fvu"] < 1
    again = train("b")
    step = again._step
    again._step = lambda x: step(x) if again.steps_done < 7 else (_ for _ in ()).throw(OSError("x"))
    with pytest.raises(OSError, match="x"):
        again.fit()
    resumed = train("b").fit(resume=True)
    for a, b in zip(
        result.sae.state_dict().values(), resumed.sae.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_commands_know_it(stores):
    def run(*args):
        command = [sys.executable, "-m", "fastsae.cli", *args, "--json"]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    facts = run("inspect", str(stores[1]))
    assert facts["dtype"] == "int8"
    assert facts["rounding"] == "one scale for each row; an entry is off by at most max |row| / 254"
    assert "rounding" not in run("inspect", str(stores[0]))
    assert run("verify", str(stores[1]))["ok"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int4"}, "expected dtype float16, bfloat16, float32, int8, got int4"),
        (
            {"dtype": "int8", "gradients": True},
            "dtype bfloat16 or float32 with gradients, got int8",
        ),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        harvest(tiny_model(), CharTokenizer(), DOCUMENTS, SITES[0], tmp_path, **arguments)
    assert not list(tmp_path.iterdir())
