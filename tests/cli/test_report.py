"""`fastsae report`: a page of what `fastsae eval` prints, and of latents."""

from __future__ import annotations

import json

from fastsae.cli import main


def test_a_page_of_a_trained_sae(model_folder, text, tmp_path, capsys):
    acts, sae, page = (str(tmp_path / name) for name in ("acts", "sae", "page.html"))
    harvest = ["harvest", "--model", model_folder, "--text", text, text, text, "--out", acts]
    harvest += ["--site", "resid_post.1", "--val-fraction", "0.34", "--context", "64"]
    assert main(harvest) == 0
    assert main(["train", acts, "--out", sae, "--k", "4", "--batch-size", "256"]) == 0
    capsys.readouterr()
    spliced = ["--model", model_folder, "--text", text]
    assert main(["eval", sae, acts, *spliced, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert main(["report", sae, acts, *spliced, "--out", page, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("report") == page
    assert found == expected
    html = (tmp_path / "page.html").read_text()
    assert f"{100 * (1 - expected['fvu']):.1f}%" in html
    assert "training batches" in html  # the curve of the run's metrics.jsonl
    assert "Cross entropy, untouched model" in html
    assert main(["report", sae, acts, "--out", page]) == 0  # the tokenizer alone
    capsys.readouterr()
    assert "Cross entropy, untouched model" not in (tmp_path / "page.html").read_text()


def test_what_cannot_be_reported_is_one_line(model_folder, text, tmp_path, capsys):
    acts, sae = str(tmp_path / "acts"), str(tmp_path / "sae")
    harvest = ["harvest", "--model", model_folder, "--text", text, "--out", acts]
    assert main([*harvest, "--site", "mlp_in.1", "--site", "mlp_out.1", "--context", "64"]) == 0
    argv = ["train", acts, "--out", sae, "--k", "4", "--batch-size", "256"]
    argv += ["--site", "mlp_in.1", "--site", "mlp_out.1", "--arch", "transcoder"]
    assert main(argv) == 0
    capsys.readouterr()
    for argv, message in [
        (["report", sae, acts], "expected an SAE of one site, got one of mlp_in.1+mlp_out.1"),
        (["report", sae, acts, "--text", text], "expected --model together with --text"),
    ]:
        assert main(argv) == 1
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
