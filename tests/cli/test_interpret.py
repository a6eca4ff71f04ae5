"""`fastsae interpret`, from a harvest of a tiny model to explanations."""

from __future__ import annotations

import json

from fastsae.cli import main
from fastsae.interpret import ContextSample, read_interpretations


def test_it_explains_and_goes_on(model_folder, text, tmp_path, capsys):
    acts, sae, out = (str(tmp_path / name) for name in ("acts", "sae", "words.jsonl"))
    harvest = ["harvest", "--model", model_folder, "--text", text, text, text, "--out", acts]
    assert main([*harvest, "--site", "resid_post.1", "--context", "64"]) == 0
    assert main(["train", acts, "--out", sae, "--k", "4", "--batch-size", "256"]) == 0
    capsys.readouterr()
    argv = ["interpret", sae, acts, "--latents", "6", "--out", out, "--windows", "10", "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["latents"] == 6
    assert 0 <= found["detection"] <= 1
    lines = read_interpretations(out)
    assert len(lines) == 6
    assert all(x.explanation.startswith("the tokens ") for x in lines if not x.reason)
    sample = ContextSample.open(tmp_path / "contexts.safetensors", verify=True)
    assert sample.about["drawn"] == 20
    before = (tmp_path / "words.jsonl").read_bytes()
    assert main(argv) == 0
    assert (tmp_path / "words.jsonl").read_bytes() == before
    capsys.readouterr()
    assert main([*argv, "--negatives", "neighbors"]) == 1
    assert "got others; choose another file" in capsys.readouterr().err
    assert main([*argv, "--windows", "30"]) == 1
    assert "to hold 60 drawn windows of this SAE and store, got 20 of them" in (
        capsys.readouterr().err
    )
    assert main(["interpret", sae, acts, "--url", "http://localhost:1/v1"]) == 1
    assert "expected --llm" in capsys.readouterr().err
