"""Stochastic rounding to bfloat16 in plain torch, bit for bit as csrc/dither.h."""

from __future__ import annotations

import torch
from torch import Tensor

_M32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15


def _signed(x: int) -> int:
    """Return the int64 with the lowest 64 bits of `x`."""
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x


def _shifted(x: Tensor, by: int) -> Tensor:
    """Return int64 `x` shifted right, without its sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def dither(rows: int, columns: int, seed: int, step: int, matrix: int) -> Tensor:
    """Return the random bits of a matrix in one step: `[rows, columns]` int64, below 2^32.

    The lower half rounds the first average, the upper one the second.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        seed: of the run.
        step: from 1.
        matrix: 0 for W_enc, 1 for W_dec.

    Source: keys by the finalizer of SplitMix64 (Steele et al. 2014), bits by that of MurmurHash3.
    """
    whole = _mixed(torch.tensor(_signed(seed + _GOLDEN)))
    whole = _mixed(whole + torch.tensor(_signed(step * _GOLDEN)))
    row = 2 * torch.arange(rows) + matrix
    key = _mixed(whole + row * _signed(_GOLDEN)).unsqueeze(1)
    x = torch.arange(columns) ^ (key & _M32)
    x = ((x ^ (x >> 16)) * 0x85EBCA6B & _M32) ^ _shifted(key, 32)
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _M32
    return x ^ (x >> 16)


def round_stochastically(x: Tensor, noise: Tensor) -> Tensor:
    """Return float32 `x` in bfloat16, up or down such that the mean over the noise is `x`.

    Args:
        x: any shape.
        noise: like `x`, int64 in [0, 2^16).
    """
    bits = x.contiguous().view(torch.int32).long() & _M32
    up = torch.where(x.isnan(), bits | 0x400000, bits + noise) >> 16
    return (((up + 0x8000) & 0xFFFF) - 0x8000).to(torch.int16).view(torch.bfloat16)
