"""Which inputs are worth keeping? Ask a sparse denoising autoencoder how strongly it uses each.

    python examples/quick_selection.py

It takes a minute on one core, and needs scikit-learn.

QuickSelection (Atashgahi et al. 2022, "Quick and robust feature selection", arXiv 2012.00560): a
denoising autoencoder whose two weight matrices are sparse graphs is trained for a few epochs. After
each, the weights closest to zero are dropped and as many grow elsewhere (SET). The strength of an
input is the sum of its absolute weights; the strongest are selected, without any label. They are
compared with as many random inputs, and with those of the largest variance, by the accuracy of
extra trees on held-out rows. Masks over dense matrices stand for the sparse ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

DENSITY, NOISE, DROPOUT, REWIRED = 13, 0.2, 0.2, 0.2
LR, MOMENTUM, DECAY, BATCH = 0.01, 0.9, 1e-5, 100


class Selected(NamedTuple):
    """Accuracy with inputs selected in three ways, and with all; one number for each seed."""

    quick: list[float]
    variance: list[float]
    random: list[float]
    every: list[float]
    informative: list[float]
    """Share of the selected inputs that are informative; nan where that is not known."""


def graph(n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    """Return weights and mask of a random sparse layer, `[n_in, n_out]`."""
    mask = torch.rand(n_in, n_out) < DENSITY * (n_in + n_out) / (n_in * n_out)
    return torch.randn(n_in, n_out) / 10 * mask, mask


def rewire(weight: Tensor, mask: Tensor) -> None:
    """Drop the share REWIRED of weights of each sign that is closest to zero, and grow as many."""
    before = int(mask.sum())
    for sign in (1, -1):
        size = torch.where(mask & (weight * sign > 0), weight.abs(), torch.inf)
        count = int(REWIRED * size.isfinite().sum())
        mask.view(-1)[size.flatten().topk(count, largest=False).indices] = False
    free = (~mask).flatten().nonzero()[:, 0]
    new = free[torch.randperm(len(free))[: before - int(mask.sum())]]
    weight.mul_(mask)
    mask.view(-1)[new] = True
    weight.view(-1)[new] = torch.randn(len(new)) / 10


def strengths(x: Tensor, hidden: int, epochs: int, seed: int) -> Tensor:
    """Return the strength of every input of rows `x: [n, d]`: `[d]`."""
    torch.manual_seed(seed)
    layers = [graph(x.shape[1], hidden), graph(hidden, x.shape[1])]
    weights = [weight for weight, _ in layers]
    biases = [torch.zeros(hidden), torch.zeros(x.shape[1])]
    speeds = [torch.zeros_like(p) for p in (*weights, *biases)]
    noisy = x + NOISE * torch.randn_like(x)
    strength = weights[0].abs().sum(1)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            h = torch.sigmoid(noisy[rows] @ weights[0] + biases[0])
            kept = (torch.rand_like(h) >= DROPOUT) / (1 - DROPOUT)
            e = ((h * kept) @ weights[1] + biases[1] - x[rows]) / len(rows)
            back = e @ weights[1].t() * kept * h * (1 - h)
            grads = (noisy[rows].t() @ back, (h * kept).t() @ e, back.sum(0), e.sum(0))
            for p, speed, grad in zip((*weights, *biases), speeds, grads, strict=True):
                p.add_(speed.mul_(MOMENTUM).sub_(grad + DECAY * p, alpha=LR))
            for (weight, mask), speed in zip(layers, speeds, strict=False):
                weight.mul_(mask)
                speed.mul_(mask)
        strength = weights[0].abs().sum(1)
        if epoch + 1 < epochs:
            for weight, mask in layers:
                rewire(weight, mask)
    return strength


def accuracy(x: Any, y: Any, x_new: Any, y_new: Any, inputs: Tensor, seed: int) -> float:
    """Return the accuracy of extra trees on held-out rows, with some of the inputs."""
    from sklearn.ensemble import ExtraTreesClassifier

    trees = ExtraTreesClassifier(n_estimators=50, random_state=seed)
    trees.fit(x[:, inputs].numpy(), y)
    return float(trees.score(x_new[:, inputs].numpy(), y_new))


def datasets() -> dict[str, tuple[Any, Any, int, int]]:
    """Return rows, labels, how many inputs to select, and how many come first as informative."""
    from sklearn.datasets import load_digits, make_classification

    digits = load_digits(return_X_y=True)
    # As Madelon is made: 5 inputs say the class, 15 are sums of them, the others are noise.
    madelon = make_classification(
        n_samples=2600, n_features=200, n_informative=5, n_redundant=15, n_clusters_per_class=16,
        class_sep=2.0, shuffle=False, random_state=0,
    )  # fmt: skip
    return {"digits": (*digits, 20, 0), "Madelon-like": (*madelon, 20, 20)}


def main(seeds: int = 3, hidden: int = 1000, epochs: int = 10) -> dict[str, Selected]:
    """Return the accuracies on both data sets."""
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    found = {}
    for name, (x, y, k, informative) in datasets().items():
        out = Selected([], [], [], [], [])
        x, x_new, y, y_new = train_test_split(x, y, test_size=0.2, random_state=42, stratify=y)
        scaler = StandardScaler().fit(x)
        variance = torch.tensor(x).var(0)
        x, x_new = (torch.tensor(scaler.transform(part)).float() for part in (x, x_new))
        for seed in range(seeds):
            quick = strengths(x, hidden, epochs, seed).topk(k).indices
            chance = torch.randperm(x.shape[1])[:k]
            every = torch.arange(x.shape[1])
            for scores, inputs in zip(
                out, (quick, variance.topk(k).indices, chance, every), strict=False
            ):
                scores.append(accuracy(x, y, x_new, y_new, inputs, seed))
            share = float((quick < informative).float().mean()) if informative else float("nan")
            out.informative.append(share)
        found[name] = out
    return found


if __name__ == "__main__":
    for name, out in main().items():
        for way, scores in out._asdict().items():
            print(f"{name}: {way} {[round(score, 3) for score in scores]}")
