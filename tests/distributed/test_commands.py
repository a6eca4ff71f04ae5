"""The command line: `fastsae plan`, and `fastsae train` under torchrun."""

import json
import subprocess
import sys

import pytest
import torch

import fastsae
from fastsae.cli import main
from tests.distributed.launch import settings


def test_plan_prints_what_a_run_takes(capsys):
    sizes = ["--d-in", "1024", "--d-sae", "65536", "--k", "32", "--gpus", "8", "--tokens", "1e9"]
    assert main(["plan", *sizes, "--latent-parallel", "4"]) == 0
    said = capsys.readouterr().out
    assert "2 data groups x 4 latent processes" in said
    assert "16,384" in said
    assert main(["plan", *sizes, "--latent-parallel", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["held"] == 16384
    assert found["sent"] == sum(one["numbers"] * one["size"] for one in found["collectives"])


def test_plan_takes_the_fastest_mesh_that_fits(capsys):
    sizes = ["--d-in", "4096", "--d-sae", "1048576", "--gpus", "8", "--json"]
    assert main(["plan", *sizes]) == 0
    roomy = json.loads(capsys.readouterr().out)
    assert main(["plan", *sizes, "--memory", "30e9"]) == 0
    narrow = json.loads(capsys.readouterr().out)
    assert narrow["latent"] > 1
    assert narrow["memory"] <= 30e9
    assert sum(roomy["seconds"].values()) <= sum(narrow["seconds"].values())
    assert main(["plan", *sizes, "--memory", "1e9"]) == 1
    assert "expected a device with" in capsys.readouterr().err


def test_wrong_numbers_of_processes(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", "store", "--out", str(tmp_path), "--latent-parallel", "3"]) == 1
    assert "to be the 4 processes of torchrun, got 1 * 3" in capsys.readouterr().err
    assert main(["train", "store", "--out", str(tmp_path), "--time-budget", "1m"]) == 1
    assert "expected --time-budget in one process, got 4 processes" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--latent-parallel", "2"], ["--data-parallel", "2"]])
def test_train_under_torchrun(options, tmp_path):
    import numpy as np

    rows = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "rows.npy", rows.numpy())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "fastsae.cli", "train", str(tmp_path / "rows.npy"), "--k", "4"]
    command += ["--out", str(tmp_path / "sae"), "--steps", "20", "--batch-size", "64", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env=settings(), timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.strip().splitlines()) == 1  # of the first process alone
    sae = fastsae.load(tmp_path / "sae")
    assert sae.d_sae == 64
    with torch.no_grad():
        error = (sae(rows) - rows).square().sum()
    assert float(error / (rows - rows.mean(0)).square().sum()) < 0.9


def test_sweep_is_shared_by_processes(tmp_path):
    import numpy as np

    rows = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "rows.npy", rows.numpy())
    (tmp_path / "sweep.yaml").write_text("steps: 20\nbatch-size: 64\nsweep:\n  k: [2, 4, 6]\n")
    arguments = ["train", str(tmp_path / "rows.npy"), "--sweep", str(tmp_path / "sweep.yaml")]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "fastsae.cli", *arguments, "--out", str(tmp_path / "two")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=settings(), timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.strip().splitlines()) == 4  # names of columns, and the runs
    found = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("one", "two")]
    for runs in (part["runs"] for part in found):
        for run in runs:
            del run["seconds"]
    assert found[0]["runs"] == found[1]["runs"]
    assert [run["k"] for run in found[0]["runs"]] == [2, 4, 6]
    for k in (2, 4, 6):
        one, two = (fastsae.load(tmp_path / out / f"k-{k}") for out in ("one", "two"))
        assert torch.equal(one.W_dec, two.W_dec)
