"""A process that dies, or gets what it cannot compute with, stops all, and no file is torn."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import command, once, settings, torchrun

KILLS = int(os.environ.get("FASTSAE_KILLS", "3"))


def workers(agent):
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_process_stops_all_and_the_run_goes_on(kill, tmp_path, whole_run):
    choose, out = random.Random(kill), tmp_path / "run"
    process = subprocess.Popen(
        command(2, "run_fit.py", 1, 2, "TopK", out),
        env=settings(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(choose.uniform(0, 1.5))
    pids = workers(process.pid)
    begun = time.monotonic()
    if pids:
        os.kill(choose.choice(pids), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - begun < 60
    assert not any(is_alive(pid) for pid in pids)
    if pids and process.returncode == 0:
        assert (out / "run.json").exists()  # it was at its end
    torchrun(2, "run_fit.py", 1, 2, "TopK", out)
    got = torch.load(f"{out}.pt")
    for name, value in whole_run["state"].items():
        assert torch.equal(got["state"][name], value), (name, said[-3000:])
    assert not list(out.rglob(".fastsae-*"))


def test_torchrun_goes_on_by_itself(tmp_path, whole_run):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(2, "run_fit.py", 1, 2, "TopK", out, restarts=1),
        env=settings(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    pids = workers(process.pid)
    os.kill(pids[1], signal.SIGKILL)
    assert process.wait(timeout=120) == 0
    got = torch.load(f"{out}.pt")
    for name, value in whole_run["state"].items():
        assert torch.equal(got["state"][name], value), name


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    def run(out):
        torchrun(2, "run_fit.py", 1, 2, "TopK", out)

    return torch.load(f"{once(tmp_path_factory, 'whole', run)}.pt")
