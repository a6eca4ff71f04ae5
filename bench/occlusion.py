"""Two toys in which good reconstructions hide what an SAE did not learn.

    python -m bench.occlusion [--seeds 3]

Occlusion: x is the sum of a vector out of 24 of norm 1 and one out of 24 others of a smaller norm,
all of random directions. Which share of the values of each attribute has a latent of its own (F1 of
0.5 or more), in a ReLU SAE with a latent for each?

Over-splitting: x is drawn from two isotropic Gaussians. A ReLU SAE of many latents is compared with
one of two latents, trained alike: whose loss is lower, and what do the latents of the larger one
stand for?

Source: Makelov et al. 2024 (arXiv 2405.08366), section 5. Sizes are ours.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

import fastsae
from fastsae.analysis import Splitting, attribute_f1, share_found, splitting
from fastsae.eval import fvu

D, VALUES, ROWS, SPLIT = 32, 24, 8192, 64
RATIOS = (1.0, 0.7, 0.5, 0.3, 0.2)
COEFFICIENT = 2.0


def train(x: Tensor, sae: fastsae.ReLUSAE, seed: int, epochs: int = 60) -> fastsae.ReLUSAE:
    """Return the SAE trained on x."""
    config = fastsae.TrainConfig(
        epochs=epochs, batch_size=512, lr=2e-3, seed=seed, compute_dtype="float32", progress=False
    )
    fastsae.Trainer(sae, x, config).fit()
    return sae.eval()


def units(n: int, generator: torch.Generator) -> Tensor:
    """Return n random directions `[n, D]`."""
    x = torch.randn(n, D, generator=generator)
    return torch.nn.functional.normalize(x, dim=1)


def occlusion(ratio: float, seed: int) -> tuple[float, float, float]:
    """Return the share of values found of the larger and the smaller attribute, and the FVU."""
    g = torch.Generator().manual_seed(seed)
    vectors = units(VALUES, g), ratio * units(VALUES, g)
    labels = [torch.randint(VALUES, (ROWS,), generator=g) for _ in vectors]
    x = vectors[0][labels[0]] + vectors[1][labels[1]]
    torch.manual_seed(seed)
    sae = train(x, fastsae.ReLUSAE(d_in=D, d_sae=2 * VALUES, coefficient=COEFFICIENT), seed)
    with torch.no_grad():
        active, x_hat = sae.encode(x) > 0, sae(x)
    large, small = (share_found(attribute_f1(active, v, VALUES)) for v in labels)
    return large, small, fvu(x, x_hat)


def total_loss(sae: fastsae.ReLUSAE, x: Tensor) -> float:
    """Return the loss that a `ReLUSAE` is trained on, of its own units: see `PenalizedSAE`."""
    unit = (x - x.mean(0)).square().mean().sqrt()
    with torch.no_grad():
        f = sae.encode(x) * sae.W_dec.norm(dim=1)
        error = (sae(x) - x).square().sum(1).mean() / unit**2
        return float((error + COEFFICIENT * f.sum(1).mean() / unit) / D)


def two_gaussians(d_sae: int, seed: int) -> tuple[float, Splitting]:
    """Return the loss of an SAE of some latents, and how one of the two values is shared out."""
    g = torch.Generator().manual_seed(seed)
    means = 5 * units(2, g)
    label = torch.randint(2, (ROWS,), generator=g)
    x = means[label] + torch.randn(ROWS, D, generator=g) * 0.6
    torch.manual_seed(seed)
    sae = fastsae.ReLUSAE(d_in=D, d_sae=d_sae, coefficient=COEFFICIENT)
    train(x, sae, seed)
    active = sae.encode(x).detach() > 0
    return total_loss(sae, x), splitting(active, label == 1)


def spread(values: Sequence[float]) -> str:
    """Return mean and range of some numbers."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    for ratio in RATIOS:
        large, small, left = zip(*(occlusion(ratio, seed) for seed in seeds), strict=True)
        print(
            f"norms 1 and {ratio}: found of the larger {spread(large)}, of the smaller "
            f"{spread(small)}, FVU {spread(left)}",
            flush=True,
        )
    for d_sae in (2, SPLIT):
        losses, splits = zip(*(two_gaussians(d_sae, seed) for seed in seeds), strict=True)
        print(f"two Gaussians, {d_sae} latents: loss {spread(losses)}", flush=True)
        for what in ("latents", "best_f1", "recall", "overlap", "covered"):
            print(f"    {what} {spread([getattr(x, what) for x in splits])}", flush=True)


if __name__ == "__main__":
    main()
