"""The dashboard over HTTP: what it answers, and what it refuses."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fastsae
from fastsae.cli import main, make_parser, serve
from fastsae.data import ActivationStore, harvest
from fastsae.data.shards import Manifest
from fastsae.interpret import (
    ContextSample,
    Score,
    interpret,
    read_interpretations,
    sample_contexts,
)
from fastsae.serve import Dashboard, Explanations, Live, Refused, Words, text_search
from fastsae.serve.server import HEADERS
from fastsae.serve.text_search import TextSearch
from tests.cli.conftest import model_folder, text  # noqa: F401
from tests.interpret.stores import documents, write_store
from tests.models.tiny import DOCUMENTS, CharTokenizer, D, tiny_model
from tests.serve.made import HOSTILE, ROWS, Vocabulary, make_dashboard, make_sae, running


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory) -> Dashboard:
    return make_dashboard(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def server(dashboard):
    with running(dashboard) as server:
        yield server


def request(server, path, method="GET", body=None, **headers):
    """Return status, headers and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, names)
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found


def get(server, path):
    """Return what a path of the API answers."""
    status, headers, data = request(server, path)
    assert (status, headers["Content-Type"]) == (200, "application/json"), data
    return json.loads(data)


def refusal(server, *args, **headers):
    """Return the status and the reason of a refusal, which is one line of JSON."""
    status, got, data = request(server, *args, **headers)
    assert got["Content-Type"] == "application/json"
    value = json.loads(data)
    assert list(value) == ["error"]
    assert "\n" not in value["error"]
    return status, value["error"]


def test_about(server) -> None:
    about = get(server, "/api/about")
    assert about["model"] == "a <b>model"
    assert (about["class"], about["d_sae"], about["site"]) == ("TopKSAE", 50, "resid_post.2")
    assert (about["tokens"], about["silent"], about["explained"]) == (ROWS, 1, 2)
    assert about["scores"] == ["detect", "fuzz"]
    assert (about["text"], about["live"]) == (True, False)


def test_the_list_sorts_and_turns_pages(server) -> None:
    rows = get(server, "/api/latents")["rows"]
    assert [row["latent"] for row in rows] == list(range(50))
    assert rows[7]["rate"] == 40 / ROWS
    assert rows[49] == {
        "latent": 49, "rate": 0.0, "largest": 0.0, "explanation": None, "score": None, "peaks": []
    }  # fmt: skip
    down = get(server, "/api/latents?sort=rate&order=desc")["rows"]
    assert [row["latent"] for row in down] == list(range(50))  # 49 fires least, others are equal
    up = get(server, "/api/latents?sort=rate&order=asc")["rows"]
    assert up[0]["latent"] == 49
    scored = get(server, "/api/latents?sort=score&order=asc&score=fuzz")["rows"]
    assert [(row["latent"], row["score"]) for row in scored[:3]] == [(7, 0.25), (3, 0.5), (0, None)]
    scored = get(server, "/api/latents?sort=score&order=desc&score=fuzz")["rows"]
    assert [row["latent"] for row in scored[:3]] == [3, 7, 0]
    assert get(server, "/api/latents?page=1")["rows"] == []


def test_explanations_are_searched_by_all_words(server) -> None:
    found = get(server, "/api/latents?explanation=THAT%20words")
    assert [row["latent"] for row in found["rows"]] == [7]
    assert found["total"] == 1
    assert found["rows"][0]["score"] == 0.9  # "detect" is the first by name
    assert get(server, "/api/latents?explanation=nowhere")["rows"] == []


def test_a_latent_has_contexts_and_numbers(server, dashboard) -> None:
    found = get(server, "/api/latents/7")
    values = [1 + row // 50 % 7 for row in range(7, ROWS, 50)]
    assert found["count"] == len(values)
    assert found["largest"] == 7.0
    assert found["mean"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert found["scores"] == {"fuzz": 0.25, "detect": 0.9}
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    assert len(edges) == len(counts) + 1
    for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True):
        assert n == sum(low <= v < high for v in values)
    assert sum(counts) == len(values)
    assert [c["acts"][c["peak"]] for c in found["top"]] == [7.0] * 4
    context, made = found["top"][0], dashboard.sample.top(7)[0]
    assert context["tokens"] == Words(Vocabulary()).of(made.token_ids)
    assert len(found["quantiles"]) == 5
    silent = get(server, "/api/latents/49")
    assert (silent["top"], silent["count"], silent["histogram"]["counts"]) == ([], 0, [])


def test_control_characters_of_tokens_are_shown_as_signs(server) -> None:
    tokens = [t for c in get(server, "/api/latents/9")["top"] for t in c["tokens"]]
    assert "a\\u202eb↵c\\x00" in tokens
    assert not any(set(token) & set("\u202e\n\x00") for token in tokens)


def test_nearest_are_by_cosine(server) -> None:
    rows = get(server, "/api/latents/48/nearest")["rows"]
    assert (rows[0]["latent"], rows[0]["cosine"]) == (49, 1.0)  # not their product, which is 2
    assert len(rows) == 12
    assert all(row["cosine"] == 0 and row["latent"] != 48 for row in rows[1:])


def test_a_text_is_found_where_latents_fire_on_it(server, dashboard) -> None:
    found = get(server, "/api/search?text=w7")
    assert found["spellings"] == [["w7"]]
    first = found["rows"][0]
    assert first["latent"] == 7
    on_text, room = 0.0, 4 + 8
    drawn = dashboard.sample.drawn(7)
    for context in [*dashboard.sample.top(7), *drawn]:
        acts = [a for t, a in zip(context.token_ids, context.acts, strict=True) if t == 7]
        on_text += max(acts, default=0.0)
    assert first["strength"] == pytest.approx(on_text / 7 / room, rel=1e-5)
    hits = [c for c in drawn if c.token_ids[c.peak] == 7]
    assert first["share"] == pytest.approx(len(hits) / len(drawn), rel=1e-5)
    assert get(server, "/api/search?text=w999")["rows"] == []
    hostile = get(server, "/api/search?text=%3Cimg%20src%3Dx")
    assert hostile["rows"] == []


def test_what_the_tokenizer_does_not_know_is_not_searched_for() -> None:
    class Unknown(Vocabulary):
        unk_token_id = 0

        def __call__(self, given, add_special_tokens):
            places = {word: i for i, word in enumerate(self.words)}
            return {"input_ids": [places.get(word, 0) for word in given.split()]}

    assert Words(Unknown()).spellings("W7") == [[7]]  # "w7", in small letters
    assert Words(Unknown()).spellings("river") == []


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Rows of four tokens at random, and the codes and contexts of 300 latents."""
    torch.manual_seed(3)
    docs, places = documents(600, [37, 5, 60], 25)
    folder = tmp_path_factory.mktemp("drawn")
    store = write_store(folder, torch.randn(600, 8), torch.randint(4, (600,)), docs, places)
    sae = fastsae.TopKSAE(8, 300, k=4).eval()
    sample = sample_contexts(sae, store, width=8, top=3, drawn=5)
    return sample, sae.encode(store.rows()), sae, store


def test_search_agrees_with_a_look_at_every_window(drawn) -> None:
    """Two spellings, several tokens in a window, at the edges."""
    sample, code, *_ = drawn
    spellings = [[1, 2], [3]]
    found = TextSearch(sample).find(spellings)
    got = dict(zip(found.latents.tolist(), found.strength.tolist(), strict=True))
    expected, sizes = {}, code.amax(0).tolist()
    for latent in sample.counts.nonzero().flatten().tolist():
        total = 0.0
        for context in [*sample.top(latent), *sample.drawn(latent)]:
            ids, best = context.token_ids, 0.0
            for i in range(len(ids)):
                for spelling in spellings:
                    if ids[i : i + len(spelling)] == spelling:
                        best = max(best, *context.acts[i : i + len(spelling)])
            total += best
        if total:
            expected[latent] = total / sizes[latent] / 8
    assert len(expected) > 100
    assert got == pytest.approx(expected, rel=1e-6)
    order = found.strength.tolist()
    assert order == sorted(order, reverse=True)
    assert found.every == 1


def test_common_texts_are_searched_in_some_of_their_windows(drawn, monkeypatch) -> None:
    sample, *_ = drawn
    whole = TextSearch(sample).find([[1]])
    monkeypatch.setattr(text_search, "MOST", 900)
    part = TextSearch(sample).find([[1]])
    assert part.every > 2
    assert set(part.latents.tolist()) < set(whole.latents.tolist())
    # Estimates: their sum is about that of the whole.
    assert float(part.strength.sum()) == pytest.approx(float(whole.strength.sum()), rel=0.3)


def test_every_answer_forbids_what_it_does_not_need(server) -> None:
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src")
    assert "unsafe" not in policy
    for path in ("/", "/page.js", "/page.css", "/api/about", "/api/latents/x", "/nothing"):
        _, headers, data = request(server, path)
        for name, value in HEADERS.items():
            assert headers[name] == value, (path, name)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers
        assert int(headers["Content-Length"]) == len(data)


def test_the_page_is_three_files_that_load_nothing_else() -> None:
    folder = Path(sys.modules["fastsae.serve"].__file__).parent
    files = {
        p.name: p.read_text() for p in folder.iterdir() if p.suffix in (".html", ".js", ".css")
    }
    assert sorted(files) == ["page.css", "page.html", "page.js"]
    for content in files.values():
        assert not any(word in content for word in ("http:", "https:", "@import", "url("))
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
    ):
        assert sink not in files["page.js"]
    assert "style=" not in files["page.html"]
    assert "onclick" not in files["page.html"]


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/nothing", 404, "a path of the dashboard"),
        ("/../../etc/passwd", 404, "a path of the dashboard"),
        ("/page.html", 404, "a path of the dashboard"),
        ("/api/latents/50", 404, "a latent in 0..49, got 50"),
        ("/api/latents/50/nearest", 404, "a latent in 0..49, got 50"),
        ("/api/latents/-1", 404, "a path of the dashboard"),
        ("/api/latents/9999999999999999999999", 404, "a path of the dashboard"),
        ("/api/latents/%D9%A1", 404, "a path of the dashboard"),
        ("/api/latents?sort=name", 400, "sort to be index, rate, largest, mean or score"),
        ("/api/latents?order=up", 400, "order to be asc or desc"),
        ("/api/latents?page=-1", 400, "page to be a number, got '-1'"),
        ("/api/latents?page=1e3", 400, "page to be a number"),
        ("/api/latents?page=" + "9" * 5000, 400, "page to be a number"),
        ("/api/latents?page=1&page=2", 400, "page once, got it twice"),
        ("/api/latents?score=none", 400, "score to be one of detect, fuzz, got 'none'"),
        ("/api/latents?color=red", 400, "expected parameters sort"),
        ("/api/latents?sort", 400, "expected name=value"),
        ("/api/latents?explanation=%ff", 400, "expected name=value"),
        ("/api/about?x=1", 400, "expected parameters none"),
        ("/api/search", 400, "some text to search for, got none"),
        ("/api/search?text=" + "a" * 201, 400, "at most 200 characters, got 201"),
        ("/api/latents/7/logits?n=1", 400, "expected parameters none"),
        ("/api/live", 405, "expected POST for /api/live, got GET"),
    ],
)
def test_bad_requests_are_told_why(server, path, status, reason) -> None:
    got, error = refusal(server, path)
    assert got == status
    assert reason in error


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE"])
def test_other_methods_are_refused(server, method) -> None:
    status, headers, data = request(server, "/api/latents", method)
    assert status == (405 if method == "POST" else 501)
    assert headers["Content-Type"] == "application/json"
    assert data == b"" if method == "HEAD" else "error" in json.loads(data)
    assert headers["Connection"] == "close"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:80", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1", 200),
        ("[::1]:9000", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("evil.example:127.0.0.1", 403),
        ("localhost@evil.example", 403),
        ("192.168.1.2", 403),
        ("", 403),
    ],
)
def test_only_requests_for_this_host_are_answered(server, host, status) -> None:
    for path in ("/", "/api/about"):
        got, headers, _ = request(server, path, Host=host)
        assert got == status
        assert headers["Content-Security-Policy"]


def test_the_host_that_was_given_is_answered_too(dashboard) -> None:
    with running(dashboard, "localhost") as server:
        assert request(server, "/", Host="localhost")[0] == 200
    with running(dashboard, "0.0.0.0") as server:
        assert request(server, "/", Host="0.0.0.0:1")[0] == 200
        assert request(server, "/", Host="evil.example")[0] == 403


def test_requests_of_other_sites_are_refused(server) -> None:
    for site in ("cross-site", "same-site"):
        assert refusal(server, "/api/about", Sec_Fetch_Site=site)[0] == 403
        assert request(server, "/", Sec_Fetch_Site=site)[0] == 200  # a link to the page
    assert request(server, "/api/about", Sec_Fetch_Site="same-origin")[0] == 200


def raw(server, data: bytes) -> bytes:
    """Return all that comes back for some bytes."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found


def test_what_is_no_request_gets_one_line_too(server) -> None:
    for data in (
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    ):
        answer = raw(server, data)
        assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5", b"{")), data[:40]
        assert json.loads(answer[answer.index(b"{") :])["error"]
        assert b"<" not in answer
    assert get(server, "/api/about")["d_sae"] == 50


def test_a_body_that_is_not_read_is_no_second_request(server) -> None:
    inner = b"GET /api/about HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    answer = raw(server, head % len(inner) + inner)
    assert answer.count(b"HTTP/1.1") == 1
    chunked = b"POST /api/live HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw(server, chunked + inner)
    assert answer.count(b"HTTP/1.1") == 1


def post(server, value, **headers):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return refusal(
        server, "/api/live", "POST", body, **{"Content_Type": "application/json", **headers}
    )


def test_what_is_posted_is_looked_at(server) -> None:
    assert post(server, {"text": "a"}) == (
        404, "expected a model to run text through (--model), got none"
    )  # fmt: skip
    assert post(server, {"text": "a"}, Content_Type="text/plain")[0] == 415
    assert post(server, {"text": "a"}, Content_Type="application/x-www-form-urlencoded")[0] == 415
    assert post(server, b"x" * 70_000)[0] == 413
    for wrong in (b"", b"{", b"[]", b"[" * 60_000, b"\xff", {"text": 1}, {"latent": 1}):
        assert post(server, wrong)[0] == 400
    for latent in ("1", 1.5, True, [1], {}):
        assert post(server, {"text": "a", "latent": latent})[0] == 400
    assert post(server, {"text": "a", "n": 1})[0] == 400
    assert post(server, b'{"text": "\\ud800"}')[0] == 400


def test_many_ask_at_once(server) -> None:
    paths = [f"/api/latents/{i % 50}" for i in range(120)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda path: get(server, path)["latent"], paths))
    assert found == [i % 50 for i in range(120)]


def test_a_failure_inside_is_one_line(dashboard, capsys) -> None:
    broken = Dashboard(dashboard.sae, dashboard.sample, dashboard.words, dashboard.explanations)
    broken.about = lambda: 1 / 0  # type: ignore[method-assign]
    with running(broken) as server:
        assert refusal(server, "/api/about") == (500, "ZeroDivisionError: division by zero")
    assert "Traceback" in capsys.readouterr().err


def test_explanations_of_interpret_are_read(tmp_path, drawn) -> None:
    sample, _, sae, store = drawn
    path = tmp_path / "explanations.jsonl"
    score = Score(0.75, 1, 1)
    interpret(
        sae, store, sample, str, lambda contexts, decode: f"{len(contexts)} windows",
        {"made": lambda *_: score}, latents=range(300), out=path,
    )  # fmt: skip
    found = Explanations(path, 300).current()
    expected = {i.latent: i for i in read_interpretations(path) if i.explanation}
    assert 0 < len(expected) < 300
    assert {i: e.text for i, e in found.items()} == {i: e.explanation for i, e in expected.items()}
    assert all(e.scores == {"made": 0.75} for e in found.values())


def test_explanations_are_read_again_when_they_change(tmp_path) -> None:
    path = tmp_path / "explanations.jsonl"
    explanations = Explanations(path, 10)
    assert explanations.current() == {}
    path.write_text('{"latent": 1, "explanation": "a"}\n{"latent": 1, "explanation": "b"}\n')
    assert explanations.current()[1].text == "b"
    path.write_text('{"latent": 1, "explanation": "a\\u202eb"}\n')
    assert explanations.current()[1].text == "a\\u202eb"
    path.write_text('{"latent": 1, "explanation": "a", "scores": {"x": NaN, "y": 1}}\n')
    assert explanations.current()[1].scores == {"y": 1.0}
    for line in ("{", "[]", '{"latent": "1", "explanation": "a"}', '{"latent": true}', "null"):
        path.write_text(f'{{"latent": 1, "explanation": "a"}}\n{line}\n')
        with pytest.raises(ValueError, match=r"expected line 2 of .* to be a JSON object"):
            explanations.current()
    path.write_text('{"latent": 1, "explanation": "a"}\n{"latent": 2, "expl')
    assert list(explanations.current()) == [1]
    path.write_text('{"latent": 10, "explanation": "a"}\n')
    with pytest.raises(ValueError, match=r"latents in 0\.\.9 .* got 10 in line 1"):
        explanations.current()


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    """A tiny model, a store of it in which outliers are left out, and an SAE."""
    folder, model = tmp_path_factory.mktemp("acts"), tiny_model()
    harvest(
        model, CharTokenizer(), DOCUMENTS, "resid_post.1", folder, context=16, dtype="float32",
        max_norm_ratio=1.1, val_fraction=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    sae = fastsae.TopKSAE(D, 64, k=4).eval()
    return model, ActivationStore(folder), sae


def test_a_typed_text_has_the_code_of_the_harvest(harvested) -> None:
    model, store, sae = harvested
    live = Live(lambda: (model, CharTokenizer()), sae, store.sites, store.manifest)
    code = live.encode(DOCUMENTS[0])
    assert len(code.token_ids) == len(DOCUMENTS[0])
    mine = store.doc_ids() == 0
    acts = sae.encode_sparse(store.rows()[mine]).to_dense()
    assert 0 < len(acts) < len(code.token_ids)  # some are outliers
    assert [t for t, kept in zip(code.token_ids, code.encoded, strict=True) if kept] == (
        store.token_ids()[mine].tolist()
    )
    for latent in range(64):
        got = torch.tensor(code.of(latent))
        torch.testing.assert_close(got[torch.tensor(code.encoded)], acts[:, latent])
        assert not got[~torch.tensor(code.encoded)].any()
    assert live.note is None


def test_a_text_that_is_run_shows_the_strongest(harvested) -> None:
    model, store, sae = harvested
    sample = sample_contexts(sae, store, width=8, top=2, drawn=2)
    live = Live(lambda: (model, CharTokenizer()), sae, store.sites, store.manifest)
    explanations = Explanations(store.path / "none.jsonl", 64)
    dashboard = Dashboard(sae, sample, Words(), explanations, live)
    found = dashboard.run("to be or not")
    code = live.encode("to be or not")
    for i, row in enumerate(found["strongest"]):
        acts = {latent: code.of(latent)[i] for latent in range(64) if code.of(latent)[i]}
        assert [e["latent"] for e in row] == sorted(acts, key=lambda j: -acts[j])
    best = max(range(64), key=lambda j: max(code.of(j)))
    assert found["latent"] == found["overall"][0]["latent"] == best
    assert found["acts"] == code.of(best)
    assert dashboard.run("to be or not", 5)["acts"] == code.of(5)
    for typed, wrong in (("", "got 0"), ("a" * 1025, "got 1025")):
        with pytest.raises(Refused, match=f"1 to 1024 tokens, {wrong}") as error:
            dashboard.run(typed)
        assert error.value.status == 400
    with pytest.raises(Refused, match=r"a latent in 0\.\.63, got 64"):
        dashboard.run("a", 64)
    early = Live(lambda: (model, CharTokenizer()), sae, ["resid_post.0"], store.manifest)
    assert "why" in Dashboard(sae, sample, Words(), explanations, early).logits(0)


def test_another_model_is_noticed(harvested) -> None:
    _, store, sae = harvested
    live = Live(lambda: (tiny_model("gpt2"), CharTokenizer()), sae, store.sites, store.manifest)
    live.encode("a")
    assert "not those of the harvest" in (live.note or "")


def test_a_model_that_cannot_be_loaded_is_told(dashboard) -> None:
    def fails() -> None:
        raise RuntimeError("no such\nmodel")

    live = Live(fails, make_sae(), ["resid_post.2"], Manifest("m", "float32", {"resid_post.2": 50}))
    told = Dashboard(make_sae(), dashboard.sample, dashboard.words, dashboard.explanations, live)
    with running(told) as server:
        assert post(server, {"text": "a"}) == (500, "RuntimeError: no such model")
        assert get(server, "/api/latents/1")["latent"] == 1


def test_logits_are_of_the_unembedding(harvested) -> None:
    model, _, sae = harvested
    manifest = Manifest("m", "float32", {"resid_post.2": D})
    live = Live(lambda: (model, CharTokenizer()), sae, ["resid_post.2"], manifest)
    raised, lowered = live.logits(sae.W_dec[3:4].detach(), 5)
    direction = sae.W_dec[3].detach()
    scaled = direction / direction.square().mean().add(1e-6).sqrt() * model.model.norm.weight
    logits = model.lm_head.weight @ scaled
    assert raised[0] == logits.topk(5).indices.tolist()
    assert lowered[0] == (-logits).topk(5).indices.tolist()


def test_the_command(tmp_path, model_folder, text, capsys) -> None:  # noqa: F811
    """From a harvest to an answer; contexts are sampled once, and refused for another SAE."""
    acts, folder = tmp_path / "acts", tmp_path / "sae"
    words = ["--text", text, "--site", "resid_post.1", "--out", str(acts), "--context", "32"]
    assert main(["harvest", "--model", model_folder, *words]) == 0
    fastsae.save(fastsae.TopKSAE(D, 64, k=4), folder)
    capsys.readouterr()
    command = ["serve", str(folder), "--activations", str(acts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "fastsae.cli", *command, "--model", model_folder, "--json"]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        url = json.loads("".join(process.stdout.readline() for _ in range(3)))["url"]
        port = int(url.rstrip("/").rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps({"text": "the fox"})
        connection.request("POST", "/api/live", body, {"Content-Type": "application/json"})
        found = json.loads(connection.getresponse().read())
        connection.close()
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 0
    assert found["tokens"] == list("the fox")
    assert found["note"] is None
    assert [line.split()[0] for line in errors.splitlines()] == ["sampling", "stopped"]
    sample = ContextSample.open(folder / "contexts.safetensors")
    assert sample.d_sae == 64
    sae = fastsae.load(folder)  # the file beside it does not matter
    args = make_parser().parse_args(command)
    again = serve._contexts(args, folder, sae, ActivationStore(acts))
    assert torch.equal(again.counts, sample.counts)
    assert capsys.readouterr().err == ""
    fastsae.save(fastsae.TopKSAE(D, 64, k=5), folder)
    assert main(command) == 1
    assert (
        "of this SAE, store and --tokens, got another sae; --overwrite" in capsys.readouterr().err
    )
    for wrong, why in (
        (["serve", str(tmp_path / "nothing")], "expected a folder"),
        (["serve", str(folder)], "or --activations STORE"),
        ([*command, "--port", "70000"], "expected a port in 0..65535"),
        ([*command, "--overwrite", "--host", "256.1.1.1"], "Name or service not known"),
    ):
        assert main(wrong) != 0
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("fastsae: ")
        assert why in error


def test_hostile_tokens_are_in_the_store(dashboard) -> None:
    """What `test_page` looks for is there."""
    shown = {t for i in HOSTILE for c in dashboard.latent(i)["top"] for t in c["tokens"]}
    assert all(Words(Vocabulary())(i) in shown for i in HOSTILE)
