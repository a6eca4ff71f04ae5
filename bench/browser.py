"""A headless Chromium, driven over its own pipe: no package, no port, no network.

It speaks the DevTools protocol, JSON messages that end with a zero byte, on two pipes that
`--remote-debugging-pipe` expects as file descriptors 3 and 4.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-default-browser-check",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)  # fmt: skip
SECONDS = 30.0


def find_browser() -> str | None:
    """Return the path of a Chromium; None: there is none here."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab of a headless Chromium.

    Events of the protocol are kept in `events`.

    Raises:
        FileNotFoundError: there is no Chromium.
        TimeoutError: it does not answer.
    """

    def __init__(self) -> None:
        path = find_browser()
        if path is None:
            raise FileNotFoundError(f"browser: expected one of {', '.join(NAMES)}, found none")
        self.events: list[dict[str, Any]] = []
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash"),
                *(path, *FLAGS, f"--user-data-dir={self._folder.name}", "about:blank"),
            ],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._held, self._last, self._session = b"", 0, ""
        targets = self.call("Target.getTargets")["targetInfos"]
        tab = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        os.close(self._out)
        os.close(self._in)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result.

        Raises:
            RuntimeError: the browser refuses it.
        """
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        end = time.monotonic() + SECONDS
        while True:
            answer = self._next(end)
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression in the page, awaited if it is a promise.

        Raises:
            RuntimeError: it throws.
        """
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            thrown = found["exceptionDetails"]
            raise RuntimeError(thrown.get("exception", {}).get("description", thrown["text"]))
        return found["result"].get("value")

    def open(self, url: str) -> None:
        """Go to a page, and forget the events before."""
        self.events.clear()
        self.call("Page.navigate", url=url)

    def until(self, script: str, seconds: float = SECONDS) -> float:
        """Wait until an expression is true; return how many seconds that took.

        Raises:
            TimeoutError: it is not in time.
        """
        start = time.monotonic()
        while not self._true(script):
            if time.monotonic() > start + seconds:
                raise TimeoutError(f"browser: expected {script} within {seconds} s")
            time.sleep(0.005)
        return time.monotonic() - start

    def _true(self, script: str) -> bool:
        try:
            return self.evaluate(f"Boolean({script})") is True
        except RuntimeError:  # between two documents, or where a part is not there yet
            return False

    def named(self, *methods: str) -> list[dict[str, Any]]:
        """Return the events with these names."""
        self.evaluate("0")  # what happened before has arrived when this has
        return [event for event in self.events if event["method"] in methods]

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._held:
            if not select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"browser: expected an answer within {SECONDS} s, got none")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise RuntimeError("browser: expected it to run, got its end")
            self._held += part
        line, _, self._held = self._held.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message
