"""How fast `fastsae serve` opens and answers, in a headless Chromium.

    python -m bench.serve                       an SAE of 100,000 random latents, made now
    python -m bench.serve --demo fastsae-demo   and the one of a demo

For each it starts the command, opens the list and a latent in the browser, searches for texts and
explanations, and prints medians: from the start of a navigation, or from the submitted form, until
the page shows the result. The first row is how long the command takes until it prints its address,
with the contexts already sampled. Chromium has to be there; nothing else is needed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch

import fastsae
from bench.browser import Browser
from fastsae.data.shards import Manifest, ShardWriter

SITE, VOCAB = "resid_post.20", 4096
READY = "document.body.dataset.ready === {path!r}"


def make_random(folder: Path, d_sae: int, d_in: int, tokens: int, k: int) -> None:
    """Write an SAE of random latents, random activations of random words, and the tokenizer."""
    torch.manual_seed(0)
    sae = fastsae.TopKSAE(d_in, d_sae, k)
    sae.metadata = {"hook_name": SITE}
    fastsae.save(sae, folder / "sae")
    (folder / "activations").mkdir()
    writer = ShardWriter(folder / "activations", Manifest("random", "float16", {SITE: d_in}), 65536)
    common = 1 / torch.arange(1.0, VOCAB)  # Zipf's law
    for at in range(0, tokens, 8192):
        n = min(8192, tokens - at)
        row = torch.arange(at, at + n)
        columns = {
            "token_ids": 1 + torch.multinomial(common, n, replacement=True),
            "doc_ids": row // 512,
            "positions": row % 512 + 1,
        }
        rows = {name: column.int() for name, column in columns.items()}
        writer.add("train", {**rows, f"acts.{SITE}": torch.randn(n, d_in).half()})
    writer.close()
    known = range(0, d_sae, 2)
    lines = [
        {"latent": i, "explanation": f"made up {i % 997}", "scores": {"f": 0.5}} for i in known
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "explanations.jsonl").write_text(text)
    make_tokenizer(folder / "tokenizer")


def make_tokenizer(folder: Path) -> None:
    """Write a tokenizer of words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, float]]:
    """Run `fastsae serve`; yields its address, and the seconds until it was printed."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "fastsae.cli", "serve", *arguments, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or not (text := process.stdout.read(1)):
                raise RuntimeError(f"{' '.join(command)}: expected an address, got none")
            while "}" not in text:
                text += process.stdout.read(1)
            yield json.loads(text)["url"], time.perf_counter() - start
        finally:
            process.terminate()


def wait_for_model(url: str) -> None:
    """Run a text, which waits until the model is there."""
    data = json.dumps({"text": "a"}).encode()
    request = Request(f"{url}api/live", data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=300) as answer:
        answer.read()


def measure(url: str, latents: int, words: list[str], times: int) -> dict[str, list[float]]:
    """Return seconds by what was done, several of each."""
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {}
    with Browser() as browser:

        def timed(name: str, start: Callable[[], object], done: str) -> None:
            began = time.perf_counter()
            start()
            browser.until(done)
            seconds.setdefault(name, []).append(time.perf_counter() - began)

        for _ in range(times):
            browser.open("about:blank")
            browser.until("document.URL === 'about:blank'")
            done = READY.format(path="/latents") + " && document.querySelectorAll('tr').length > 1"
            timed("open the list", lambda: browser.open(url), done)
        for _ in range(times):
            path = f"/latent/{rng.randrange(latents)}"
            browser.open("about:blank")
            browser.until("document.URL === 'about:blank'")
            timed("open a latent", partial(browser.open, f"{url}#{path}"), READY.format(path=path))
        made = [("explanation", f"made {i}") for i in range(times)]
        for how, query in [("text", word) for word in words] + made:
            script = f"""document.body.removeAttribute("data-ready");
                document.getElementById("how").value = {how!r};
                document.getElementById("query").value = {query!r};
                document.querySelector("#search button").click()"""
            done = f"document.body.dataset.ready && location.hash.includes('{how}=')"
            timed(f"search for {how}", partial(browser.evaluate, script), done)
        for _ in range(times):
            sort = rng.choice(["rate", "largest", "score"])
            hash = f"#/latents?sort={sort}&order=desc&page={rng.randrange(latents // 50)}"
            script = f"document.body.removeAttribute('data-ready'); location.hash = {hash!r}"
            done = READY.format(path="/latents")
            timed("sort and turn pages", partial(browser.evaluate, script), done)
    return seconds


def report(name: str, started: float, seconds: dict[str, list[float]]) -> None:
    """Print medians and the slowest of each, as a Markdown table."""
    print(f"\n{name}\n\n| | median, s | slowest, s | times |\n|---|---|---|---|")
    print(f"| start of the command | {started:.2f} | | 1 |")
    for what, values in seconds.items():
        print(f"| {what} | {statistics.median(values):.3f} | {max(values):.3f} | {len(values)} |")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--demo", help="folder of a demo to measure too")
    parser.add_argument("--folder", help="where to keep the random SAE (default: nowhere)")
    parser.add_argument("--latents", type=int, default=100_000)
    parser.add_argument("--d-in", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--times", type=int, default=7)
    args = parser.parse_args()
    if args.demo:
        sae = fastsae.load(Path(args.demo) / "sae")
        with serving(args.demo) as (url, started):
            wait_for_model(url)
            words = ["the", "object", "import", "function", "value", "is not", "class"]
            seconds = measure(url, sae.d_sae, words, args.times)
        report(f"{args.demo}, {sae.d_sae:,} latents", started, seconds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        if not (folder / "tokenizer").exists():
            make_random(folder, args.latents, args.d_in, args.tokens, args.k)
        arguments = [str(folder), "--tokenizer", str(folder / "tokenizer")]
        with serving(*arguments):  # contexts are sampled
            pass
        words = [f"w{2**i}" for i in range(1, 12)]
        with serving(*arguments) as (url, started):
            seconds = measure(url, args.latents, words, args.times)
    report(f"random, {args.latents:,} latents of {args.tokens:,} tokens", started, seconds)


if __name__ == "__main__":
    main()
