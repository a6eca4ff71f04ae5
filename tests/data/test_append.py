"""Rows added to a store: the old one stays whole until all of them are there."""

from __future__ import annotations

import json
import os

import pytest
import torch

from fastsae import cli, verify
from fastsae.data import ActivationStore, harvest
from tests.data.test_harvest import content
from tests.models.tiny import DOCUMENTS, CharTokenizer, tiny_model

SITE = "resid_post.1"
SMALL = {"context": 20, "batch_size": 1, "shard_rows": 30, "val_fraction": 0.4, "dtype": "float32"}
MORE = ["more of the same. " * 9, "", "and the last one, which is short"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def call(model, out, texts, **changed):
    return harvest(model, CharTokenizer(), texts, out=out, **{"sites": SITE, **SMALL, **changed})


def rows_of(folder):
    """Rows, documents and tokens of both splits."""
    stores = [ActivationStore(folder, split=split) for split in ("train", "val")]
    return [t for s in stores for t in (s.rows(), s.doc_ids(), s.positions(), s.token_ids())]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_rows_are_those_of_one_harvest_of_all_documents(model, tmp_path, dtype):
    whole = call(model, tmp_path / "whole", [*DOCUMENTS, *MORE], dtype=dtype)
    call(model, tmp_path / "parts", DOCUMENTS, dtype=dtype)
    added = call(model, tmp_path / "parts", MORE, dtype=dtype, append=True)
    for a, b in zip(rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts"), strict=True):
        assert torch.equal(a, b)
    assert added.documents == whole.documents == {"train": 4, "val": 3}
    assert added.dropped == whole.dropped
    assert verify(tmp_path / "parts").ok
    assert not list((tmp_path / "parts").glob("*partial*"))


def test_several_additions_and_other_free_settings(model, tmp_path):
    call(model, tmp_path / "whole", [*DOCUMENTS, *MORE, *DOCUMENTS[:2]])
    call(model, tmp_path / "parts", DOCUMENTS)
    call(model, tmp_path / "parts", MORE, append=True, batch_size=2, shard_rows=50)
    call(model, tmp_path / "parts", DOCUMENTS[:2], append=True, max_tokens=1000)
    for a, b in zip(rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # batches of two, in one part
    parts = ActivationStore(tmp_path / "parts").manifest.parts
    assert [part["rows"] for part in parts] == [
        sum(map(len, texts)) for texts in (DOCUMENTS, MORE, DOCUMENTS[:2])
    ]


def test_the_limit_of_norms_is_the_old_one(model, tmp_path):
    first = call(model, tmp_path, DOCUMENTS, max_norm_ratio=1.05)
    after = call(model, tmp_path, ["zzz " * 50], max_norm_ratio=1.05, append=True)
    assert after.max_norm == first.max_norm
    for split in ("train", "val"):
        norms = ActivationStore(tmp_path, split=split).rows().norm(dim=1)
        assert float(norms.max()) <= first.max_norm[SITE] * (1 + 1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"context": 30}, "expected context = 20 as in the harvest in .* to append to it, got 30"),
        ({"dtype": "float16"}, "expected dtype = 'float32' as in the harvest"),
        ({"sites": "resid_post.0"}, r"expected sites = \['resid_post.1'\] as in the harvest"),
        ({"drop_prefix": 2}, "expected drop_prefix = 1 as in the harvest"),
        ({"max_norm_ratio": 3.0}, "expected max_norm_ratio = None as in the harvest"),
        ({"skip_token_ids": [5]}, "expected skip_token_ids = None as in the harvest"),
        ({"val_fraction": 0.1}, "expected val_fraction = 0.4 as in the harvest"),
        ({"model": tiny_model("gpt2")}, "expected model = 'LlamaForCausalLM' as in the harvest"),
    ],
)
def test_another_kind_of_rows_is_refused(model, tmp_path, changed, message):
    call(model, tmp_path, DOCUMENTS)
    before = content(tmp_path)
    arguments = {"model": model, **changed}
    with pytest.raises(ValueError, match=message) as caught:
        call(out=tmp_path, texts=MORE, append=True, **arguments)
    assert "\n" not in str(caught.value)
    assert content(tmp_path) == before


def test_other_weights_are_refused(model, tmp_path):
    call(model, tmp_path, DOCUMENTS)
    other = tiny_model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight += 1e-3
    with pytest.raises(ValueError, match=r"expected weights = .* as in the harvest"):
        call(other, tmp_path, MORE, append=True)


def test_there_must_be_a_complete_harvest(model, tmp_path):
    with pytest.raises(ValueError, match=r"expected a complete harvest in .* to append to"):
        call(model, tmp_path, MORE, append=True)

    def texts():
        yield from DOCUMENTS[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(model, tmp_path, texts())
    with pytest.raises(ValueError, match=r"expected a complete harvest in .* to append to"):
        call(model, tmp_path, MORE, append=True)


def test_the_same_call_twice_adds_nothing(model, tmp_path):
    call(model, tmp_path, DOCUMENTS)
    call(model, tmp_path, MORE, append=True)
    before = content(tmp_path)
    for texts in (DOCUMENTS, MORE):
        with pytest.raises(ValueError, match="got those of an earlier call; nothing was appended"):
            call(model, tmp_path, texts, append=True)
        assert content(tmp_path) == before


class Killed(Exception):
    """Ends a harvest at an operation on files, without its clean-up."""


@pytest.mark.parametrize("at", [0, 1, 2, 5, 9, 14, 20, 33, 47, 58, 66, 70, 72, 73, 74, 75])
def test_a_crash_leaves_the_old_store_and_the_same_call_goes_on(model, tmp_path, monkeypatch, at):
    call(model, tmp_path / "whole", DOCUMENTS)
    call(model, tmp_path / "whole", MORE, append=True)
    out = tmp_path / "cut"
    call(model, out, DOCUMENTS)
    old = rows_of(out)
    files = content(out)
    count = 0  # of 75

    def counted(function):
        def replacement(*args, **kwargs):
            nonlocal count
            count += 1
            if count > at:
                raise Killed
            return function(*args, **kwargs)

        return replacement

    for name in ("replace", "fsync"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    done = False
    try:
        call(model, out, MORE, append=True)
        done = True
    except Killed:
        pass
    monkeypatch.undo()
    renamed = done or content(out)["manifest.json"] != files["manifest.json"]
    if not renamed:
        assert {name: content(out)[name] for name in files} == files
        assert all(torch.equal(a, b) for a, b in zip(rows_of(out), old, strict=True))
        call(model, out, MORE, append=True)
    else:  # the new manifest is there, so the addition is done
        with pytest.raises(ValueError, match="nothing was appended"):
            call(model, out, MORE, append=True)
    assert content(out) == content(tmp_path / "whole")
    assert verify(out).ok


def test_an_interrupted_addition_continues_or_begins_anew(model, tmp_path):
    def texts():
        yield MORE[0]
        raise KeyboardInterrupt

    call(model, tmp_path / "whole", DOCUMENTS)
    call(model, tmp_path / "whole", MORE, append=True)
    out = tmp_path / "cut"
    call(model, out, DOCUMENTS)
    old = rows_of(out)
    with pytest.raises(KeyboardInterrupt):
        call(model, out, texts(), append=True)
    assert (out / "manifest.partial.json").exists()
    assert all(torch.equal(a, b) for a, b in zip(rows_of(out), old, strict=True))
    with pytest.raises(ValueError, match="expected append=True as in the interrupted harvest"):
        call(model, out, MORE)
    with pytest.raises(ValueError, match=r"got others; append=True, overwrite=True .* addition"):
        call(model, out, ["quite another text " * 9], append=True)
    call(model, out, MORE, append=True)
    assert content(out) == content(tmp_path / "whole")

    other = tmp_path / "anew"
    call(model, other, DOCUMENTS)
    with pytest.raises(KeyboardInterrupt):
        call(model, other, texts(), append=True)
    call(model, other, MORE[2:], append=True, overwrite=True)
    assert len(ActivationStore(other)) + len(ActivationStore(other, split="val")) == sum(
        map(len, [*DOCUMENTS, MORE[2]])
    )
    assert verify(other).ok


def test_the_command_appends_and_rounds(tmp_path, monkeypatch, capsys):
    loaded = (tiny_model(), CharTokenizer())
    monkeypatch.setattr("fastsae.models.load.load_model", lambda name: loaded)
    out = tmp_path / "acts"
    counts = []
    for number, texts in enumerate((DOCUMENTS, [MORE[0], MORE[2]])):
        files = []
        for i, text in enumerate(texts):
            files.append(str(tmp_path / f"{number}-{i}.txt"))
            (tmp_path / files[-1]).write_text(text)
        command = ["harvest", "--model", "tiny", "--site", SITE, "--out", str(out), "--context"]
        command += ["32", "--dtype", "int8", "--max-norm-ratio", "0", "--text", *files, "--json"]
        assert cli.main(command + ["--append"] * number) == 0
        result = json.loads(capsys.readouterr().out)
        counts.append(result["train"] + result["val"])
    assert counts == [sum(map(len, DOCUMENTS)), sum(map(len, [*DOCUMENTS, MORE[0], MORE[2]]))]
    assert ActivationStore(out).manifest.dtype == "int8"
    assert cli.main([*command, "--append", "--context", "64"]) != 0
    assert "expected context = 32 as in the harvest" in capsys.readouterr().err
