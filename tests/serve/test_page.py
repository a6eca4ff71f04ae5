"""The page in a browser: what it shows, that it runs nothing it was given, and keys."""

from __future__ import annotations

import json
import time

import pytest

from bench.browser import Browser, find_browser
from tests.serve.made import HOSTILE, make_dashboard, running

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="no Chromium here: apt-get install chromium"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(make_dashboard(tmp_path_factory.mktemp("made"))) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def go(browser, server, hash="", path=None):
    """Open a page, and wait until it is there."""
    browser.open("about:blank")
    browser.until("document.URL === 'about:blank'")
    browser.open(f"{server.url}{hash}")
    path = path or hash.lstrip("#").partition("?")[0] or "/latents"
    browser.until(f"document.body && document.body.dataset.ready === {path!r}")


def shown(browser) -> str:
    return browser.evaluate("document.body.textContent")


def unharmed(browser) -> None:
    """Assert that nothing of a token ran: no flag, dialog, element, or request elsewhere."""
    assert browser.evaluate("window.owned === undefined")
    assert not browser.named("Page.javascriptDialogOpening", "Runtime.exceptionThrown")
    assert browser.evaluate("document.querySelectorAll('img, svg, script:not([src])').length") == 0
    assert browser.evaluate("document.scripts.length") == 1
    asked = [e["params"]["request"]["url"] for e in browser.named("Network.requestWillBeSent")]
    assert all(url.startswith("http://127.0.0.1:") for url in asked), asked


def test_the_list(browser, server) -> None:
    go(browser, server)
    assert "a <b>model, resid_post.2" in shown(browser)
    assert browser.evaluate("document.querySelectorAll('tbody tr').length") == 50
    assert browser.evaluate(
        "document.querySelector('tbody tr:nth-child(8)').textContent"
    ).startswith("72%7")
    browser.evaluate(
        "[...document.querySelectorAll('th a')].find(a => a.textContent === 'Score').click()"
    )
    browser.until("document.querySelector('tbody td a').textContent === '7'")
    assert (
        browser.evaluate("document.querySelector('th.score').getAttribute('aria-sort')")
        == "descending"
    )
    unharmed(browser)


@pytest.mark.parametrize("latent", sorted(HOSTILE))
def test_tokens_that_are_html_are_text(browser, server, latent) -> None:
    go(browser, server, f"#/latent/{latent}")
    browser.until("document.querySelector('#nearest table')")
    text = shown(browser)
    expected = (
        HOSTILE[latent].replace("\u202e", "\\u202e").replace("\n", "↵").replace("\0", "\\x00")
    )
    assert expected in text
    peaks = browser.evaluate("[...document.querySelectorAll('i.peak')].map(i => i.textContent)")
    assert expected in peaks
    time.sleep(0.05)
    unharmed(browser)


def test_explanations_and_queries_that_are_html_are_text(browser, server) -> None:
    go(browser, server, "#/latent/3")
    explanation = browser.evaluate("document.querySelector('p.explanation').textContent")
    assert explanation.startswith(f"images {HOSTILE[3]} {HOSTILE[4]}")
    query = json.dumps(HOSTILE[3])
    for how in ("explanation", "text"):
        browser.evaluate(f"document.getElementById('how').value = '{how}'")
        browser.evaluate(f"document.getElementById('query').value = {query}")
        browser.evaluate("document.body.removeAttribute('data-ready')")
        browser.evaluate("document.querySelector('#search button').click()")
        browser.until("document.body.dataset.ready")
        assert HOSTILE[3] in browser.evaluate("document.querySelector('h1').textContent")
        unharmed(browser)
    go(browser, server, "#/latents?sort=%3Cscript%3Ewindow.owned=1%3C/script%3E", "/latents")
    assert "<script>window.owned=1</script>" in shown(browser)
    go(browser, server, "#/%3Cimg%20src=x%20onerror=window.owned=1%3E")
    unharmed(browser)


def test_the_policy_stops_what_the_page_would_not_do(browser, server) -> None:
    """Were there a hole in the page, the browser would still not run it: the policy is in force."""
    go(browser, server)
    with pytest.raises(RuntimeError, match=r"TrustedHTML|Trusted Type"):
        browser.evaluate("document.body.innerHTML = '<img src=x onerror=window.owned=1>'")
    for hole in (
        "const made = document.createElement('script'); made.text = 'window.owned = 1';"
        "document.body.append(made)",
        "const made = new Image(); made.setAttribute('onerror', 'window.owned = 1');"
        "made.src = '/nothing'; document.body.append(made)",
        "const made = document.createElement('a'); made.href = 'javascript:window.owned = 1';"
        "document.body.append(made); made.click()",
        "setTimeout('window.owned = 1')",
        "const made = document.createElement('iframe'); document.body.append(made);"
        "made.srcdoc = '<script>top.owned = 1</script>'",
    ):
        browser.evaluate(f"(() => {{ try {{ {hole} }} catch {{}} }})()")
    there = "http://localhost:1/"
    assert browser.evaluate(f"fetch('{there}').then(() => 'sent', () => 'stopped')") == "stopped"
    time.sleep(0.2)
    assert browser.evaluate("window.owned === undefined")
    violations = [e["params"]["entry"]["text"] for e in browser.named("Log.entryAdded")]
    assert any("Content Security Policy" in text for text in violations)


def test_a_latent(browser, server) -> None:
    go(browser, server, "#/latent/7")
    assert browser.evaluate("document.querySelector('h1').textContent") == "Latent 7"
    assert "words that are 7" in shown(browser)
    assert "Fires on 2% of tokens (40 of 2,000) · largest 7 · mean where it fires 3.88" in shown(
        browser
    )
    strongest = browser.evaluate(
        "[...document.querySelector('.contexts').querySelectorAll('.v')].map(v => v.textContent)"
    )
    assert strongest == ["7"] * 4
    shade = "getComputedStyle(document.querySelector('i.peak')).backgroundColor"
    assert browser.evaluate(shade).endswith(", 0.7)")
    assert browser.evaluate("document.querySelectorAll('.histogram div span').length") > 1
    browser.evaluate("document.querySelector('main button').click()")
    assert (
        browser.evaluate("getComputedStyle(document.querySelector('.contexts li')).display")
        == "block"
    )


def test_keys(browser, server) -> None:
    def press(key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            browser.call("Input.dispatchKeyEvent", type=kind, key=key, **text)

    go(browser, server, "#/latent/7")
    press("ArrowRight")
    browser.until("document.body.dataset.ready === '/latent/8'")
    press("ArrowLeft")
    browser.until("document.body.dataset.ready === '/latent/7'")
    press("/")
    assert browser.evaluate("document.activeElement.id") == "query"
    press("l")
    assert browser.evaluate("document.getElementById('query').value") == "l"
    browser.evaluate("document.activeElement.blur()")
    press("l")
    browser.until("document.body.dataset.ready === '/latents'")
    browser.evaluate("document.getElementById('how').value = 'number'")
    browser.evaluate("document.getElementById('query').value = '12'")
    browser.evaluate("document.getElementById('query').focus()")
    browser.call(
        "Input.dispatchKeyEvent", type="keyDown", key="Enter", windowsVirtualKeyCode=13, text="\r"
    )
    browser.until("document.body.dataset.ready === '/latent/12'")


def test_a_page_that_is_not_there(browser, server) -> None:
    go(browser, server, "#/latent/50")
    assert browser.evaluate("document.getElementById('status').textContent") == (
        "expected a latent in 0..49, got 50"
    )
    go(browser, server, "#/elsewhere")
    assert "no such page: /elsewhere" in shown(browser)
    go(browser, server, "#/live")
    assert "no model was given" in shown(browser)
