"""Servers that are slow, endless, elsewhere or of another kind, and keys that cannot be sent."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastsae.interpret import clients, openai_client

GOOD = json.dumps({"choices": [{"message": {"content": "na\u00efve \U0001f600 \ud800"}}]}).encode()


@pytest.fixture
def server():
    """A server that does what the first part of a path says; yields its URL and what it was
    told."""
    told = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            told.append((self.path, self.headers.get("Authorization")))
            self.rfile.read(int(self.headers["Content-Length"]))
            what = self.path.split("/")[1]
            self.send_response({"away": 307, "found": 302}.get(what, 200))
            if what in ("away", "found"):
                self.send_header("Location", "/good/chat/completions")
            if what == "short":
                self.send_header("Content-Length", "10000")
            self.end_headers()
            if what == "hangs":
                stop.wait(5)
            elif what == "drips":
                while not stop.wait(0.05):
                    self.wfile.write(b" ")
            elif what == "endless":
                while True:
                    self.wfile.write(b" " * (1 << 16))
            else:
                self.wfile.write({"html": b"<html>\xff"}.get(what, GOOD))

        do_GET = do_POST  # what a followed redirect would be

        def log_message(self, *_):
            pass

        def handle(self):
            with suppress(OSError):  # the client has gone
                super().handle()

    stop = threading.Event()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", told
    stop.set()
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.mark.parametrize(
    ("what", "tries", "problem"),
    [
        ("hangs", 2, "timed out"),
        ("drips", 2, "timed out"),
        ("short", 2, "IncompleteRead"),
        ("html", 1, "expected choices"),
        ("endless", 1, "expected an answer of 1000000 bytes, got more"),
        ("away", 1, "got 307"),
        ("found", 1, "got 302"),
    ],
)
def test_an_answer_that_is_none_ends_in_one_line(server, monkeypatch, what, tries, problem):
    url, told = server
    monkeypatch.setattr(clients, "LARGEST", 1_000_000)
    client = openai_client("m", f"{url}/{what}", api_key="k", timeout=0.4, tries=2, wait=0)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=problem) as caught:
        client([{"role": "user", "content": "hi"}])
    assert time.monotonic() - begin < 4
    assert str(caught.value).startswith("openai_client: expected ")
    assert "\n" not in str(caught.value)
    assert told == [(f"/{what}/chat/completions", "Bearer k")] * tries


def test_a_key_with_a_newline_is_sent_without_it_and_never_told(server, monkeypatch):
    url, told = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    assert openai_client("m", f"{url}/good")([]) == "na\u00efve \U0001f600 \ud800"
    assert told == [("/good/chat/completions", "Bearer secret")]
    for key in ("sec\nret", "secr\u00e9t"):
        with pytest.raises(ValueError, match="api_key to be printable ASCII") as caught:
            openai_client("m", f"{url}/good", api_key=key)
        assert "sec" not in str(caught.value)
    with pytest.raises(ValueError, match="expected tries >= 1, got 0"):
        openai_client("m", url, tries=0)
