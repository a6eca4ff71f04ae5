"""The learning rate where none is given: a rule fitted to sweeps, see docs/training.md."""

from __future__ import annotations

import math

RATE = 4e-3
"""The best rate of Adam at the sizes below, on activations whose mean squared distance from their
mean is their width."""
D_IN, D_SAE, STEPS = 576, 2304, 256
MOST = 8e-3
"""Above this, runs of few updates became worse too."""


def default_lr(optimizer: str, *, d_in: int, d_sae: int, steps: int) -> float:
    """Return the peak learning rate for an SAE and a run.

        adam       0.004 (d_in / 576)^(-1/2) (d_sae / 2304)^(-1/4) (steps / 256)^(-1/3)
        sgd_sai    0.01

    A row of a matrix moves by about sqrt(d_in) times the rate in an update, whatever the gradient,
    and has norm 1: so the rate falls with the width of the activations. It falls with the length of
    the run, which has more updates to get there, and with the number of latents.

    Args:
        optimizer: as in `TrainConfig`.
        d_in: width of the encoder's input.
        d_sae: number of latents.
        steps: updates of the whole run.
    """
    if optimizer == "sgd_sai":
        return 1e-2
    by_length: float = (steps / STEPS) ** (-1 / 3)
    by_latents: float = (d_sae / D_SAE) ** -0.25
    return math.sqrt(D_IN / d_in) * min(MOST, RATE * by_latents * by_length)
