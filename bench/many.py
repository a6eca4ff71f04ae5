"""Time several SAEs on one reading of the data against the sum of their steps and one reading.

    python -m bench.many STORE [--site resid_post.15] [--steps 100] [--rounds 3] [--threads 2]

Eight TopK SAEs of four widths and two k. Rounds alternate between `train_many`, the eight trainers
one after the other on rows in memory, which leaves reading out, and reading the batches alone.
Reported are medians.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastsae import TopKSAE, TrainConfig, Trainer
from fastsae.data import ActivationStore
from fastsae.train import Run, train_many

BATCH = 512


def make(width: int, d_sae: int, k: int) -> Callable[[], TopKSAE]:
    """Return what makes an SAE."""

    def build() -> TopKSAE:
        torch.manual_seed(0)
        return TopKSAE(width, d_sae, k)

    return build


def main() -> None:
    """Time all and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("--site", default="resid_post.15")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    store = ActivationStore(args.store, (args.site,))
    config = TrainConfig(
        steps=args.steps,
        batch_size=BATCH,
        log_every=args.steps,
        weight_init="random",
        progress=False,
    )
    sizes = list(itertools.product((1152, 2304, 4608, 6912), (16, 32)))
    makers = {f"{d_sae}-{k}": make(store.d_in, d_sae, k) for d_sae, k in sizes}
    seconds: dict[str, list[float]] = {"many": [], "steps": [], "read": []}
    for _ in range(args.rounds):
        runs = [Run(name, build, config) for name, build in makers.items()]
        begun = time.perf_counter()
        together = train_many(runs, store, progress=False)
        seconds["many"].append(time.perf_counter() - begun)
        # The start of each run is not part of its steps.
        own = sum(result.result.final["seconds"] for result in together.values() if result.result)
        seconds["steps"].append(_alone(makers, store, config, together))
        begun = time.perf_counter()
        for _batch in itertools.islice(store.batches(BATCH, seed=0), args.steps):
            pass
        seconds["read"].append(time.perf_counter() - begun)
        print(f"own seconds within train_many: {own:.2f}")
    middle = {name: statistics.median(t) for name, t in seconds.items()}
    for name, t in seconds.items():
        print(f"{name:6} {middle[name]:7.2f} s ({min(t):.2f}-{max(t):.2f})")
    print(f"many / (steps + read) = {middle['many'] / (middle['steps'] + middle['read']):.3f}")


def _alone(makers: dict, store: ActivationStore, config: TrainConfig, expected: dict) -> float:  # type: ignore[type-arg]
    """Return the seconds of all runs one after the other, starts included, without reading."""
    total = 0.0
    for name, build in makers.items():
        begun = time.perf_counter()
        trainer = Trainer(build(), store, config)
        trainer.prepare()
        total += time.perf_counter() - begun
        rows: list[Tensor] = list(itertools.islice(store.batches(BATCH, seed=0), config.steps))
        begun = time.perf_counter()
        for x in rows:
            trainer.step(x)
        sae = trainer.finish()
        total += time.perf_counter() - begun
        assert torch.equal(sae.W_dec, expected[name].sae.W_dec), name
    return total


if __name__ == "__main__":
    main()
