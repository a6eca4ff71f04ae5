"""What a run does where nobody says: rules fitted to sweeps, see docs/training.md."""

from __future__ import annotations

import math

RATE = 4e-3
"""The best rate of Adam at the sizes below, on activations whose mean squared distance from their
mean is their width."""
D_IN, D_SAE, STEPS = 576, 2304, 256
BATCH = {"cpu": 1024, "cuda": 4096}
"""Rows of a batch by kind of device: as many as are worth it before the reading and writing of
parameters is a small part of an update."""
UPDATES = 256
"""Fewer updates than this are worse than smaller batches."""


def default_lr(optimizer: str, *, d_in: int, d_sae: int, steps: int) -> float:
    """Return the peak learning rate for an SAE and a run.

        adam       0.004 (d_in / 576)^(-1/2) (max(1, d_sae / 2304) max(1, steps / 256))^(-1/4)
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
    by_length: float = max(1.0, steps / STEPS) ** -0.25
    by_latents: float = max(1.0, d_sae / D_SAE) ** -0.25
    return RATE * math.sqrt(D_IN / d_in) * by_latents * by_length


def default_dead_after(d_sae: int, k: float | None, *, tokens: int) -> int:
    """Return after how many tokens without firing a latent is dead.

        min(10^7, max(tokens / 40, 20 d_sae / k))

    A fortieth of the run is early enough for AuxK to bring it back; in 20 d_sae / k tokens a latent
    fires 20 times on average.

    Args:
        d_sae: number of latents.
        k: active latents per token; None: nobody knows, and 32 counts instead.
        tokens: of the whole run.
    """
    return min(10_000_000, max(tokens // 40, int(20 * d_sae / (k or 32)), 1))


def default_batch_size(device: str, *, rows: int | None, tokens: int | None) -> int:
    """Return the rows of a batch: a power of two.

        min(1024 on a CPU, 4096 on a GPU, tokens / 256, rows),   but at least 64 of what there is

    Args:
        device: its type, cpu or cuda.
        rows: of one pass over the data; None: nobody knows.
        tokens: of the whole run; None: the number of updates is given instead.
    """
    size = BATCH.get(device, BATCH["cuda"])
    if tokens is not None:
        size = min(size, max(64, tokens // UPDATES))
    if rows is not None:
        size = min(size, max(1, rows))
    power: int = 2 ** int(math.log2(size))
    return power
