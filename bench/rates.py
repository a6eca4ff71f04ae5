"""Sweep the learning rate: what the best one is, and what the default rule of `TrainConfig` costs.

    python -m bench.rates STORE [STORE ...] --out RESULTS.jsonl [--site resid_post.15]
        [--classes TopK BatchTopK] [--d-sae 2304 9216] [--steps 256 1024] [--batch 512]
        [--rates 1e-3 2e-3 4e-3] [--seeds 0] [--set optimizer=adam betas=[0.9,0.999]] [--part 0/2]
    python -m bench.rates --report RESULTS.jsonl

STORE is a folder written by `fastsae harvest`, with held-out documents; a transcoder reads
mlp_in.L and mlp_out.L, where --site names L. Every run is a whole `Trainer.fit` with its schedule,
and one line of RESULTS: what was asked, val_fvu and val_l0 on the first `--val-rows` held-out rows
(rows above 3 medians of norm are left out there, and kept in training), dead latents, those that
are silent on 65,536 training rows, and the seconds of training. The rate `default` is that of the
rule. What RESULTS has is not run again, so an interrupted sweep continues; two processes share one
with --part 0/2 and --part 1/2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae import SAE, TrainConfig, Trainer
from fastsae.data import ActivationStore

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "TopK": ("TopKSAE", {}),
    "AbsTopK": ("TopKSAE", {"absolute": True}),
    "Multi-TopK": ("TopKSAE", {"multi_topk": True}),
    "BatchTopK": ("BatchTopKSAE", {}),
    "FeatureChoice": ("FeatureChoiceSAE", {}),
    "Matryoshka": ("MatryoshkaSAE", {}),
    "Hierarchical": ("HierarchicalTopKSAE", {}),
    "GroupMax": ("GroupMaxSAE", {}),
    "Sampled": ("SampledSAE", {}),
    "JumpReLU": ("JumpReLUSAE", {}),
    "Gated": ("GatedSAE", {}),
    "ReLU": ("ReLUSAE", {}),
    "Transcoder": ("Transcoder", {}),
    "BatchTopKTranscoder": ("BatchTopKTranscoder", {}),
    "JumpReLUTranscoder": ("JumpReLUTranscoder", {}),
}
"""Classes of `fastsae`, and how they are made."""

CELL = ("data", "site", "class", "d_sae", "k", "steps", "batch", "settings")
"""What two runs of different rates and seeds have in common."""
KEYS = (*CELL, "lr", "seed")


class Rows:
    """Training rows and held-out rows of stores, loaded once."""

    def __init__(self, val_rows: int) -> None:
        self._val_rows = val_rows
        self._held: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def __call__(self, store: str, site: str, transcoder: bool) -> tuple[Tensor, Tensor]:
        layer = site.rsplit(".", 1)[1]
        sites = (f"mlp_in.{layer}", f"mlp_out.{layer}") if transcoder else (site,)
        key = store, "+".join(sites)
        if key not in self._held:
            self._held.clear()
            train = ActivationStore(store, sites).rows()
            val = ActivationStore(store, sites, split="val").rows(slice(self._val_rows))
            norm = val.norm(dim=1)
            self._held[key] = train, val[norm <= 3 * norm.median()]
        return self._held[key]


def make(name: str, width: int, d_sae: int, k: float) -> SAE:
    """Return a fresh module of the class `name` for rows of `width` numbers."""
    cls, options = CLASSES[name]
    sizes = (width // 2, width // 2) if "Transcoder" in name else (width,)
    sae: SAE = getattr(fastsae, cls)(*sizes, d_sae, k, **options)
    return sae


def run(wanted: dict[str, Any], train: Tensor, val: Tensor) -> dict[str, Any]:
    """Train what is wanted, and return it with its result."""
    torch.manual_seed(wanted["seed"])
    sae = make(wanted["class"], train.shape[1], wanted["d_sae"], wanted["k"])
    config = TrainConfig(
        lr=None if wanted["lr"] == "default" else wanted["lr"],
        batch_size=wanted["batch"],
        steps=wanted["steps"],
        seed=wanted["seed"],
        log_every=wanted["steps"],
        progress=False,
        **wanted["settings"],
    )
    trainer = Trainer(sae, train, config, val=val)
    start = time.perf_counter()
    try:
        final = trainer.fit().final
    except RuntimeError as error:  # the loss is not finite: a rate that is far too high
        return {**wanted, "error": str(error)}
    seconds = time.perf_counter() - start
    result = {"val_fvu": final["val_fvu"], "val_l0": final["val_l0"]}
    result |= {"dead": final["dead"] / sae.d_sae, "silent": silent(sae, train, wanted["seed"])}
    return {**wanted, **result, "seconds": seconds, "peak_lr": trainer.plan.lr}


@torch.no_grad()
def silent(sae: SAE, rows: Tensor, seed: int, count: int = 65_536) -> float:
    """Return the share of latents that are active on none of `count` rows, by the inference rule.

    What the trainer counts as dead are latents that were not active on the last tokens, which are
    few in a short run: many of these only fire rarely.
    """
    some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    for places in some.split(2048):
        x, _, _ = sae.columns.split(rows[places].to(sae.b_enc.dtype))
        fired |= sae.encode_sparse(x).fired()
    return float((~fired).float().mean())


def grid(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield all runs that the arguments ask for."""
    settings = dict(pair.split("=", 1) for pair in args.set)
    settings = {name: _value(text) for name, text in settings.items()}
    axes = (args.stores, args.site, args.classes, args.d_sae, args.steps, args.batch)
    for store, site, cls, d_sae, steps, batch in itertools.product(*axes):
        for lr, seed in itertools.product(args.rates, args.seeds):
            cell = (Path(store).name, site, cls, d_sae, args.k, steps, batch, settings)
            yield dict(zip(KEYS, (*cell, lr, seed), strict=True)) | {"store": store}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _rate(text: str) -> float | str:
    return text if text == "default" else float(text)


def key(line: dict[str, Any], names: tuple[str, ...]) -> str:
    """Return the values of some fields of a line, as a key."""
    return json.dumps([line[name] for name in names], sort_keys=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of results; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(lines: list[dict[str, Any]]) -> str:
    """Return a table: every cell with its best rate, and what the default costs against it."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        cells.setdefault(key(line, CELL), []).append(line)
    names = ["data", "settings", "class", "d_sae", "steps", "batch", "best rate", "FVU"]
    names += ["default rate", "FVU", "+%", "dead, %", "L0"]
    table = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for runs in cells.values():
        rates: dict[float | str, list[dict[str, Any]]] = {}
        for line in runs:
            rates.setdefault(line["lr"], []).append(line)
        mean = {lr: _mean(of, "val_fvu") for lr, of in rates.items()}
        swept = {lr: value for lr, value in mean.items() if lr != "default"}
        first, best = runs[0], min(swept, key=lambda lr: swept[lr]) if swept else None
        settings = " ".join(f"{name}={value}" for name, value in first["settings"].items())
        row: list[Any] = [f"{first['data']} {first['site']}", settings]
        row += [first[name] for name in ("class", "d_sae", "steps", "batch")]
        row += [best, f"{mean[best]:.4f}"] if best is not None else ["", ""]
        shown = rates.get("default", rates[best] if best is not None else [])
        if "default" in mean:
            worse = f"{100 * (mean['default'] / mean[best] - 1):+.1f}" if best is not None else ""
            row += [f"{shown[0].get('peak_lr', math.nan):.3g}", f"{mean['default']:.4f}", worse]
        else:
            row += ["", "", ""]
        row += [f"{100 * _mean(shown, 'dead'):.1f}", f"{_mean(shown, 'val_l0'):.1f}"]
        table.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(table)


def _mean(lines: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(float(line.get(name, math.inf)) for line in lines)


def main() -> int:
    """Parse arguments; run what is missing, or report."""
    parser = argparse.ArgumentParser(description="sweep the learning rate")
    parser.add_argument("stores", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--site", nargs="+", default=["resid_post.15"])
    parser.add_argument("--classes", nargs="+", default=["TopK"], choices=list(CLASSES))
    parser.add_argument("--d-sae", nargs="+", type=int, default=[2304])
    parser.add_argument("--k", type=float, default=32)
    parser.add_argument("--steps", nargs="+", type=int, default=[256])
    parser.add_argument("--batch", nargs="+", type=int, default=[512])
    parser.add_argument("--rates", nargs="+", type=_rate, default=["default"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of TrainConfig"
    )
    parser.add_argument("--val-rows", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", default="0/1", help="i/n: every n-th run from i on")
    args = parser.parse_args()
    if args.report:
        print(report(read(args.report)))
        return 0
    if not (args.out and args.stores):
        parser.error("expected STORE and --out, or --report")
    torch.set_num_threads(args.threads)
    part, parts = map(int, args.part.split("/"))
    rows = Rows(args.val_rows)
    for number, wanted in enumerate(grid(args)):
        store = wanted.pop("store")
        if number % parts != part or key(wanted, KEYS) in {key(x, KEYS) for x in read(args.out)}:
            continue
        train, val = rows(store, wanted["site"], "Transcoder" in wanted["class"])
        line = json.dumps(run(wanted, train, val))
        with args.out.open("a") as file:
            file.write(line + "\n")
        print(line, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
