"""Measure what a bfloat16 encoder matmul costs: `python -m bench.precision FILE`.

FILE is safetensors with `acts` [n, d] and, in its metadata, `n_train`: the number of training rows;
the rest is held out. Rows above 3 times the median norm are left out. Every seed trains once with
each matmul; the FVU is measured with float32 inference on the held-out rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import safe_open

from fastsae import BatchTopKSAE, TopKSAE, TrainConfig, Trainer

PRODUCTS = ("float32", "bfloat16")


def main() -> None:
    """Train, and print one table."""
    parser = argparse.ArgumentParser(description="float32 against bfloat16 encoder products")
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--expansion", type=int, default=4)
    arguments = parser.parse_args()
    with safe_open(arguments.file, "pt") as f:
        acts, n_train = f.get_tensor("acts").float(), int(f.metadata()["n_train"])
    norm = acts.norm(dim=1)
    usual = norm <= 3 * norm[:n_train].median()
    train, val = acts[:n_train][usual[:n_train]], acts[n_train:][usual[n_train:]]
    d_in = acts.shape[1]
    print("| SAE | seed | FVU, float32 | FVU, bfloat16 | difference |\n|---|---|---|---|---|")
    for cls in (TopKSAE, BatchTopKSAE):
        for seed in range(arguments.seeds):
            fvu = []
            for product in PRODUCTS:
                torch.manual_seed(seed)
                sae = cls(d_in, arguments.expansion * d_in, k=32)
                config = TrainConfig(
                    lr=8e-4,
                    batch_size=512,
                    epochs=16,
                    warmup_steps=50,
                    decay_fraction=0.3,
                    seed=seed,
                    compute_dtype=product,
                    progress=False,
                )
                fvu.append(Trainer(sae, train, config, val=val).fit().final["val_fvu"])
            change = fvu[1] / fvu[0] - 1
            print(f"| {cls.__name__} | {seed} | {fvu[0]:.4f} | {fvu[1]:.4f} | {change:+.2%} |")


if __name__ == "__main__":
    main()
