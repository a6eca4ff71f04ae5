"""Train two SAEs on one stream of batches, in a loop of your own.

    python examples/train_two.py

The stream could just as well come from a model running in the same loop: each batch is made once.
"""

from __future__ import annotations

import torch

import fastsae

D_IN, FEATURES, BATCH, STEPS = 32, 64, 256, 250


def batches(steps: int, seed: int = 0):
    """Yield sums of 3 out of 64 fixed random directions."""
    fixed = torch.Generator().manual_seed(7)
    directions = torch.nn.functional.normalize(torch.randn(FEATURES, D_IN, generator=fixed))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        active = torch.rand(BATCH, FEATURES, generator=generator).topk(3).indices
        strength = 1 + torch.rand(BATCH, 3, generator=generator)
        yield torch.einsum("nk,nkd->nd", strength, directions[active])


def main() -> dict[str, float]:
    """Train, and return the last FVU of each."""
    config = fastsae.TrainConfig(batch_size=BATCH, steps=STEPS, lr=1e-2, progress=False)
    saes = {
        "TopK": fastsae.TopKSAE(D_IN, 2 * FEATURES, k=3),
        "BatchTopK": fastsae.BatchTopKSAE(D_IN, 2 * FEATURES, k=3),
    }
    trainers = {name: fastsae.Trainer(sae, None, config) for name, sae in saes.items()}
    sample = torch.cat(list(batches(8, seed=1)))  # for the scale and the initial biases
    for trainer in trainers.values():
        trainer.prepare(sample)
    last = {}
    for batch in batches(STEPS):
        for name, trainer in trainers.items():
            last[name] = float(trainer.step(batch).fvu)
    for trainer in trainers.values():
        trainer.finish()
    return last


if __name__ == "__main__":
    for name, fvu in main().items():
        print(f"{name:10s} {100 * (1 - fvu):.1f}% of the variance explained")
