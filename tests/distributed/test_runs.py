"""Runs over several processes: the same SAE, files, interruptions, and processes that die."""

import json
import signal

import pytest
import torch

import fastsae
from fastsae import Trainer
from fastsae.verification import verify
from tests.distributed import cases
from tests.distributed.launch import torchrun


def alone(name, out, stop=None):
    """Run in this process; `stop`: leave it by a signal after so many updates."""
    sae, train, val, config = cases.run(name, str(out), None)
    trainer = Trainer(sae, train, config, val=val)
    if stop is None:
        return trainer.fit(resume=True)
    step = trainer._step

    def interrupted(x):
        if trainer.steps_done == stop:
            signal.raise_signal(signal.SIGTERM)
        return step(x)

    trainer._step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(resume=True)
    return None


def metrics(out):
    """Return the rows of metrics of a run, without times."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    none = dict.fromkeys(("seconds", "tokens_per_second"))
    return [{**json.loads(line), **none} for line in lines]


def assert_same(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        size = tolerance * float(value.abs().max())
        torch.testing.assert_close(got[key], value, rtol=tolerance, atol=size)


@pytest.mark.parametrize(
    ("mesh", "name"),
    [((1, 2), "TopK"), ((2, 1), "JumpReLU"), ((2, 2), "BatchTopK"), ((1, 2), "Transcoder")],
)
def test_run_is_that_of_one_process(mesh, name, tmp_path):
    expected = alone(name, tmp_path / "alone")
    torchrun(mesh[0] * mesh[1], "run_fit.py", *mesh, name, tmp_path / "several")
    got = torch.load(tmp_path / "several.pt")
    assert_same(got["state"], dict(expected.sae.state_dict()), 1e-6)
    for key in ("val_fvu", "val_l0", "fvu", "l0", "dead", "tokens", "loss"):
        assert got["final"][key] == pytest.approx(expected.final[key], rel=1e-6), key
    loaded, whole = (fastsae.load(tmp_path / folder) for folder in ("several", "alone"))
    assert_same(dict(loaded.state_dict()), dict(whole.state_dict()), 1e-6)
    verified = verify(tmp_path / "several")
    assert not verified.problems
    newest = tmp_path / "several/checkpoints/step_000000060"
    with pytest.raises(ValueError, match="got a checkpoint of several processes"):
        fastsae.load(newest)
    shard = next(newest.glob("shard-00001-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert f"{shard} with the checksum" in verify(tmp_path / "several").problems[0]
    rows = metrics(tmp_path / "several")
    assert [row["step"] for row in rows if row["step"] % 10 == 0] == [10, 20, 30, 40, 50, 60]


def test_run_goes_on_with_any_number_of_processes(tmp_path):
    expected = alone("BatchTopK", tmp_path / "alone")
    out = tmp_path / "run"
    alone("BatchTopK", out, stop=15)
    done = torchrun(4, "run_fit.py", 1, 4, "BatchTopK", out, 30)
    for rank in range(4):
        assert f"rank {rank}: " in done.stdout
    assert "at step 31 of 60" in done.stdout
    torchrun(2, "run_fit.py", 2, 1, "BatchTopK", out, 45)
    got = alone("BatchTopK", out)
    assert_same(dict(got.sae.state_dict()), dict(expected.sae.state_dict()), 1e-6)


def test_interrupted_run_has_the_bits_of_an_uninterrupted_one(tmp_path):
    torchrun(2, "run_fit.py", 1, 2, "TopK", tmp_path / "whole")
    for stop in (10, 50):
        torchrun(2, "run_fit.py", 1, 2, "TopK", tmp_path / "parts", stop)
    torchrun(2, "run_fit.py", 1, 2, "TopK", tmp_path / "parts")
    whole, parts = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "parts"))
    for key, value in whole["state"].items():
        assert torch.equal(parts["state"][key], value), key
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
