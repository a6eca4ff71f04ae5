"""Several SAEs from one pass: what fails ends one run, and what cannot be is one line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import fastsae
from fastsae import Trainer
from fastsae.data import TensorSource, only_sites
from fastsae.train import Run, latest, many, train_many
from tests.train.test_many import CLASSES, Counted, alone, rows, runs, settings
from tests.train.test_resume_classes import assert_same


def test_a_run_that_fails_does_not_lose_the_others(tmp_path, caplog):
    x = torch.cat([rows(), rows(seed=4)], 1)
    bad = x.clone()
    order = next(TensorSource(torch.arange(1000.0)[:, None]).batches(1000, seed=0))
    place = int(order[17 * 50])  # in batch 17
    bad[place, 9] = torch.nan
    made = [
        Run("good", CLASSES["topk"], settings(), "a"),
        Run("bad", CLASSES["topk"], settings(sample_rows=24), "b"),
    ]
    how = {"out": tmp_path, "checkpoint_every": 10}
    # A sample without the bad row, as a sample of 24 rows of 1000 is.
    assert place not in torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:24]
    found = train_many(made, Counted(bad), **how)
    assert found["good"].error is None
    expected = alone(made[0], made[0].config, only_sites(Counted(x), "a"))
    assert_same(expected.sae, found["good"].sae)
    assert found["bad"].result is None
    why = "expected finite activations at step 17, got 1 of 50 rows with NaN or Inf"
    assert found["bad"].error.startswith(why)
    assert caplog.text.count(f"run bad failed: {why}") == 1
    said = json.loads((tmp_path / "bad" / "failed.json").read_text())
    assert said["steps"] == 17
    assert said["error"].startswith(why)
    assert not (tmp_path / "bad" / "cfg.json").exists()
    assert not (tmp_path / "good" / "failed.json").exists()

    class Repaired(Counted):
        def fingerprint(self):
            return Counted(bad).fingerprint()

    again = train_many(made, Repaired(x), **how, resume=True)
    assert again["bad"].error is None
    assert not (tmp_path / "bad" / "failed.json").exists()
    assert latest(tmp_path / "bad" / "checkpoints").name == "step_000000030"
    assert_same(alone(made[1], made[1].config, only_sites(Counted(x), "b")).sae, again["bad"].sae)


def test_a_start_on_bad_rows_and_data_that_end(tmp_path):
    x = torch.cat([rows(), torch.full((1000, 8), torch.nan)], 1)
    made = [Run(site, CLASSES["topk"], settings(), site) for site in "ab"]
    found = train_many(made, Counted(x), out=tmp_path)
    assert found["a"].error is None
    assert "1000 of 1000 rows with NaN or Inf" in found["b"].error
    assert json.loads((tmp_path / "b" / "failed.json").read_text())["steps"] == 0
    found = train_many(runs(calibration_rows=0), iter(rows(1600).split(50)))
    assert [r.error for r in found.values()] == [None, None, "expected data for 44 steps, got 32"]


def test_an_error_of_the_data_leaves_checkpoints_of_all(tmp_path):
    def broken(count):
        if count == 20:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train_many(runs(calibration_rows=0), Counted(rows(), broken), out=tmp_path)
    assert {latest(tmp_path / n / "checkpoints").name for n in CLASSES} == {"step_000000018"}
    found = train_many(runs(calibration_rows=0), rows(), out=tmp_path, resume=True)
    for run in runs(calibration_rows=0):
        assert_same(alone(run, run.config, rows()).sae, found[run.name].sae)


def test_a_row_that_cannot_be_written_ends_one_run(tmp_path, monkeypatch):
    write_row = Trainer._write_row

    def full(self, row):
        if self.out.name == "batchtopk" and row["step"] == 20:
            raise RuntimeError("Trainer: could not write metrics.jsonl (No space left on device)")
        write_row(self, row)

    monkeypatch.setattr(Trainer, "_write_row", full)
    found = train_many(runs(), rows(), out=tmp_path)
    errors = {name: result.error for name, result in found.items()}
    assert errors["batchtopk"] == "could not write metrics.jsonl (No space left on device)"
    assert errors["topk"] is errors["jumprelu"] is None


BAD = [
    ([], ValueError, "expected at least one run, got none"),
    ([("x", 3, settings())], TypeError, "the sae of run x to be an SAE or to make one, got int"),
    (["x"], TypeError, r"expected runs to be \(name, sae, config\), got str"),
    ([("x", CLASSES["topk"], 3)], TypeError, "the config of run x to be a TrainConfig, got int"),
    ([("x", CLASSES["topk"]), ("x", CLASSES["topk"])], ValueError, "a name for each run, got 'x'"),
    ([("../x", CLASSES["topk"])], ValueError, r"a name that a folder can have, got '\.\./x'"),
    ([("", CLASSES["topk"])], ValueError, "a name that a folder can have, got ''"),
    ([("x", lambda: fastsae.TopKSAE(9, 24, 3))], ValueError, "run x: expected data with d_in = 9"),
    ([("x", lambda: 3)], TypeError, "run x: expected sae to be an SAE, got int"),
]


@pytest.mark.parametrize(("bad", "kind", "message"), BAD)
def test_bad_runs_are_one_line(bad, kind, message, tmp_path):
    with pytest.raises(kind, match=f"^train_many: .*{message}[^\n]*$"):
        train_many(bad, rows(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"one seed for all runs, .* got 0 \(x\) and 1 \(y\); start_seed may differ"),
        ({"batch_size": 40}, r"one batch_size for all runs, .* got 50 \(x\) and 40 \(y\)"),
        ({"calibration_rows": 70}, r"one number of rows to hold back .* got 60 \(x\) and 70 \(y\)"),
    ],
)
def test_runs_that_cannot_share_batches(change, message):
    config = settings(calibration_rows=60)
    build = CLASSES["batchtopk"]
    with pytest.raises(ValueError, match=message):
        train_many([("x", build, config), ("y", build, replace(config, **change))], rows())


def test_folders_are_not_mixed(tmp_path):
    sae = CLASSES["topk"]()
    with pytest.raises(ValueError, match="expected a module for each run, got the same one twice"):
        train_many([("x", sae, settings()), ("y", sae, settings())], rows())
    with pytest.raises(ValueError, match=r"expected no out in the config of run x, whose folder"):
        train_many([("x", sae, settings(out="elsewhere"))], rows(), out=tmp_path)
    train_many(runs(), rows(), out=tmp_path)
    with pytest.raises(ValueError, match=r"expected out to hold no earlier run, got .*topk"):
        train_many(runs(), rows(), out=tmp_path)
    began = []
    with pytest.raises(ValueError, match=r"expected lr = 0\.003 as in .*, got 0\.1"):
        train_many(runs(lr=0.1), rows(), out=tmp_path, resume=True,
                   started=began.append)  # fmt: skip
    assert not began
    assert not (tmp_path / "topk" / "failed.json").exists()
    with (
        many.locked(tmp_path / "jumprelu", "test"),
        pytest.raises(RuntimeError, match=r"expected no other run in .*jumprelu"),
    ):
        train_many(runs(), rows(), out=tmp_path, resume=True)


def test_a_damaged_checkpoint_fails_one_run(tmp_path):
    whole = train_many(runs(), rows(), out=tmp_path)
    state = latest(tmp_path / "topk" / "checkpoints") / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-5] ^= 1
    state.write_bytes(data)
    found = train_many(runs(), rows(), out=tmp_path, resume=True)
    assert "state.safetensors" in found["topk"].error
    assert_same(whole["jumprelu"].sae, found["jumprelu"].sae)
