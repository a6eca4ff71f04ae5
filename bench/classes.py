"""Time a training step of every class, and of SAELens' class of the same kind where there is one.

    python -m bench.classes [--classes ReLU Gated] [--n 1024] [--d 576] [--d-sae 9216] [--k 32]
        [--rounds 5] [--out RESULTS.jsonl]

Steps are the first of a run on tokens made of k latents each: `Trainer.step` here, by default, and
`SAETrainer.step` there, with Adam on both sides. At that time half of the latents of a class with a
penalty are active. Rounds alternate; reported are medians in milliseconds, their ratio, the mean
number of active latents, and which update fastsae used.
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
from torch import Tensor

import fastsae
from bench.peers import import_error, start
from fastsae import SAE, TrainConfig, Trainer
from fastsae.train.fused_update import FusedUpdate
from parity import saelens

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "TopK": ("TopKSAE", {}),
    "BatchTopK": ("BatchTopKSAE", {}),
    "FeatureChoice": ("FeatureChoiceSAE", {}),
    "Matryoshka": ("MatryoshkaSAE", {}),
    "Multi-TopK": ("TopKSAE", {"multi_topk": True}),
    "Hierarchical": ("HierarchicalTopKSAE", {}),
    "GroupMax": ("GroupMaxSAE", {}),
    "AbsTopK": ("TopKSAE", {"absolute": True}),
    "Gradient": ("GradientSAE", {}),
    "Sampled": ("SampledSAE", {}),
    "JumpReLU": ("JumpReLUSAE", {}),
    "Gated": ("GatedSAE", {}),
    "ReLU": ("ReLUSAE", {}),
    "Transcoder": ("Transcoder", {}),
    "Skip": ("Transcoder", {"skip": True}),
}
"""Classes of fastsae, and how they are made."""
PEERS: dict[str, tuple[str, Callable[[int, int], dict[str, Any]]]] = {
    "TopK": ("TopKTrainingSAE", lambda d_sae, k: {"k": k}),
    "BatchTopK": ("BatchTopKTrainingSAE", lambda d_sae, k: {"k": k}),
    "Matryoshka": (
        "MatryoshkaBatchTopKTrainingSAE",
        lambda d_sae, k: {"k": k, "matryoshka_widths": [d_sae >> i for i in (5, 4, 3, 2, 0)]},
    ),
    "JumpReLU": ("JumpReLUTrainingSAE", lambda d_sae, k: {}),
    "Gated": ("GatedTrainingSAE", lambda d_sae, k: {}),
    "ReLU": ("StandardTrainingSAE", lambda d_sae, k: {}),
}
"""SAELens' class of the same kind, and its own arguments."""


def ours(name: str, x: Tensor, args: argparse.Namespace) -> tuple[Callable[[], Any], Trainer]:
    """Return fastsae's step of a class."""
    kind, options = CLASSES[name]
    torch.manual_seed(0)
    sizes = (args.d, args.d, args.d_sae) if kind == "Transcoder" else (args.d, args.d_sae)
    sae: SAE = getattr(fastsae, kind)(*sizes, args.k, **options)
    # A transcoder reads its target beside x, a gradient SAE the gradient.
    batch = torch.cat([x, x], 1) if kind in ("Transcoder", "GradientSAE") else x
    config = TrainConfig(steps=10_000, batch_size=args.n, progress=False)
    trainer = Trainer(sae, None, config)
    trainer.prepare(batch)
    return lambda: trainer.step(batch), trainer


def theirs(name: str, x: Tensor, args: argparse.Namespace) -> Callable[[], Any] | None:
    """Return SAELens' step of the class of that kind; None without one."""
    if name not in PEERS or import_error("sae_lens"):
        return None
    kind, options = PEERS[name]
    torch.manual_seed(0)
    sae = saelens.module(kind, args.d, args.d_sae, torch.float32, **options(args.d_sae, args.k))
    trainer = saelens.make_trainer(sae, args.n, 10_000, 5e-4)

    def step() -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=9216)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    x = start(args.n, args.d, args.d_sae, args.k).x
    print(f"{'class':14} {'fastsae':>8} {'sae-lens':>8} {'ratio':>6} {'L0':>6}  update")
    for name in args.classes:
        step, trainer = ours(name, x, args)
        peer = theirs(name, x, args)
        ways = {"fastsae": step} | ({} if peer is None else {"sae-lens": peer})
        times: dict[str, list[float]] = {way: [] for way in ways}
        l0 = 0.0
        for round_ in range(args.rounds + 1):
            for way, call in ways.items():
                begin = time.perf_counter()
                out = call()
                if round_:
                    times[way].append(1e3 * (time.perf_counter() - begin))
                if way == "fastsae" and round_ == args.rounds:
                    l0 = float(out.acts.l0())
        middle = {way: statistics.median(found) for way, found in times.items()}
        update = "fused" if isinstance(trainer._update, FusedUpdate) else "autograd"
        other = middle.get("sae-lens")
        shown = f"{other:8.0f} {middle['fastsae'] / other:6.2f}" if other else " " * 15
        print(f"{name:14} {middle['fastsae']:8.0f} {shown} {l0:6.0f}  {update}", flush=True)
        if args.out is not None:
            row = {"class": name, "ms": middle, "l0": l0, "update": update, "times": times}
            row |= {"n": args.n, "d": args.d, "d_sae": args.d_sae, "k": args.k}
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
