"""What storing activations as int8, float16 or bfloat16 costs, against float32.

    python -m bench.stored_dtypes [--model smollm2] [--site resid_post.15] [--rows 32768]

Rows of the text of Python's `help()` are harvested once, as float32 and with attention sinks, and
rounded as `harvest` rounds them. Reported for each dtype are

    error     |x - x'| / |x|, the median of ordinary rows and of outliers (above 3 medians of norm)
    rounding  sum |x - x'|^2 / sum |x - mean|^2 over ordinary rows: the FVU of the rounding alone
    FVU       on held-out float32 rows, of an SAE trained on ordinary rounded rows, by seed
"""

from __future__ import annotations

import argparse
import random
import tempfile

import torch
from torch import Tensor

from fastsae import TopKSAE, TrainConfig, Trainer
from fastsae.data import ActivationStore, harvest
from fastsae.data.rounding import from_int8, to_int8
from fastsae.models import load_model
from fastsae.models.text import python_topics


def rounded(x: Tensor, dtype: str) -> Tensor:
    """Return float32 rows as they come back from a store."""
    if dtype == "int8":
        q, scale = to_int8(x)
        return from_int8(q, scale.unsqueeze(1), [x.shape[1]])
    return x.to(getattr(torch, dtype)).float()


def trained(x: Tensor, val: Tensor, args: argparse.Namespace, seed: int) -> float:
    """Return the FVU of `val` of an SAE trained on x."""
    torch.manual_seed(seed)
    sae = TopKSAE(x.shape[1], args.d_sae, k=32)
    config = TrainConfig(steps=args.steps, batch_size=512, seed=seed, progress=False)
    Trainer(sae, x, config).fit()
    with torch.no_grad():
        return float((val - sae(val)).square().sum() / (val - val.mean(0)).square().sum())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--site", default="resid_post.15")
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--d-sae", type=int, default=2304)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    texts = python_topics()
    random.Random(0).shuffle(texts)
    with tempfile.TemporaryDirectory() as folder:
        harvest(
            model, tokenizer, texts, args.site, folder, drop_prefix=0,
            max_tokens=args.rows, dtype="float32",
        )  # fmt: skip
        rows, val = (ActivationStore(folder, split=split).rows() for split in ("train", "val"))
    usual = 3 * rows.norm(dim=1).median()
    x, val = rows[rows.norm(dim=1) <= usual], val[val.norm(dim=1) <= usual]
    far = rows[rows.norm(dim=1) > usual]
    print(f"{len(x)} ordinary rows, {len(far)} outliers, {len(val)} held out")
    peaks = [r.abs().amax(1) / r.square().mean(1).sqrt() for r in (x, far)]
    for name, peak in zip(("ordinary", "outliers"), peaks, strict=True):
        print(f"max |x| / rms, {name}: median {peak.median():.1f}, max {peak.max():.1f}")
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        errors = [
            float(((r - rounded(r, dtype)).norm(dim=1) / r.norm(dim=1)).median()) for r in (x, far)
        ]
        y = rounded(x, dtype)
        rounding = float((x - y).square().sum() / (x - x.mean(0)).square().sum())
        far_less = far.clone().scatter(1, far.abs().topk(2).indices, 0)
        small = rounded(far, dtype).scatter(1, far.abs().topk(2).indices, 0)
        lost = float(((far_less - small).norm(dim=1) / far_less.norm(dim=1)).median())
        fvu = [round(trained(y, val, args, seed), 4) for seed in args.seeds]
        print(
            f"{dtype}: error {errors[0]:.2e}, outliers {errors[1]:.2e} ({lost:.2f} without their "
            f"two largest entries), rounding {rounding:.2e}, FVU {fvu}",
            flush=True,
        )


if __name__ == "__main__":
    main()
