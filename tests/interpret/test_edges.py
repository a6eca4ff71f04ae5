"""Latents, texts, tokenizers, answers and files that are not as one expects."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from fastsae.analysis import Context
from fastsae.interpret import (
    fuzzing,
    interpret,
    judge_scorers,
    keyword_explainer,
    keyword_judge,
    read_interpretations,
    sample_contexts,
)
from fastsae.interpret.ask import explanation_in, parsed
from fastsae.interpret.text import marked
from fastsae.nn import NormalizedSAE, TopKSAE, Transcoder
from tests.interpret.planted import WIDTH, WORDS, decode, planted
from tests.interpret.stores import documents, write_store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    sae, store = planted(tmp_path_factory.mktemp("store"))
    return sae, store, sample_contexts(sae, store, width=WIDTH, top=8, drawn=64)


def by_keywords(sae, store, sample, **kwargs):
    scorers = judge_scorers(keyword_judge)
    return interpret(sae, store, sample, decode, keyword_explainer, scorers, **kwargs)


def test_a_latent_that_fires_everywhere_has_no_windows_without_it(tmp_path):
    docs, places = documents(400, [50], 25)
    store = write_store(tmp_path, torch.rand(400, 4) + 1, torch.arange(400), docs, places)
    sae = TopKSAE(4, 4, k=4)
    with torch.no_grad():
        sae.W_enc = torch.eye(4)
    sample = sample_contexts(sae, store, width=WIDTH)
    for negatives in ("random", "neighbors"):
        found = by_keywords(sae, store, sample, negatives=negatives)
        assert {x.reason for x in found} == {"is silent in no window that was looked at"}


@pytest.mark.parametrize("negatives", ["random", "neighbors"])
@pytest.mark.parametrize("kind", ["transcoder", "normalized"])
def test_saes_that_read_rows_in_other_ways(tmp_path, made, kind, negatives):
    plain, store, _ = made
    x, ids = store.rows(), store.token_ids()
    if kind == "transcoder":
        sae = Transcoder(WORDS, 5, WORDS, k=1)
        with torch.no_grad():
            sae.W_enc = torch.eye(WORDS)
        x = torch.cat([x, torch.randn(len(x), 5)], 1)
    else:
        sae = NormalizedSAE(plain, "constant_norm_rescale")
    other = write_store(tmp_path, x, ids, store.doc_ids(), store.positions())
    mine = sample_contexts(sae, other, width=WIDTH, top=8, drawn=64)
    for x in by_keywords(sae, other, mine, negatives=negatives):
        assert f"w{x.latent:02}" in x.explanation
        assert {score.value for score in x.scores.values()} == {1.0}


def test_latents_may_be_a_tensor_and_come_twice(made, tmp_path):
    asked = []

    def explain(contexts, decode):
        asked.append(1)
        return "a thing"

    out = tmp_path / "new" / "words.jsonl"
    found = interpret(
        *made, decode, explain, {}, latents=torch.tensor([5, 2, 5]), out=out, workers=3
    )
    assert [x.latent for x in found] == [5, 2]
    assert len(asked) == 2
    assert read_interpretations(out) == found


def test_an_explainer_that_says_nothing_is_not_scored(made):
    found = interpret(*made, decode, lambda *_: "", judge_scorers(keyword_judge), latents=[1])
    assert (found[0].explanation, found[0].scores) == ("", {})
    assert found[0].reason == "got no explanation"


def test_a_window_holds_no_gap(tmp_path):
    places = torch.tensor([1, 2, 3, 5, 6, 7, 8, 9, 10, 11])  # 4 was not stored
    x = torch.ones(10, 2)
    store = write_store(tmp_path, x, torch.arange(10), torch.zeros(10), places)
    sae = TopKSAE(2, 2, k=2)
    with torch.no_grad():
        sae.W_enc = torch.eye(2)
    sample = sample_contexts(sae, store, width=4)
    assert sample.bounds.tolist() == [0, 3, 7, 10]


SPACED = {1: "\u2581The", 2: "\u2581cat", 3: "s", 4: "\u2581sat"}


def sentencepiece(ids):
    """Decode as Llama 2 does: a text's first space is not shown."""
    return "".join(SPACED[i] for i in ids).replace("\u2581", " ").removeprefix(" ")


BYTES = {1: b"no", 2: b"\xc3", 3: b"\xab", 4: b"!"}


def by_bytes(ids):
    return b"".join(BYTES[i] for i in ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("read", "which", "text"),
    [
        (sentencepiece, [0, 1, 0, 0], "The<< cat>>s sat"),
        (sentencepiece, [1, 0, 0, 1], "<<The>> cats<< sat>>"),
        (sentencepiece, [0, 0, 1, 1], "The cat<<s sat>>"),
        (by_bytes, [0, 1, 1, 0], "no<<\u00eb>>!"),
        (by_bytes, [0, 0, 1, 0], "no<<\u00eb>>!"),
        (by_bytes, [1, 0, 0, 0], "<<no>>\u00eb!"),
        (by_bytes, [0, 1, 0, 0], "no<<\ufffd>>\u00eb!"),
    ],
)
def test_marks_keep_spaces_and_characters(read, which, text):
    context = Context([1, 2, 3, 4], [0.0] * 4, 0)
    assert marked(context, read, [bool(x) for x in which]) == text


def test_texts_with_marks_of_their_own_are_not_judged_by_marks():
    names = {0: " a", 1: " <<", 2: " >>", 3: " b", 4: " <"}
    seen = []

    def judge(task, explanation, texts):
        seen.extend(texts)
        return [True] * len(texts)

    def read(ids):
        return "".join(names[i] for i in ids)

    yes = [Context(ids, [1.0, 0.0], 0) for ids in ([0, 3], [1, 0], [3, 2], [4, 0])]
    no = [Context(ids, [0.0, 0.0], 0) for ids in ([3, 3], [3, 1])]
    score = fuzzing(judge, "", yes, no, read)
    assert (score.positives, score.negatives, score.value) == (2, 1, 0.5)
    assert {"<< a>> b", "<< <>> a"} < set(seen)
    none = fuzzing(judge, "", yes[1:3], no, read)
    assert math.isnan(none.value)


def test_keywords_that_are_nothing_or_end_like_marks_or_are_not_json():
    assert keyword_judge("fuzzing", 'the tokens "</p>"', ["a<<</p>>> b", "<<a>></p>"]) == [
        True,
        False,
    ]
    assert keyword_judge("detection", 'the tokens "", " a"', ["b", "c a"]) == [False, True]
    assert keyword_judge("detection", r'paths such as "C:\x"', ["C:\\x y", "D"]) == [True, False]


def test_thoughts_are_no_answers():
    thinking = "<think>EXPLANATION: dogs? [1, 1]</think>\nEXPLANATION: cats [0, 1]"
    assert explanation_in(thinking) == "cats [0, 1]"
    assert parsed(thinking, 2) == [False, True]
    for cut in ("<think>It may be [1, 1] or", "<think>\n"):
        assert explanation_in(cut) == ""
        assert parsed(cut, 2) == [None, None]
    assert explanation_in("dogs?\n</think>\ncats") == "cats"


def test_two_runs_do_not_write_one_file(made, tmp_path):
    out = tmp_path / "words.jsonl"

    def explain(contexts, decode):
        with pytest.raises(RuntimeError, match=r"expected no other run that writes .*words\.jsonl"):
            by_keywords(*made, latents=[1], out=out)
        return "a thing"

    found = interpret(*made, decode, explain, {}, latents=[0], out=out)
    assert found[0].explanation == "a thing"
    assert [x.latent for x in read_interpretations(out)] == [0]


def test_windows_of_another_width_or_of_less_text_are_another_sample(made, tmp_path):
    sae, store, _ = made
    out = tmp_path / "words.jsonl"
    by_keywords(*made, latents=[0], out=out)
    for other in ({"width": 2 * WIDTH}, {"width": WIDTH, "max_rows": 4000}):
        sample = sample_contexts(sae, store, top=8, drawn=64, **other)
        with pytest.raises(ValueError, match="got others; choose another file"):
            by_keywords(sae, store, sample, latents=[0], out=out)


def test_two_halves_of_a_store_are_two_stores(made):
    sae, store, _ = made
    half, other = store.hold_back(len(store) // 2)
    assert len(half) == len(other)
    with pytest.raises(ValueError, match="expected a sample of this store, got another one's"):
        by_keywords(sae, other, sample_contexts(sae, half, width=WIDTH))


def test_a_first_line_that_was_cut_is_written_anew(made, tmp_path):
    out = tmp_path / "words.jsonl"
    found = by_keywords(*made, latents=[0], out=out)
    data = out.read_bytes()
    for cut in (0, 1, data.index(b"\n")):
        out.write_bytes(data[:cut])
        assert by_keywords(*made, latents=[0], out=out) == found
        assert out.read_bytes() == data
    for other in (b"\xff\xfe\n", b"not ours", data[:20] + b"x"):
        out.write_bytes(other)
        with pytest.raises(ValueError, match=r"interpret: expected .* to hold explanations"):
            by_keywords(*made, latents=[0], out=out)
        assert out.read_bytes() == other


KILLED = """
import os, sys
from pathlib import Path
from fastsae.interpret import interpret, sample_contexts
from tests.interpret.planted import WIDTH, decode, planted
sae, store = planted(Path(sys.argv[1]))
asked = []
def explain(contexts, decode):
    asked.append(1)
    if len(asked) == 3:
        os.kill(os.getpid(), 9)
    return "a thing"
sample = sample_contexts(sae, store, width=WIDTH, top=8, drawn=64)
interpret(sae, store, sample, decode, explain, {}, latents=range(6), out=sys.argv[2])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(made, tmp_path):
    out = tmp_path / "words.jsonl"
    (tmp_path / "store").mkdir()
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "store", out], check=False)
    assert done.returncode == -9
    assert [json.loads(line)["latent"] for line in out.read_text().splitlines()[1:]] == [0, 1]
    found = interpret(*made, decode, lambda *_: "another", {}, latents=range(6), out=out)
    assert [x.explanation for x in found] == ["a thing"] * 2 + ["another"] * 4
