"""Measure what rounding to bfloat16 costs: `python -m bench.precision FILE`.

    python -m bench.precision FILE                      # both factors of the encoder's matmul
    python -m bench.precision FILE --of decode_dtype    # the rows that the decoder reads

FILE is safetensors with `acts` [n, d] and, in its metadata, `n_train`: the number of training rows;
the rest is held out. Rows above 3 times the median norm are left out. Every seed trains once with
each dtype, and all else is float32; the FVU is measured with float32 inference on the held-out
rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastsae import BatchTopKSAE, TopKSAE, TrainConfig, Trainer

DTYPES = ("float32", "bfloat16")
SETTINGS = ("compute_dtype", "decode_dtype")


def main() -> None:
    """Train, and print one table."""
    parser = argparse.ArgumentParser(description="float32 against bfloat16")
    parser.add_argument("file", type=Path)
    parser.add_argument("--of", default=SETTINGS[0], choices=SETTINGS, help="what is rounded")
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
            for dtype in DTYPES:
                torch.manual_seed(seed)
                sae = cls(d_in, arguments.expansion * d_in, k=32)
                settings: dict[str, Any] = {"compute_dtype": "float32", arguments.of: dtype}
                config = TrainConfig(
                    lr=8e-4,
                    batch_size=512,
                    epochs=16,
                    warmup_steps=50,
                    decay_fraction=0.3,
                    seed=seed,
                    progress=False,
                    **settings,
                )
                fvu.append(Trainer(sae, train, config, val=val).fit().final["val_fvu"])
            change = fvu[1] / fvu[0] - 1
            row = f"| {cls.__name__} | {seed} | {fvu[0]:.4f} | {fvu[1]:.4f} | {change:+.2%} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
