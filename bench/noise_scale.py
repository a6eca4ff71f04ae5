"""Measure the gradient noise scale of a TopK SAE: the batch beyond which averaging stops paying.

    python -m bench.noise_scale STORE [--site resid_post.15] [--d-sae 2304] [--at 16 64 256 1024]

    B = tr(Sigma) / |G|^2

G is the gradient of the loss over all tokens and Sigma the covariance of that of one token: with
far fewer tokens than B a batch twice as large is worth twice as many steps, with far more it is
worth no more than the small one. Estimated without bias from the squared norms of
gradients of batches of 256 and 8,192 tokens, at several points of a run.

Source: McCandlish et al. 2018, "An empirical model of large-batch training" (arXiv 1812.06162),
appendix A.1.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from torch import Tensor

from fastsae import TopKSAE, TrainConfig, Trainer
from fastsae.data import ActivationStore

SMALL, LARGE, REPEATS = 256, 8192, 4


def gradients(sae: TopKSAE, x: Tensor, variance: float) -> Tensor:
    """Return the gradient of both matrices for rows `x`, flat, of the error per token."""
    sae.zero_grad()
    out = sae.training_loss(x)
    (out.reconstruction - x).square().sum().div(len(x) * variance).backward()
    return torch.cat([p.grad.flatten() for p in (sae.W_enc_rows, sae.W_dec) if p.grad is not None])


def noise_scale(sae: TopKSAE, rows: Tensor, seed: int) -> tuple[float, float, float]:
    """Return B, and the estimates of tr(Sigma) and |G|^2, from rows in the units of the module."""
    generator = torch.Generator().manual_seed(seed)
    variance = float((rows - rows.mean(0)).square().sum(1).mean())
    small, large = [], []
    for _ in range(REPEATS):
        x = rows[torch.randperm(len(rows), generator=generator)[:LARGE]]
        parts = [gradients(sae, part, variance) for part in x.split(SMALL)]
        small += [float(g.square().sum()) for g in parts]
        large.append(float(torch.stack(parts).mean(0).square().sum()))
    of_small, of_large = statistics.mean(small), statistics.mean(large)
    sigma = (of_small - of_large) / (1 / SMALL - 1 / LARGE)
    squared = (LARGE * of_large - SMALL * of_small) / (LARGE - SMALL)
    return sigma / squared, sigma, squared


def main() -> int:
    """Parse arguments, train, measure on the way, print."""
    parser = argparse.ArgumentParser(description="measure the gradient noise scale")
    parser.add_argument("store")
    parser.add_argument("--site", default="resid_post.15")
    parser.add_argument("--d-sae", type=int, default=2304)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--at", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = ActivationStore(args.store, args.site).rows()
    norm = rows.norm(dim=1)
    rows = rows[norm <= 3 * norm.median()]
    sae = TopKSAE(rows.shape[1], args.d_sae, args.k)
    steps = max(args.at)
    trainer = Trainer(sae, rows, TrainConfig(steps=steps, batch_size=args.batch, decay_fraction=0))
    trainer.prepare()
    scaled = trainer.scaler.scale(rows)
    print("| update | FVU | noise scale, tokens | tr(Sigma) | G^2 |\n|---|---|---|---|---|")
    for step, x in enumerate(rows[torch.randperm(len(rows))].repeat(9, 1).split(args.batch), 1):
        out = trainer.step(x)
        if step in args.at:
            scale, sigma, squared = noise_scale(sae, scaled, step)
            line = (
                step,
                f"{float(out.fvu):.3f}",
                f"{scale:,.0f}",
                f"{sigma:.3g}",
                f"{squared:.3g}",
            )
            print("| " + " | ".join(map(str, line)) + " |", flush=True)
        if step == steps:
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
