"""Which features does a joint-embedding objective learn first? A deep linear model tells.

    python examples/jepa_influence.py

It takes a few seconds on one core.

    JEPA  |V W x - stop_gradient(W y)|^2        predicts the representation W y of y from that of x
    MAE   |V W x - y|^2                         predicts y itself
    W = W_L ... W_1, all linear, started small

Features are pairs (x_i, y_i) of covariance lambda_i and regression coefficient rho_i = lambda_i /
var(x_i): their influence. Littwin et al. 2024, "How JEPA avoids noisy features" (arXiv 2407.03475):
MAE learns features in the order of lambda, whatever rho; JEPA prefers those of large rho among
equals, more so the deeper the encoder, and may turn the order of MAE around.
"""

from __future__ import annotations

import torch
from torch import Tensor

EQUAL = {"lambda": (1.0, 1.0), "rho": (0.75, 1.5)}
INVERTED = {"lambda": (1.1, 1.0), "rho": (0.75, 1.5)}
"""Two features each; the second has the larger influence, in INVERTED the smaller covariance."""


def covariances(features: dict[str, tuple[float, float]], seeds: int) -> tuple[Tensor, Tensor]:
    """Return E[x x^T] and E[y x^T] of 20,000 samples for every seed: `[seeds, 2, 2]`."""
    cov, rho = (torch.tensor(features[name], dtype=torch.float64) for name in ("lambda", "rho"))
    xx, yx = [], []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(2, 20_000, 2, generator=generator, dtype=torch.float64)
        x = noise[0] * (cov / rho).sqrt()
        y = rho * x + 0.5 * noise[1]
        xx.append(x.t() @ x / len(x))
        yx.append(y.t() @ x / len(x))
    return torch.stack(xx), torch.stack(yx)


def product(layers: list[Tensor]) -> Tensor:
    """Return W_L ... W_1 of matrices in the order W_1 .. W_L, the identity for none."""
    out = torch.eye(2, dtype=torch.float64)
    for layer in layers:
        out = layer @ out
    return out


def gradients(
    objective: str, V: Tensor, layers: list[Tensor], xx: Tensor, yx: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return those of half the objective, for V and for each layer.

    With R = V W E[x x^T] - E[target x^T], that of V is R W^T, and that of W is V^T R.
    """
    W = product(layers)
    R = V @ W @ xx - (yx if objective == "MAE" else W @ yx)
    by_W = V.mT @ R
    by_layers = [
        product(layers[i + 1 :]).mT @ by_W @ product(layers[:i]).mT for i in range(len(layers))
    ]
    return R @ W.mT, by_layers


def learned_at(
    objective: str,
    depth: int,
    features: dict[str, tuple[float, float]],
    seeds: int = 3,
    start: float = 0.3,
    lr: float = 0.02,
    steps: int = 50_000,
) -> Tensor:
    """Return the time at which each feature is half learned: `[seeds, 2]`.

    Gradient descent with small steps, from layers that are `start` times the identity.
    """
    xx, yx = covariances(features, seeds)
    eye = torch.eye(2, dtype=torch.float64).expand(seeds, 2, 2)
    layers, V = [start * eye for _ in range(depth)], start * eye
    learned = torch.full((seeds, 2), torch.inf, dtype=torch.float64)
    rho = torch.tensor(features["rho"], dtype=torch.float64)
    for step in range(steps):
        W = product(layers)
        known = torch.diagonal(V @ W if objective == "MAE" else V, dim1=1, dim2=2)
        # V W of MAE and V of JEPA both end at the regression coefficients.
        reached = (known >= start + (rho - start) / 2) & learned.isinf()
        learned[reached] = step * lr
        if bool(learned.isfinite().all()):
            break
        by_V, by_layers = gradients(objective, V, layers, xx, yx)
        V = V - lr * by_V
        layers = [layer - lr * by for layer, by in zip(layers, by_layers, strict=True)]
    return learned


def main(depths: tuple[int, ...] = (1, 2, 3), seeds: int = 3) -> dict[tuple[str, str, int], Tensor]:
    """Return how many times as long the feature of small influence takes: `[seeds]`, for both
    pairs of features, both objectives and all depths."""
    found = {}
    for name, features in (("equal", EQUAL), ("inverted", INVERTED)):
        for objective in ("MAE", "JEPA"):
            for depth in depths:
                times = learned_at(objective, depth, features, seeds)
                found[name, objective, depth] = times[:, 0] / times[:, 1]
    return found


if __name__ == "__main__":
    for (name, objective, depth), ratio in main().items():
        print(
            f"{name:9} {objective:5} depth {depth}: the feature of small influence takes "
            f"{float(ratio.mean()):.2f} times as long ({float(ratio.min()):.2f} to "
            f"{float(ratio.max()):.2f})"
        )
