"""Time training from a running model against harvesting and training one after the other.

    python -m bench.stream TEXT.jsonl [--model smollm2] [--site resid_post.5] [--rows 65536]

One thread runs the model and one trains, on a CPU. Timed are

    harvest     the rows of a run, of other contexts of the same documents
    train       these from memory, all of them mixed, the same SAE and settings
    stream      both at once

and reported is stream / max(harvest, train), with the growth of the process's memory over buffer,
model and SAE, and the FVU on held-out documents of both SAEs by seed.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import time
from itertools import islice

import torch
from torch import Tensor

from fastsae import TopKSAE, TrainConfig, Trainer
from fastsae.data import Stream, TensorSource, stream
from fastsae.models import load_model
from fastsae.models.text import read_files


def peak() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fvu(sae: TopKSAE, x: Tensor) -> float:
    """Return the FVU of x; rows above 3 medians of norm do not count."""
    norm = x.norm(dim=1)
    x = x[norm <= 3 * norm.median()]
    with torch.no_grad():
        error = sum(float((part - sae(part)).square().sum()) for part in x.split(1024))
    return error / float((x - x.mean(0)).square().sum())


def train(source: object, d_in: int, args: argparse.Namespace, seed: int) -> tuple[TopKSAE, float]:
    """Return a trained SAE and the seconds it took."""
    torch.manual_seed(seed)
    sae = TopKSAE(d_in, args.d_sae, k=32)
    config = TrainConfig(
        steps=args.rows // 512, batch_size=512, seed=seed, progress=False, sample_rows=2048,
        weight_init="random",
    )  # fmt: skip
    start = time.perf_counter()
    Trainer(sae, source, config).fit()  # type: ignore[arg-type]
    return sae, time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--site", default="resid_post.5")
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(args.model)
    texts = read_files([args.text])
    random.Random(0).shuffle(texts)
    held, texts = texts[::10], [text for i, text in enumerate(texts) if i % 10]

    def source(documents: list[str]) -> Stream:
        return stream(
            model, tokenizer, documents, args.site, buffer_rows=16384, threads=1, max_norm_ratio=3.0
        )

    val = torch.cat(list(islice(source(held).batches(1024, seed=None), 4))).float()
    start = time.perf_counter()
    parts = list(islice(source(texts).batches(1024, seed=99), args.rows // 1024))
    harvest = time.perf_counter() - start
    rows = torch.cat(parts).float()
    del parts
    d_in = rows.shape[1]
    numbers: dict[str, list[float]] = {"train": [], "stream": [], "fvu": [], "fvu stream": []}
    for seed in args.seeds:
        sae, seconds = train(TensorSource(rows), d_in, args, seed)
        numbers["train"].append(seconds)
        numbers["fvu"].append(fvu(sae, val))
    del rows
    before = peak()
    for seed in args.seeds:
        sae, seconds = train(source(texts), d_in, args, seed)
        numbers["stream"].append(seconds)
        numbers["fvu stream"].append(fvu(sae, val))
        print({name: values[-1] for name, values in numbers.items()}, flush=True)
    middle = {name: statistics.median(values) for name, values in numbers.items()}
    slower = max(harvest, middle["train"])
    print(
        f"harvest {harvest:.1f} s, train {middle['train']:.1f} s, stream {middle['stream']:.1f} s"
    )
    print(f"stream / max(harvest, train): {middle['stream'] / slower:.3f}")
    print(f"FVU from memory {numbers['fvu']}, from the model {numbers['fvu stream']}")
    print(f"peak memory before streams {before / 1e9:.2f} GB, after {peak() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
