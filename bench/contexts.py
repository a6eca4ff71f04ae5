"""What it costs to sample contexts of every latent, beside encoding alone and delphi's cache.

    python -m bench.contexts FOLDER [--tokens 1000000] [--d-sae 24576] [--delphi-tokens 65536]

FOLDER gets a store of random rows, if it is not there. Each way runs in a process of its own, in
blocks in turns with encoding alone, so that what a shared machine does to one it does to both:

    sample     `sample_contexts`: all of it, from the store to the tensors that are saved
    delphi     delphi's InMemoryCache, fed with what delphi makes of a SparseCoder of sparsify with
               the same weights (if both are installed); it needs all positions and activations in
               memory before windows can be made
    delphi, our encoder      the same cache fed with dense codes of ours

It prints seconds, the ratio to encoding alone, and the largest resident set.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.stream_memory import resident
from parity import sparsify
from parity.problem import fill

D_IN, K, CONTEXT = 576, 32, 256
WAYS = ("sample", "delphi", "delphi, our encoder")


def write(folder: Path, tokens: int) -> None:
    """Write a store of random rows in float16, shard by shard."""
    from fastsae.data.shards import Manifest, ShardWriter

    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(model="random", dtype="float16", sites={"resid_post.0": D_IN})
    writer = ShardWriter(folder, manifest, 1 << 16)
    generator = torch.Generator().manual_seed(0)
    for at in range(0, tokens, 1 << 14):
        row = torch.arange(at, min(at + (1 << 14), tokens))
        columns = {
            "token_ids": torch.randint(50_000, (len(row),), generator=generator),
            "doc_ids": row // (4 * CONTEXT),
            "positions": 1 + row % CONTEXT,
        }
        rows = {name: column.int() for name, column in columns.items()}
        acts = torch.randn(len(row), D_IN, generator=generator).half()
        writer.add("train", {**rows, "acts.resid_post.0": acts})
    writer.close()


def sparsify_encoder(sae: Any) -> Callable[[Tensor], Tensor]:
    """Return how delphi encodes with a SparseCoder, here one with the weights of ours."""
    from delphi.sparse_coders.load_sparsify import sae_dense_latents

    coder = sparsify.coder(sae.d_in, sae.d_sae, sae.k, dtype=torch.float32, device="cpu")
    fill(coder, sparsify.NAMES, dict(sae.named_parameters()) | {"W_enc": sae.W_enc})
    x = torch.randn(256, sae.d_in)
    with torch.no_grad():
        torch.testing.assert_close(sae_dense_latents(x, coder), sae.encode(x))
    return lambda rows: sae_dense_latents(rows, coder)


def measure(what: str, folder: Path, tokens: int, d_sae: int) -> dict[str, Any]:
    """Run one way, and encoding alone in turns with it."""
    import fastsae
    from fastsae.data import ActivationStore

    torch.manual_seed(0)
    sae = fastsae.TopKSAE(D_IN, d_sae, K).eval()
    store = ActivationStore(folder)
    alone = 0.0
    batch = 4096

    def encode(a: int) -> None:
        nonlocal alone
        begin = time.perf_counter()
        with torch.no_grad():
            sae.encode_sparse(store.rows(slice(a, min(a + batch, tokens))))
        alone += time.perf_counter() - begin

    encode(0)
    alone, at = 0.0, 0
    begin = time.perf_counter()
    if what == "sample":

        def advance(n: int) -> None:
            nonlocal at
            encode(at)
            at += n

        fastsae.interpret.sample_contexts(
            sae, store, max_rows=tokens, batch_size=batch, progress=advance
        )
    else:
        from delphi.latents.cache import InMemoryCache

        encoder = sae.encode if what == "delphi, our encoder" else sparsify_encoder(sae)
        cache = InMemoryCache(batch_size=batch // CONTEXT)
        for number, start in enumerate(range(0, tokens, batch)):
            encode(start)
            span = slice(start, min(start + batch, tokens))
            with torch.no_grad():
                dense = encoder(store.rows(span)).view(-1, CONTEXT, d_sae)
            cache.add(dense, store.token_ids(span).view(-1, CONTEXT), number, "layer")
        cache.save()
    seconds = time.perf_counter() - begin - alone
    return {
        "what": what,
        "tokens": tokens,
        "d_sae": d_sae,
        "seconds": seconds,
        "encode_seconds": alone,
        "ratio": seconds / alone,
        "largest_rss_gb": resident("VmHWM") / 1e9,
    }


def main() -> None:
    """Measure both ways, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--d-sae", type=int, default=24_576)
    parser.add_argument("--delphi-tokens", type=int, default=65_536)
    parser.add_argument("--what", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what:
        print(json.dumps(measure(args.what, args.folder, args.tokens, args.d_sae)))
        return
    if not (args.folder / "manifest.json").exists():
        write(args.folder, args.tokens)
    for what in WAYS:
        tokens = args.tokens if what == "sample" else args.delphi_tokens
        command = [sys.executable, "-m", "bench.contexts", str(args.folder), "--what", what]
        command += ["--tokens", str(tokens), "--d-sae", str(args.d_sae)]
        done = subprocess.run(command, capture_output=True, text=True)
        told = done.stderr.strip().splitlines()
        print(done.stdout.strip() if done.returncode == 0 else f"{what}: {told[-1]}", flush=True)


if __name__ == "__main__":
    main()
