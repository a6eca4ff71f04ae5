"""A dashboard of an SAE made up by hand, with tokens that are hostile to HTML, and its server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastsae.data import ActivationStore
from fastsae.data.shards import Manifest, ShardWriter
from fastsae.interpret import ContextSample, sample_contexts
from fastsae.nn import TopKSAE
from fastsae.serve import Dashboard, DashboardServer, Explanations, Words

N, ROWS, DOC = 50, 2000, 100
HOSTILE = {
    3: "<img src=x onerror=\"window.owned='img'\">",
    4: "<script>window.owned='script';alert(1)</script>",
    5: "</code></td><svg onload=\"window.owned='svg'\">",
    6: "javascript:window.owned='link'",
    8: "&lt;b&gt;",
    9: "a\u202eb\nc\x00",
}


class Vocabulary:
    """A tokenizer of the words w0, w1, ..., and of what HTML and scripts look like."""

    words = tuple(HOSTILE.get(i, f"w{i}") for i in range(N))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[i] for i in ids)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [self.words.index(w) for w in text.split() if w in self.words]}


def make_store(folder: Path) -> ActivationStore:
    """Write rows of which row i has token i % 50 and is a number from 1 to 7 times e_(i % 50)."""
    row = torch.arange(ROWS)
    x = torch.nn.functional.one_hot(row % N, N).float() * (1 + row // N % 7).unsqueeze(1)
    folder.mkdir()
    writer = ShardWriter(folder, Manifest("a <b>model", "float32", {"resid_post.2": N}), 700)
    # Every fourth token differs from document to document, so that no window repeats another.
    token_ids = (row % N).where(row % 4 != 0, (row // 4 * 13 + row // DOC * 7) % N)
    columns = {"token_ids": token_ids, "doc_ids": row // DOC, "positions": row % DOC + 1}
    writer.add("train", {**{k: v.int() for k, v in columns.items()}, "acts.resid_post.2": x})
    writer.close()
    return ActivationStore(folder)


def make_sae() -> TopKSAE:
    """Return an SAE whose latent j reads and writes dimension j, but for latent 49: silent, and
    nearest to 48."""
    sae = TopKSAE(N, N, k=2)
    with torch.no_grad():
        sae.W_enc, sae.W_dec = torch.eye(N), torch.eye(N)
        sae.W_enc_rows[49] = sae.W_dec[49] = 0
        sae.W_dec[49, 48] = 2.0
    sae.metadata = {"hook_name": "blocks.2.hook_resid_post"}
    return sae.eval()


def explain(path: Path) -> None:
    """Write explanations of two latents."""
    lines: list[dict[str, Any]] = [
        {"latent": 7, "explanation": "words that are 7", "scores": {"fuzz": 0.25, "detect": 0.9}},
        {"latent": 3, "explanation": f"images {HOSTILE[3]} {HOSTILE[4]}", "scores": {"fuzz": 0.5}},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_dashboard(folder: Path) -> Dashboard:
    """Return a dashboard; the sample is read from its file."""
    store, sae = make_store(folder / "activations"), make_sae()
    path = folder / "contexts.safetensors"
    sample_contexts(sae, store, width=16, top=4, drawn=8).save(path)
    explain(folder / "explanations.jsonl")
    explanations = Explanations(folder / "explanations.jsonl", sae.d_sae)
    return Dashboard(sae, ContextSample.open(path), Words(Vocabulary()), explanations)


@contextmanager
def running(dashboard: Dashboard, host: str = "127.0.0.1") -> Iterator[DashboardServer]:
    """Serve a dashboard in a thread meanwhile."""
    with DashboardServer(dashboard, host) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
