"""The search for the shortest run that reaches a target, and its tables."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from bench import time_to_quality
from bench.time_to_quality import Runs, fewest, measure, report, step_grid, sweep
from bench.training_runs import OLD, Job, Trained, fvu, load, train
from fastsae.data import TensorSource

GRID = step_grid(32, 1024, 2)


@pytest.fixture
def data(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(700, 6) @ torch.randn(6, 16) + 3
    x[5] = 1000
    save_file({"acts": x}, tmp_path / "x.safetensors", metadata={"n_train": "600"})
    return tmp_path / "x.safetensors"


class Known:
    """Runs whose FVU is best / steps at rate 4, and more the further the rate is from that."""

    def __init__(self, best: float = 100.0) -> None:
        self.best, self.asked = best, set()

    def fvu(self, name, lr, steps, seed):
        self.asked.add((lr, steps, seed))
        return (self.best + seed) * (1 + abs(math.log2(lr / 4e-3))) / steps


def test_numbers_of_steps_are_geometric() -> None:
    assert step_grid(32, 128, 2) == [32, 45, 64, 91, 128]
    assert len(GRID) == 11


@pytest.mark.parametrize("rates", [(1e-3, 2e-3, 4e-3), (4e-3,), (5e-4, 1e-3), (16e-3, 64e-3)])
def test_a_sweep_finds_the_best_rate_and_the_fewest_steps(rates) -> None:
    runs = Known()
    assert sweep(runs, "x", rates, GRID, 0.5, seed=0) == (4e-3, GRID.index(256))
    # Those on both sides are known to be worse.
    assert {2e-3, 8e-3} <= {lr for lr, _, _ in runs.asked}


def test_a_target_that_is_out_of_reach_leaves_the_longest_run() -> None:
    assert sweep(Known(), "x", (2e-3, 4e-3), GRID, 1e-3, seed=0) == (4e-3, len(GRID) - 1)


@pytest.mark.parametrize("place", [0, 5, 6, 10])
def test_the_fewest_steps_of_a_seed_are_found_from_anywhere(place) -> None:
    assert fewest(Known(), "x", 4e-3, place, GRID, 0.5, 0) == 256
    assert fewest(Known(), "x", 4e-3, place, GRID, 0.5, 100) == 512


def test_fvu_of_the_mean_is_1() -> None:
    x = torch.randn(3000, 8) + 5
    assert fvu(x, lambda part: x.mean(0).expand_as(part)) == pytest.approx(1)
    assert fvu(x, lambda part: part) == 0


def test_outliers_are_left_out(data) -> None:
    rows, held_out = load(data)
    assert (len(rows), len(held_out)) == (599, 100)


def test_a_run_is_fastsaes_own() -> None:
    rows = TensorSource(torch.randn(256, 8))
    old = train(OLD, Job(rows, 32, 4, None, 20, seed=0, batch_size=64))
    same = train("fastsae", Job(rows, 32, 4, 2e-4 / (32 / 2**14) ** 0.5, 20, 0, batch_size=64))
    assert old.lr == same.lr
    torch.testing.assert_close(old.reconstruct(rows.x), same.reconstruct(rows.x))


def test_an_interrupted_measurement_continues(data, tmp_path, monkeypatch) -> None:
    trained = []

    def stand_in(name, job):
        trained.append((name, job.lr, job.steps))
        scale = 1e-2 * (2 if name == OLD else 1) * 32 / job.steps
        if job.lr == 1:
            raise RuntimeError("expected a finite loss")
        return Trained(job.steps * (1e-3 if name == "fastsae" else 4e-3), lambda x: x + scale, 0.1)

    monkeypatch.setattr(time_to_quality, "train", stand_in)
    arguments = argparse.Namespace(
        seeds=[0, 1], target=None, range=[32, 1024], per_octave=2, lr=None, rates=(0.1,), repeats=2
    )
    out = tmp_path / "out.jsonl"
    measure(Runs(data, None, out, 32, 4), arguments, ["fastsae", "sae-lens"])
    lines, first = out.read_text(), len(trained)
    assert OLD in {name for name, _, _ in trained}
    measure(Runs(data, None, out, 32, 4), arguments, ["fastsae", "sae-lens"])
    assert out.read_text() == lines
    assert {steps for _, _, steps in trained[first:]} == {time_to_quality.WARM_UP}
    text = report([json.loads(line) for line in lines.splitlines()])
    assert "| fastsae | 0.1 | 512 | " in text
    assert "| sae-lens | 0.1 | 512 | " in text
    assert "fastsae / best of the others: 0.250" in text
    runs = Runs(data, None, out, 32, 4)
    assert runs.fvu("sae-lens", 1, 64, 0) == math.inf
    assert runs.lines[-1]["fvu"] is None
