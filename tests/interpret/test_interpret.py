"""Explanations and scores where the truth is planted: right ones score 1, wrong ones chance."""

from __future__ import annotations

import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from fastsae.analysis import Context
from fastsae.interpret import (
    detection,
    embedding,
    explanation_similarity,
    fuzzing,
    interpret,
    judge_scorers,
    keyword_explainer,
    keyword_judge,
    llm_explainer,
    llm_judge,
    openai_client,
    read_interpretations,
    sample_contexts,
    surprisal,
)
from fastsae.interpret.ask import explanation_in, parsed
from fastsae.interpret.negatives import Silent
from fastsae.interpret.text import active, marked
from fastsae.nn import TopKSAE
from tests.interpret.planted import WIDTH, WORDS, decode, planted


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    sae, store = planted(tmp_path_factory.mktemp("store"))
    return sae, store, sample_contexts(sae, store, width=WIDTH, top=8, drawn=64)


def oracle(messages):
    """Answer as somebody would who reads well; told by the words of the questions alone."""
    system, user = (m["content"] for m in messages)
    texts = re.split(r"Text \d+: ", user)[1:]
    if "EXPLANATION" in system:
        best = [re.findall(r"' (w\d\d)' \d+", text)[0] for text in texts]
        return f"They share a word.\nEXPLANATION: the word {max(set(best), key=best.count)}"
    word = re.search(r"active on: the word (w\d\d)", system).group(1)
    if "marked tokens are those" in system:
        texts = [" ".join(re.findall(r"<<(.*?)>>", text)) for text in texts]
    return str([int(word in text) for text in texts])


@pytest.mark.parametrize("negatives", ["random", "neighbors"])
@pytest.mark.parametrize("who", ["oracle", "keywords"])
def test_planted_meanings_score_one_and_shuffled_ones_chance(made, who, negatives):
    sae, store, sample = made
    explain, judge = keyword_explainer, keyword_judge
    if who == "oracle":
        explain, judge = llm_explainer(oracle), llm_judge(oracle)
    scorers = judge_scorers(judge)
    found = interpret(sae, store, sample, decode, explain, scorers, negatives=negatives)
    assert [x.latent for x in found] == list(range(WORDS))
    for x in found:
        assert f"w{x.latent:02}" in x.explanation
        for score in x.scores.values():
            assert score.value == 1
            assert 24 <= score.positives <= score.negatives == 30  # the top ones are not for it
            assert not score.unanswered
    shuffled = []
    for x in found:
        other = found[(x.latent + 7) % WORDS].explanation
        given = interpret(
            sae, store, sample, decode, lambda *_, other=other: other, scorers,
            latents=[x.latent], negatives=negatives,
        )  # fmt: skip
        shuffled.append([score.value for score in given[0].scores.values()])
    means = torch.tensor(shuffled).mean(0)
    # Of 60 windows a verdict: the mean over 24 latents is within 0.05 of what it is expected to be.
    assert means[0] == pytest.approx(0.5, abs=0.05)
    assert means[1] == pytest.approx(0.5, abs=0.05)


def test_windows_to_explain_and_windows_to_score_are_others(made):
    sample = made[2]
    for latent in range(WORDS):
        shown, held = ([tuple(c.token_ids) for c in part] for part in sample.split(latent))
        assert len(held) >= 24
        assert len(shown) >= 32
        assert not set(shown) & set(held)
        assert set(shown) | set(held) == {
            tuple(c.token_ids) for c in sample.drawn(latent) + sample.top(latent)
        }


def test_silent_windows_are_silent(made):
    sae, store, sample = made
    silent = Silent(sae, store, sample)
    for latent in (0, 5):
        for found in (silent.random(latent, 20), silent.neighbors(latent, 20)):
            assert len(found) == 20
            assert all(latent not in context.token_ids for context in found)
    with torch.no_grad():
        other = TopKSAE(WORDS, WORDS, k=1)
    with pytest.raises(ValueError, match="expected a sample of this sae, got another one's"):
        Silent(other, store, sample)


def test_neighbors_are_of_the_nearest_decoder_rows(made, tmp_path):
    _, store, _ = made
    near = TopKSAE(WORDS, WORDS, k=1)
    with torch.no_grad():
        near.W_enc, near.W_dec = torch.eye(WORDS), torch.eye(WORDS)
        near.W_dec[3] = torch.eye(WORDS)[0] + 0.5 * torch.eye(WORDS)[3]  # latent 3 is nearest to 0
    sample = sample_contexts(near, store, width=WIDTH, top=8, drawn=64)
    first = Silent(near, store, sample).neighbors(0, 1)[0]
    assert 3 in first.token_ids
    assert 0 not in first.token_ids


def test_scores_of_what_is_half_right():
    yes = [Context([i, 50], [1.0, 0.0], 0) for i in range(10)]
    no = [Context([20 + i, 50], [0.0, 0.0], 0) for i in range(10)]

    def judge(task, explanation, texts):
        # Right on 7 of 10 positives and 8 of 10 negatives; no answer for one of each.
        answers = {**{i: i < 7 for i in range(9)}, **{20 + i: i >= 8 for i in range(10)}}
        del answers[20]
        return [answers.get(int(text.split()[0])) for text in texts]

    plain = detection(judge, "", yes, no, lambda ids: " ".join(map(str, ids)))
    assert (plain.positives, plain.negatives, plain.unanswered) == (9, 9, 2)
    assert plain.value == pytest.approx((7 / 9 + 7 / 9) / 2)
    none = detection(lambda t, e, texts: [None] * len(texts), "", yes, no, str)
    assert math.isnan(none.value)
    assert none.unanswered == 20
    with pytest.raises(ValueError, match="expected 20 verdicts of the judge, got 3"):
        detection(lambda *_: [True] * 3, "", yes, no, str)


def test_fuzzing_marks_as_many_tokens_in_negatives():
    seen = []

    def judge(task, explanation, texts):
        seen.extend(texts)
        return [True] * len(texts)

    yes = [Context([1, 2, 3, 4], [1.0, 0.9, 0.2, 0.0], 0)] * 4  # 0.2 is below 0.3 of the peak
    no = [Context([5, 6, 7, 8], [0.0] * 4, 0)] * 4
    score = fuzzing(judge, "", yes, no, lambda ids: "".join(f"t{i}" for i in ids))
    assert score.value == 0.5
    assert seen.count("<<t1t2>>t3t4") == 4
    others = [text for text in seen if "t5" in text]
    assert len(others) == 4
    for text in others:
        assert sum(part.count("t") for part in re.findall(r"<<(.*?)>>", text)) == 2


def test_tokens_that_are_marked():
    context = Context([1, 2, 3], [0.0, 2.0, 0.5], 1)
    assert active(context) == [False, True, False]
    assert marked(context, decode, [True, False, True]) == "<< w01>> w02<< w03>>"


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("I think:\n[1,0,1].", [True, False, True]),
        ("Text [1] fits: [0, 0, 1]", [False, False, True]),
        ("[1, 0]", [None] * 3),
        ("yes", [None] * 3),
        ("[1, 2, 0]", [None] * 3),
    ],
)
def test_verdicts_in_an_answer(answer, verdicts):
    assert parsed(answer, 3) == verdicts


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("EXPLANATION: cats", "cats"),
        ("They are...\n\n**Explanation:** the word cat ", "the word cat"),
        ("EXPLANATION: a\nno:\nExplanation: b: c", "b: c"),
        ("Just cats.", "Just cats."),
        ("", ""),
    ],
)
def test_the_explanation_in_an_answer(answer, text):
    assert explanation_in(answer) == text


def test_a_run_that_was_cut_goes_on_and_another_one_is_refused(made, tmp_path):
    sae, store, sample = made
    out = tmp_path / "explanations.jsonl"
    asked = []

    def explain(contexts, decode):
        asked.append(1)
        if len(asked) == 4:
            raise ConnectionError("gone")
        return keyword_explainer(contexts, decode)

    def run(explain, **kwargs):
        return interpret(
            sae, store, sample, decode, explain, judge_scorers(keyword_judge), latents=range(6),
            out=out, **kwargs,
        )  # fmt: skip

    with pytest.raises(ConnectionError):
        run(explain)
    data = out.read_bytes()
    out.write_bytes(data + b'{"latent": 3, "expl')  # a process that died while it wrote
    assert [x.latent for x in read_interpretations(out)] == [0, 1, 2]
    found = run(explain)
    assert len(asked) == 4 + 3
    assert out.read_bytes().startswith(data)
    assert read_interpretations(out) == found
    assert run(lambda *_: pytest.fail("asked again")) == found
    lines = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert [line["latent"] for line in lines] == list(range(6))
    assert lines[2]["scores"] == {"detection": 1.0, "fuzzing": 1.0}
    with pytest.raises(ValueError, match=r"got others; choose another file"):
        run(explain, windows=7)
    out.write_text("something else\n")
    with pytest.raises(ValueError, match="to hold explanations, got 'something else'"):
        run(explain)
    assert out.read_text() == "something else\n"


def test_several_workers_find_the_same(made):
    sae, store, sample = made
    one, four = (
        interpret(
            sae, store, sample, decode, keyword_explainer, judge_scorers(keyword_judge), workers=n
        )
        for n in (1, 4)
    )
    assert one == four


def test_latents_that_hardly_fire_have_a_reason(made):
    sae, store, _ = made
    sample = sample_contexts(sae, store, width=WIDTH, top=2, drawn=3)
    (found,) = interpret(sae, store, sample, decode, keyword_explainer, {}, latents=[4])
    assert (found.explanation, found.reason) == ("", "fires in too few windows")
    for wrong in ({"latents": [WORDS]}, {"windows": 0}, {"negatives": "hard"}):
        with pytest.raises(ValueError, match="interpret: expected"):
            interpret(sae, store, sample, decode, keyword_explainer, {}, **wrong)


class Bigrams(torch.nn.Module):
    """A language model that expects again the words it has seen."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids):
        seen = torch.nn.functional.one_hot(input_ids, WORDS + 1).cumsum(1).clamp(max=1).float()
        return type("Out", (), {"logits": 3 * seen * self.scale})


class Words:
    def __call__(self, text, add_special_tokens=True):
        ids = [int(w) for w in re.findall(r"w(\d\d)", text)]
        return {"input_ids": [WORDS, *ids] if add_special_tokens else ids}


def test_surprisal_and_embedding_rank_texts(made):
    sample = made[2]
    yes = sample.split(2)[1]
    no = [c for c in sample.drawn(9) if 2 not in c.token_ids]
    model = Bigrams()
    right = surprisal(model, Words(), "the word w02", yes, no, decode)
    assert right.value == 1
    wrong = surprisal(model, Words(), "the word w05", yes, no, decode)
    assert 0.3 < wrong.value < 0.7

    def embed(texts):
        ids = [Words()(text, add_special_tokens=False)["input_ids"] for text in texts]
        rows = [torch.eye(WORDS)[i].sum(0) for i in ids]
        return torch.stack(rows)

    assert embedding(embed, "the word w02", yes, no, decode).value == 1
    with pytest.raises(ValueError, match=r"expected vectors to be \[\d+, d\], got"):
        embedding(lambda texts: torch.zeros(3, 2), "", yes, no, decode)


def test_explanations_of_a_permuted_sae_match(made):
    sae = made[0]
    order = torch.randperm(WORDS)
    other = TopKSAE(WORDS, WORDS, k=1)
    with torch.no_grad():
        other.W_dec = sae.W_dec.detach()[order].clone()
    words = {i: f"the word w{i:02}" for i in range(WORDS)}
    theirs = {i: f"the word w{int(order[i]):02}" for i in range(WORDS)}

    def embed(texts):
        return torch.stack([torch.eye(WORDS)[int(t[-2:])] for t in texts])

    found = explanation_similarity(sae, words, other, theirs, embed)
    assert found.pairs == [(i, int((order == i).nonzero())) for i in range(WORDS)]
    torch.testing.assert_close(found.similarities, torch.ones(WORDS).double())
    assert found.chance == 0


@pytest.fixture
def server():
    """A server of chat completions whose answers a test chooses; yields its URL and requests."""
    answers, requests = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((self.path, dict(self.headers), json.loads(body)))
            status, data = answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data.encode())

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", answers, requests
    http.shutdown()
    thread.join()
    http.server_close()


def test_a_client_of_a_server(server):
    url, answers, requests = server
    good = json.dumps({"choices": [{"message": {"content": "hello"}}]})
    client = openai_client("some-model", url, api_key="secret", wait=0.0)
    answers += [(200, good)]
    assert client([{"role": "user", "content": "hi"}]) == "hello"
    path, headers, body = requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["model"] == "some-model"
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    answers += [(429, ""), (503, ""), (200, good)]
    assert client([]) == "hello"
    answers += [(401, "who are you")]
    with pytest.raises(RuntimeError, match=r"expected an answer from http.*, got 401") as caught:
        client([])
    assert "secret" not in str(caught.value)
    answers += [(500, "")] * 5
    with pytest.raises(RuntimeError, match="got 500"):
        client([])
    assert not answers
    answers += [(200, '{"choices": []}')]
    with pytest.raises(RuntimeError, match=r"expected choices\[0\]\.message\.content"):
        client([])
    with pytest.raises(ValueError, match=r"expected url to start with http"):
        openai_client("m", "file:///etc/passwd")
