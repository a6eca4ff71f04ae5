"""`fastsae train --sweep`: one schema with the command line, and the runs that it stands for."""

from __future__ import annotations

import json

import pytest
import torch

import fastsae
from fastsae import cli
from fastsae.cli.sweep_file import read
from fastsae.data import harvest
from tests.models.tiny import DOCUMENTS, CharTokenizer, tiny_model

SITES = ["resid_post.0", "mlp_out.1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("acts")
    texts = [f"{i} {text}" for i in range(20) for text in DOCUMENTS]
    harvest(tiny_model(), CharTokenizer(), texts, SITES, folder, context=20)
    return folder


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return path

    return write


def fails(capsys, *argv):
    assert cli.main([str(a) for a in argv]) == 1
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert lines[-1].startswith("fastsae: ")
    return out, lines


EXAMPLE = """
steps: 20
batch-size: 64
expansion: 2
site: resid_post.0
sweep:
  k: [2, 4]
  arch: [topk, batchtopk]
runs:
  - {name: other site, site: mlp_out.1, k: 3, start-seed: 7}
  - {arch: transcoder, site: [resid_post.0, mlp_out.1], option: {skip: true}}
"""
NAMES = ["k-2_arch-topk", "k-2_arch-batchtopk", "k-4_arch-topk", "k-4_arch-batchtopk"]
NAMES += ["other site", "arch-transcoder_site-resid_post.0+mlp_out.1_option-skip=true"]


def test_a_sweep_trains_what_single_runs_train(store, written, tmp_path, capsys):
    out, path = tmp_path / "out", written(EXAMPLE)
    assert cli.main(["train", str(store), "--sweep", str(path), "--out", str(out)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["name", "k", "d_sae", "fvu", "l0", "dead", "seconds"]
    assert [line.split("  ")[0] for line in table[1:]] == NAMES
    assert len({len(line) for line in table}) == 1
    results = json.loads((out / "results.json").read_text())["runs"]
    assert [row["name"] for row in results] == NAMES
    assert all(row["error"] is None and row["steps"] == 20 for row in results)
    assert all(0 < row["fvu"] < 2 for row in results)
    said = json.loads((out / "sweep.json").read_text())
    assert said["format"] == "fastsae-sweep"
    assert said["store"] == str(store)
    assert [run["name"] for run in said["runs"]] == NAMES
    assert said["runs"][3]["options"]["k"] == 4
    assert said["runs"][3]["config"]["steps"] == 20
    assert {run["config"]["hold_back"] for run in said["runs"]} == {None, 512}
    held = ["--hold-back", "512"]  # which BatchTopK does by itself
    shared = ["--steps", "20", "--batch-size", "64", "--expansion", "2"]
    for name, own in {
        "k-4_arch-batchtopk": ["--site", "resid_post.0", "--arch", "batchtopk", "--k", "4"],
        "other site": ["--site", "mlp_out.1", "--k", "3", "--start-seed", "7", *held],
        NAMES[-1]: ["--arch", "transcoder", "--option", "skip=true", "--site", "resid_post.0",
                    "--site", "mlp_out.1", *held],
    }.items():  # fmt: skip
        alone = tmp_path / "alone" / name
        assert cli.main(["train", str(store), "--out", str(alone), *shared, *own]) == 0
        assert (alone / "sae_weights.safetensors").read_bytes() == (
            out / name / "sae_weights.safetensors"
        ).read_bytes()
        assert (alone / "cfg.json").read_bytes() == (out / name / "cfg.json").read_bytes()
    assert fastsae.load(out / "other site").metadata["hook_name"] == "blocks.1.hook_mlp_out"


def test_resume_and_a_second_start(store, written, tmp_path, capsys):
    path = written("steps: 10\nbatch-size: 64\nsite: mlp_out.1\nsweep: {k: [2, 4]}")
    argv = ["train", store, "--sweep", path, "--out", tmp_path / "out"]
    assert cli.main([str(a) for a in (*argv, "--json")]) == 0
    first = json.loads(capsys.readouterr().out)["runs"]
    _, lines = fails(capsys, *argv)
    assert "expected out to hold no earlier run" in lines[-1]
    assert cli.main([str(a) for a in (*argv, "--json", "--resume")]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == first
    written("steps: 10\nbatch-size: 64\nsite: mlp_out.1\nsweep: {k: [2, 4, 6]}")  # one more
    assert cli.main([str(a) for a in (*argv, "--resume")]) == 0
    written("steps: 10\nbatch-size: 64\nsite: mlp_out.1\nsweep: {k: [2]}")
    _, lines = fails(capsys, *argv, "--resume")
    assert "expected run 'k-4' of" in lines[-1]
    written("steps: 11\nbatch-size: 64\nsite: mlp_out.1\nsweep: {k: [2, 4, 6]}")
    before = (tmp_path / "out" / "sweep.json").read_bytes()
    _, lines = fails(capsys, *argv, "--resume")
    assert "expected steps = 10 as in" in lines[-1]
    assert (tmp_path / "out" / "sweep.json").read_bytes() == before


def test_a_failed_run_is_in_the_table_and_the_exit_code(
    store, written, tmp_path, capsys, monkeypatch
):
    step = fastsae.Trainer._step

    def broken(self, x):
        if self.sae.k == 4 and self.steps_done == 5:
            raise RuntimeError("no such luck")
        return step(self, x)

    monkeypatch.setattr(fastsae.Trainer, "_step", broken)
    path = written("steps: 10\nbatch-size: 64\nsite: mlp_out.1\nsweep: {k: [2, 4]}")
    out, lines = fails(capsys, "train", store, "--sweep", path, "--out", tmp_path / "out")
    assert out.splitlines()[2].split() == ["k-4", "4", "128", "failed", "-", "-", "-"]
    why = "train: 1 of 2 runs failed, --resume tries them again: k-4 (no such luck)"
    assert lines[-1] == f"fastsae: {why}"
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [row["error"] for row in rows] == [None, "no such luck"]


def test_a_file_of_another_program(written, tmp_path, capsys):
    from numpy import save

    save(tmp_path / "x.npy", torch.randn(600, 8).numpy())
    path = written("steps: 5\nbatch-size: 50\nsweep: {expansion: [2, 4]}")
    argv = ["train", tmp_path / "x.npy", "--sweep", path, "--k", 2, "--out", tmp_path / "out"]
    assert cli.main([str(a) for a in (*argv, "--json")]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [(row["k"], row["d_sae"]) for row in runs] == [(2, 16), (2, 32)]


def test_levels(written):
    """A run goes before the command line, which goes before values for all runs."""
    path = written("k: 5\nlr: 1e-3\nsteps: 9\nruns: [{name: a}, {name: b, k: 7}, {epochs: 2}]")
    a, b, c = read(path, ["train", "x", "--out", "y", "--k=6", "--sweep", str(path)])
    assert (a.args.k, b.args.k, c.args.k) == (6, 7, 6)
    assert a.args.lr == 1e-3
    assert (a.args.steps, c.args.steps, c.args.epochs, c.name) == (9, None, 2.0, "epochs-2")
    (run,) = read(path, ["train", "x", "--epochs", "3"])[:1]
    assert (run.args.steps, run.args.epochs) == (None, 3.0)


BAD = [
    (
        "expnsion: 4\nsweep: {k: [1]}",
        "option of fastsae train, got 'expnsion'; did you mean expans",
    ),
    ("sweep: {archs: [topk]}", "train in sweep, got 'archs'; did you mean arch?"),
    ("runs: [{zzz: 1}]", "train in run 1, got 'zzz'; known are site, arch, k,"),
    ("swep: {k: [1]}", "got 'swep'; did you mean sweep?"),
    ("sweep: {k: [many]}", "run k-many: argument --k: expected an integer >= 1, got 'many'"),
    ("sweep: {k: [true]}", "run k-True: expected k to be one value, got True"),
    ("runs: [{k: [1, 2]}]", "run k-1+2: expected k to be one value, got [1, 2]"),
    ("sweep: {k: [1]}\ntensorboard: 3", "run k-1: expected tensorboard to be true or false, got 3"),
    ("sweep: {arch: [topkk]}", "run arch-topkk: argument --arch: invalid choice: 'topkk'"),
    ("sweep: {lr: [fast]}", "run lr-fast: argument --lr: invalid float value: 'fast'"),
    ("sweep: {k: []}", "expected a list of values for k in sweep, got []"),
    ("sweep: {k: 4}", "expected a list of values for k in sweep, got 4"),
    ("sweep: [k]", "expected sweep to be a list of values for each option, got ['k']"),
    ("runs: 3", "expected runs to be a list, got 3"),
    ("runs: [3]", "expected run 1 to be a mapping of options, got 3"),
    ("runs: [{}]", "expected a name or an option in run 1, got none"),
    ("k: 3", "expected at least one run, in sweep or runs, got none"),
    ("runs: [{name: a}, {name: a, k: 3}]", "expected a name for each run, got 'a' twice"),
    ("sweep: {k: [4, 4]}", "expected a name for each run, got 'k-4' twice"),
    ("sweep: {seed: [1, 2]}", "for all runs, which take the same batches, got it in sweep; start-"),
    ("runs: [{batch_size: 5}]", "expected batch-size for all runs, which take the same batches"),
    ("batch_size: 5\nbatch-size: 6\nruns: [{k: 1}]", "expected batch-size once, got it twice"),
    ("time-budget: 5m\nsweep: {k: [1]}", "expected steps or epochs, got time-budget, which is of"),
    ("steps: 3\nepochs: 4\nsweep: {k: [1]}", "run k-1: argument --epochs: not allowed with argum"),
    ("- k", "expected {path} to be a YAML mapping, got list"),
    ("k: [", "expected {path} to be YAML, got"),
    ("runs: [{name: a/b}]", "expected a name that a folder can have, got 'a/b'"),
    (
        "runs: [{name: a, k: 9999}]",
        "run a: TopKSAE: expected k to be an integer in 1..d_sae = 128, got k = 9999",
    ),
    ("runs: [{name: a, option: {colour: 3}}]", "run a: train: expected --option of TopKSAE, got"),
    ("runs: [{name: a, site: nowhere.3}]", "one of resid_post.0, mlp_out.1 in"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_what_is_wrong_is_one_line(text, message, store, written, tmp_path, capsys):
    text = text if "site" in text or text[0] == "-" else f"site: mlp_out.1\n{text}"
    path, out = written(text), tmp_path / "out"
    printed, lines = fails(capsys, "train", store, "--sweep", path, "--out", out)
    assert printed == ""
    assert len(lines) == 1
    assert message.replace("{path}", str(path)) in lines[0]
    assert not out.exists()


def test_options_of_a_single_run(store, written, tmp_path, capsys):
    path = written("sweep: {k: [1]}")
    argv = ["train", store, "--sweep", path, "--out", tmp_path / "out"]
    for own in (["--time-budget", "5m"], ["--resume-from", "x"]):
        _, lines = fails(capsys, *argv, *own)
        assert f"expected --sweep without {own[0]}, which is of a single run" in lines[-1]
    _, lines = fails(capsys, "train", store, "--sweep", tmp_path / "no", "--out", tmp_path / "out")
    assert f"expected {tmp_path / 'no'}, found none" in lines[-1]
