"""The demo on a tiny model in a folder: repeated, changed, interrupted, misused."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

import fastsae.train
from fastsae import load
from fastsae.cli import main


@pytest.fixture
def argv(model_folder, text, tmp_path):
    return [
        "demo", "--model", model_folder, "--text", text, "--out", str(tmp_path / "demo"),
        "--site", "resid_post.1", "--k", "4", "--expansion", "2", "--epochs", "4",
        "--contexts", "2", "--json",
    ]  # fmt: skip


def count_calls(monkeypatch, module, name):
    """Count the calls of a function from now on."""
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def contexts_module():
    return importlib.import_module("fastsae.data.contexts")


def test_the_demo_writes_everything_and_a_second_run_reuses_it(argv, capsys, monkeypatch):
    assert main(argv) == 0
    out, err = capsys.readouterr()
    numbers = json.loads(out)
    folder = Path(argv[argv.index("--out") + 1])
    assert "<h1>Sparse autoencoder" in (folder / "report.html").read_text()
    assert json.loads((folder / "result.json").read_text()) == numbers
    assert load(folder / "sae").d_sae == 32
    assert 0 < numbers["fvu"] < 1
    assert numbers["cross_entropy"]["sae"] > 0
    phases = ["load model", "harvest", "train", "evaluate", "cross entropy", "report"]
    assert list(numbers["seconds"]) == phases
    said = err.splitlines()
    assert "Trainer: " in said.pop(2)  # the plan of the run
    assert [line[:14].strip() for line in said] == phases

    forwards = count_calls(monkeypatch, contexts_module(), "read")
    steps = count_calls(monkeypatch, fastsae.train.Trainer, "_step")
    assert main(argv) == 0
    again = json.loads(capsys.readouterr().out)
    assert not forwards
    assert not steps
    assert again["fvu"] == numbers["fvu"]

    before = (folder / "sae/sae_weights.safetensors").read_bytes()
    for other in (["--k", "5"], ["--site", "mlp_out.1"]):
        assert main([*argv, *other]) == 1
        assert "choose another --out, or --overwrite replaces it" in capsys.readouterr().err
    assert (folder / "sae/sae_weights.safetensors").read_bytes() == before
    assert main([*argv, "--k", "5", "--overwrite"]) == 0
    assert json.loads(capsys.readouterr().out)["l0"] > 4
    assert not forwards
    assert steps

    assert main([*argv, "--site", "mlp_out.1", "--overwrite"]) == 0
    assert forwards


@pytest.mark.parametrize("phase", ["harvest", "train"])
def test_an_interrupted_demo_continues(argv, capsys, monkeypatch, phase):
    import signal

    calls = []

    def interrupting(real):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGINT)
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if phase == "harvest":
            module = contexts_module()
            patch.setattr(module, "read", interrupting(module.read))
        else:
            patch.setattr(fastsae.train.Trainer, "_step", interrupting(fastsae.train.Trainer._step))
        assert main(argv) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == ("fastsae: interrupted; run the same command again to continue")
    assert "Traceback" not in err
    folder = Path(argv[argv.index("--out") + 1])
    assert not list(folder.rglob("*.tmp"))
    assert main(argv) == 0
    numbers = json.loads(capsys.readouterr().out)
    history = [json.loads(x) for x in (folder / "sae" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == sorted({row["step"] for row in history})
    assert numbers["dead"] < numbers["d_sae"]


def test_a_demo_within_a_time_takes_the_updates_of_its_first_run(argv, capsys, monkeypatch):
    import fastsae.cli.demo as demo_module

    def within(budget, sae, data, config, val):
        asked.append(budget.seconds)
        return replace(config, steps=6)

    asked = []
    monkeypatch.setattr(demo_module, "within", within)
    at = argv.index("--epochs")
    argv = [*argv[:at], *argv[at + 2 :], "--time-budget", "20s"]
    for _ in range(2):
        assert main(argv) == 0
        numbers = json.loads(capsys.readouterr().out)
    assert asked == [20.0]
    folder = Path(argv[argv.index("--out") + 1])
    lines = (folder / "sae" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6
    assert json.loads(lines[-1])["val_fvu"] == pytest.approx(numbers["fvu"], rel=1e-3)
    assert "6 steps in 20s" in (folder / "report.html").read_text()
    assert main([*argv[:-1], "30s"]) == 1
    assert "expected steps = 6, time_budget = 20.0 as in" in capsys.readouterr().err
    assert main([*argv[:-1], "30s", "--overwrite"]) == 0
    assert asked == [20.0, 30.0]


def test_a_folder_of_somebody_else_is_left_alone(argv, capsys):
    folder = Path(argv[argv.index("--out") + 1]) / "sae"
    folder.mkdir(parents=True)
    (folder / "precious.txt").write_text("mine")
    assert main(argv) == 1
    assert "was not made by a demo; choose another --out" in capsys.readouterr().err
    assert (folder / "precious.txt").read_text() == "mine"


def test_too_little_text(argv, capsys, tmp_path):
    (tmp_path / "short.txt").write_text("a few words, again and again.\n\n" * 9)
    assert main([*argv, "--text", str(tmp_path / "short.txt")]) == 1
    assert "expected text of at least 1000 tokens, got " in capsys.readouterr().err
