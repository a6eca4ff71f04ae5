"""Every architecture on the same real activations with the same budget.

    python -m bench.architectures FILE --out RESULTS.jsonl      # trains what RESULTS lacks
    python -m bench.architectures --report RESULTS.jsonl        # prints the table

FILE is safetensors with `acts` [n, d] and, in its metadata, `n_train`: the rows before are for
training, the rest is held out. Rows above 3 times the median norm are left out. Each line of
RESULTS is one run; metrics are those of the inference rule on every second held-out row, after the
others have set the thresholds of classes that can be calibrated to L0 = k. An interrupted bench
goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import fastsae
from fastsae import SAE, TrainConfig, Trainer
from fastsae.eval import metrics

STEPS, BATCH = 512, 512

CALIBRATED = (fastsae.BatchTopKSAE, fastsae.FeatureChoiceSAE, fastsae.JumpReLUSAE)
Make = Callable[[int, int, float], SAE]


def _make(cls: str, ask: float = 1.0, **options: Any) -> Make:
    return lambda d_in, d_sae, k: getattr(fastsae, cls)(d_in, d_sae, ask * k, **options)


HELD_OUT = 0.85
"""Share of the wanted L0 to train for where inference has no threshold: on new tokens, which these
few were not fitted to, more latents fire."""


ARCHITECTURES: dict[str, Make] = {
    "TopK": _make("TopKSAE"),
    "TopK, no aux": _make("TopKSAE", aux_alpha=0.0),
    "TopK, zipf": _make("TopKSAE", aux="zipf"),
    "TopK, multi": _make("TopKSAE", multi_topk=True),
    "BatchTopK": _make("BatchTopKSAE"),
    "FeatureChoice, uniform": _make("FeatureChoiceSAE", allocation="uniform"),
    "FeatureChoice, zipf": _make("FeatureChoiceSAE", allocation="zipf"),
    "ReLU, L1": _make("ReLUSAE", HELD_OUT),
    "ReLU, tanh": _make("ReLUSAE", HELD_OUT, penalty="tanh"),
    "ReLU, p-anneal": _make("ReLUSAE", HELD_OUT, penalty="p_anneal"),
    "Gated": _make("GatedSAE", HELD_OUT),
    "JumpReLU": _make("JumpReLUSAE"),
}
"""Rows of the table: how each is made from d_in, d_sae and the wanted L0."""


def build(name: str, d_in: int, d_sae: int, k: float) -> SAE:
    """Return a fresh module of the architecture `name`."""
    return ARCHITECTURES[name](d_in, d_sae, k)


def measure(
    name: str, seed: int, train: Tensor, val: Tensor, k: float, steps: int
) -> dict[str, Any]:
    """Train one architecture and return its line of results."""
    torch.manual_seed(seed)
    sae = build(name, train.shape[1], 4 * train.shape[1], k)
    config = TrainConfig(
        lr=8e-4,
        batch_size=BATCH,
        steps=steps,
        warmup_steps=50,
        decay_fraction=0.3,
        compute_dtype="float32",
        seed=seed,
        progress=False,
    )
    start = time.perf_counter()
    result = Trainer(sae, train, config).fit()
    seconds = time.perf_counter() - start
    if isinstance(sae, CALIBRATED):
        sae.calibrate_(val[::2])
    with torch.no_grad():
        acts = sae.encode_sparse(val[1::2])
        error = metrics.fvu(val[1::2], sae.decode(acts))
    return {
        "architecture": name,
        "seed": seed,
        "steps": steps,
        "k": k,
        "fvu": error,
        "l0": float(acts.l0()),
        "fvu_train": result.final["fvu"],
        "dead": result.final["dead"] / sae.d_sae,
        "silent": float((acts.counts() == 0).float().mean()),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in sae.parameters()),
    }


def report(rows: list[dict[str, Any]]) -> str:
    """Return the table: means over seeds, and half the range of the FVU."""
    lines = [
        "| architecture | seeds | FVU | L0 | dead | silent on held-out | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["architecture"] for row in rows):
        own = [row for row in rows if row["architecture"] == name]

        def mean(key: str, own: list[dict[str, Any]] = own) -> float:
            return statistics.fmean(row[key] for row in own)

        fvu = [row["fvu"] for row in own]
        half = (max(fvu) - min(fvu)) / 2
        cells = (
            *(name, len(own), f"{mean('fvu'):.4f} ± {half:.4f}", f"{mean('l0'):.1f}"),
            *(f"{mean('dead'):.1%}", f"{mean('silent'):.1%}", f"{mean('seconds'):.0f}"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def read(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a results file; none if there is none."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", help="activations")
    parser.add_argument("--out", type=Path, help="results, one line a run")
    parser.add_argument("--report", type=Path, help="print the table of these results")
    parser.add_argument("--only", nargs="*", default=list(ARCHITECTURES), help="architectures")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--k", type=float, default=32, help="wanted L0")
    arguments = parser.parse_args()
    if arguments.report:
        print(report(read(arguments.report)))
        return
    if arguments.file is None or arguments.out is None:
        parser.error("expected FILE and --out, or --report")
    with safe_open(arguments.file, "pt") as f:
        acts, n_train = f.get_tensor("acts").float(), int(f.metadata()["n_train"])
    norm = acts.norm(dim=1)
    usual = norm <= 3 * norm[:n_train].median()
    train, val = acts[:n_train][usual[:n_train]], acts[n_train:][usual[n_train:]]
    done = {(row["architecture"], row["seed"], row["steps"]) for row in read(arguments.out)}
    for seed in range(arguments.seeds):
        for name in arguments.only:
            if (name, seed, arguments.steps) in done:
                continue
            row = measure(name, seed, train, val, arguments.k, arguments.steps)
            with arguments.out.open("a") as out:
                out.write(json.dumps(row) + "\n")
            print(f"{name}, seed {seed}: FVU {row['fvu']:.4f}, L0 {row['l0']:.1f}", flush=True)
    print(report(read(arguments.out)))


if __name__ == "__main__":
    main()
