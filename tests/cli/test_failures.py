"""What goes wrong in a command is one line that says what to do, and an exit code."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastsae.cli
from fastsae.cli import main


def fails(capsys, *argv: str, code: int = 1) -> str:
    """Run, check the exit code and that stderr is one line; return it."""
    assert main([*argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastsae: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def store(model_folder, text, tmp_path, capsys) -> str:
    """Return a store of one site, harvested by the command from a model in a folder."""
    folder = str(tmp_path / "acts")
    argv = ["harvest", "--model", model_folder, "--text", text, text, text, "--out", folder]
    argv += ["--site", "resid_post.1", "--val-fraction", "0.34", "--context", "64"]
    assert main(argv) == 0
    assert "training rows" in capsys.readouterr().out
    return folder


def test_folders_sites_and_sizes(capsys, tmp_path, model_folder, text, store):
    model = ["--model", model_folder, "--text", text]
    out = ["--out", str(tmp_path / "new")]
    sae = str(tmp_path / "sae")
    assert main(["train", store, "--out", sae, "--k", "4", "--batch-size", "256"]) == 0
    capsys.readouterr()
    for argv, message in [
        (["harvest", *model, "--site", "resid_post.7", *out], "expected a layer in 0..2, got 7"),
        (["harvest", *model, "--site", "mlp_in.0", "--out", store], "already holds a complete"),
        (["harvest", *model, "--site", "mlp_in.0", *out, "--context", "1"], "context >= 2"),
        (["train", store, "--site", "mlp_in.0", *out], "one of resid_post.1 in"),
        (["train", store, "--k", "9999", *out], "got k = 9999"),
        (["eval", sae, store, "--model", model_folder], "--model and --text together"),
        (["inspect", str(tmp_path)], "to be of one of the formats fastsae, saelens"),
    ]:
        assert message in fails(capsys, *argv)


@pytest.mark.parametrize("value", ["0", "-3", "x", "1.5", ""])
def test_counts_are_positive_integers(capsys, value):
    err = fails(capsys, "demo", f"--k={value}", code=2)
    assert f"argument --k: expected an integer >= 1, got {value!r}" in err


def test_exclusive_options(capsys):
    assert "not allowed with" in fails(capsys, "demo", "--steps", "3", "--epochs", "2", code=2)


def test_unexpected_errors_and_interrupts(capsys, monkeypatch):
    def command(error):
        def run(args):
            raise error

        monkeypatch.setattr(fastsae.cli.info, "run", run)

    command(KeyError("x"))
    assert "KeyError: 'x' (FASTSAE_DEBUG=1 shows where)" in fails(capsys, "info")
    command(ValueError("two\nlines"))
    assert fails(capsys, "info") == "fastsae: two lines\n"
    command(KeyboardInterrupt())
    assert fails(capsys, "info", code=130) == "fastsae: interrupted\n"
    monkeypatch.setenv("FASTSAE_DEBUG", "1")
    command(KeyError("x"))
    with pytest.raises(KeyError):
        main(["info"])


def test_info_without_the_compiled_parts(capsys, monkeypatch):
    for name in ("_host", "_library"):
        monkeypatch.setitem(sys.modules, f"fastsae.{name}", None)
        monkeypatch.delattr(f"fastsae.{name}", raising=False)
    assert main(["info"]) == 0
    assert "isa           -" in capsys.readouterr().out


def test_imports_are_light():
    code = (
        "import sys, fastsae.cli, fastsae.data, fastsae.eval, fastsae.report.write; "
        "print([m for m in ('transformers', 'matplotlib', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_reader_that_goes_away_is_no_traceback():
    command = f"{sys.executable} -m fastsae.cli info --json | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""
