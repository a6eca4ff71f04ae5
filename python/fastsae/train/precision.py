"""What a run rounds, and what it refuses to compute with."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import _library
from fastsae.nn import SAE
from fastsae.train.config import TrainConfig


def compute_dtype(sae: SAE, config: TrainConfig) -> torch.dtype | None:
    """Return what the encoder's matmul rounds its factors to; None: nothing is rounded."""
    if config.compute_dtype == "float32" or sae.W_enc_rows.dtype != torch.float32:
        return None
    bf16 = config.compute_dtype == "bfloat16" or _multiplies_bf16(sae.W_enc_rows.device)
    return torch.bfloat16 if bf16 else None


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _library.has_bf16()


def converts_weights(device: torch.device) -> bool:
    """Return whether the encoder there converts W_enc as a whole before it multiplies."""
    return device.type == "cuda"


def bad_rows(x: Tensor) -> int:
    """Return how many rows of `x: [n, d]` hold NaN or Inf; on a GPU this waits for the device.

    A finite sum proves that there is none, so the usual cost is one read of `x`.
    """
    total = x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return 0 if bool(total.isfinite()) else int((~x.isfinite().all(1)).sum())
