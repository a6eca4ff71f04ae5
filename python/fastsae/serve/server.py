"""The dashboard over HTTP, for the browser of whoever started it.

    GET  /, /page.js, /page.css       the page; it loads nothing else
    GET  /api/about                   what this SAE is
    GET  /api/latents                 ?sort= &order= &page= &explanation= &score=
    GET  /api/search                  ?text= &page=
    GET  /api/latents/N               and /nearest, /logits below it
    POST /api/live                    {"text": ..., "latent": ...}

Answers are JSON; what cannot be answered is {"error": "one line"} with a status that says why.

Who may ask: a page of another site can make a browser send requests here, and can point a name of
its own at this address. It cannot read answers (no CORS), cannot post JSON (that would take a
permission that is never given), and its name is refused, since a request has to be for `localhost`,
a loopback address, or the host that was given. What its browser says comes from another site is
refused as well, so that it cannot even keep this machine busy.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import traceback
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from fastsae.serve.dashboard import Dashboard, Json, Refused

FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
LOCAL = ("localhost", "127.0.0.1", "::1")
LARGEST_BODY = 1 << 16
SECONDS = 30
"""How long a client may take to send what it asks for."""


class DashboardServer(ThreadingHTTPServer):
    """Serves a dashboard; `serve_forever` runs it, `shutdown` from another thread ends it.

    Args:
        dashboard: what is shown.
        host: name or address to listen at; requests for it are answered beside those for this
            machine by its local names.
        port: 0 takes a free one.

    Raises:
        OSError: the host is not here, or the port is taken.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, dashboard: Dashboard, host: str = "127.0.0.1", port: int = 0) -> None:
        self.dashboard, self.host = dashboard, host.strip("[]")
        self.hosts = {*LOCAL, self.host.lower()}
        self.address_family, *_, address = socket.getaddrinfo(
            self.host, port, type=socket.SOCK_STREAM
        )[0]
        super().__init__((str(address[0]), port), _Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server for the name of this machine."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.host, int(self.server_address[1])

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless it is that the client went away."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: DashboardServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fastsae", ""
    timeout = SECONDS

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the terminal quiet."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request that `_answer` sees, such as an unknown method."""
        self.close_connection = True
        self._send_error(int(code), message or HTTPStatus(code).phrase)

    def _answer(self, method: str) -> None:
        self._body_read = method == "GET" and not self._announces_body()
        try:
            self._check_host()
            parts = urlsplit(self.path)
            if method == "GET" and parts.path in FILES:
                name, kind = FILES[parts.path]
                self._send(200, kind, Path(__file__).with_name(name).read_bytes())
                return
            value = self._ask(method, parts.path, parts.query)
            self._send_json(200, value)
        except Refused as error:
            self._send_error(error.status, str(error))
        except ConnectionError:
            raise
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split()) or "no reason"
            self._send_error(500, f"{type(error).__name__}: {text}")

    def _ask(self, method: str, path: str, query: str) -> Json:
        """Return the answer to a request of the API."""
        dashboard = self.server.dashboard
        latent = re.fullmatch(r"/api/latents/(\d{1,18})(/nearest|/logits)?", path, re.ASCII)
        calls: dict[str, Callable[[], Json]] = {
            "/api/about": lambda: dashboard.about(**_given(query)),
            "/api/latents": lambda: dashboard.latents(
                **_given(query, "sort", "order", "explanation", "score", page=int)
            ),
            "/api/search": lambda: dashboard.search(**_given(query, "text", page=int)),
            "/api/live": lambda: dashboard.run(**self._posted()),
        }
        if latent is not None:
            about = {None: dashboard.latent, "/nearest": dashboard.nearest}
            call = about.get(latent[2], dashboard.logits)
            calls[path] = lambda: call(int(latent[1]), **_given(query))
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise Refused(403, "expected a request of this page, got one of another site")
        if path not in calls:
            raise Refused(404, f"expected a path of the dashboard, got {path[:100]!r}")
        allowed = "POST" if path == "/api/live" else "GET"
        if method != allowed:
            raise Refused(405, f"expected {allowed} for {path}, got {method}")
        return calls[path]()

    def _check_host(self) -> None:
        """Refuse requests for another host, which a page elsewhere made a name for this one."""
        given = self.headers.get_all("Host") or []
        host = _host_of(given[0]) if len(given) == 1 else None
        if host not in self.server.hosts:
            names = ", ".join(sorted(self.server.hosts))
            got = ", ".join(given)[:100] or "none"
            raise Refused(403, f"expected a request for {names}, got {got!r}; see --host")

    def _announces_body(self) -> bool:
        return "Transfer-Encoding" in self.headers or "Content-Length" in self.headers

    def _posted(self) -> Json:
        """Return what was posted: a text, and maybe a latent."""
        kind = self.headers.get_content_type()
        if kind != "application/json":
            raise Refused(415, f"expected application/json, got {kind}")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,18}", length, re.ASCII) or "Transfer-Encoding" in self.headers:
            raise Refused(411, "expected a Content-Length, got none that is a number")
        if int(length) > LARGEST_BODY:
            raise Refused(413, f"expected at most {LARGEST_BODY} bytes, got {length}")
        data = self.rfile.read(int(length))
        self._body_read = True
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or not {"text"} <= value.keys() <= {"text", "latent"}:
            raise Refused(400, 'expected {"text": ..., "latent": ...}, got something else')
        if not isinstance(value["text"], str):
            raise Refused(400, f"expected text to be a string, got {type(value['text']).__name__}")
        if type(value.get("latent", 0)) is not int and value["latent"] is not None:
            raise Refused(400, f"expected latent to be a number, got {str(value['latent'])[:40]!r}")
        if any("\ud800" <= c <= "\udfff" for c in value["text"]):
            raise Refused(400, "expected text of whole characters, got a half of one")
        return value

    def _send_error(self, status: int, reason: str) -> None:
        self._send_json(status, {"error": " ".join(reason.split())})

    def _send_json(self, status: int, value: Json) -> None:
        data = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
        self._send(status, "application/json", data)

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        for name, text in HEADERS.items():
            self.send_header(name, text)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if not getattr(self, "_body_read", False):  # what is left of it would be the next request
            self.close_connection = True
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _host_of(header: str) -> str | None:
    """Return the host of a Host header in small letters, without port and brackets."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\s:\[\]/@]+))(?::\d{1,5})?", header.lower())
    return found and (found[1] or found[2])


def _given(query: str, *texts: str, **numbers: Callable[[str], int]) -> dict[str, Any]:
    """Return the parameters of a query, each at most once and known."""
    try:
        pairs = parse_qsl(
            query, keep_blank_values=True, strict_parsing=bool(query), errors="strict"
        )
    except ValueError:
        raise Refused(400, f"expected name=value&..., got {query[:100]!r}") from None
    given: dict[str, Any] = {}
    for name, text in pairs:
        if name not in texts and name not in numbers:
            known = ", ".join([*texts, *numbers]) or "none"
            raise Refused(400, f"expected parameters {known}, got {name[:40]!r}")
        if name in given:
            raise Refused(400, f"expected {name} once, got it twice")
        if name in numbers and not re.fullmatch(r"\d{1,12}", text, re.ASCII):
            raise Refused(400, f"expected {name} to be a number, got {text[:40]!r}")
        given[name] = int(text) if name in numbers else text
    return given
