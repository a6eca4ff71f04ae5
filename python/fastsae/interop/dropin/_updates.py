"""Passes over a matrix that other libraries do one operation at a time, here block by block.

On the CPU a block of rows stays in the cache while everything is done to it; elsewhere the matrix
is one block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 22
"""Elements of a block. Smaller ones fit a nearer cache, but after every operation on a block all
threads wait for each other, which on a machine that others use costs more than memory does."""


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of tensors that have the same first dimension."""
    first = tensors[0]
    width = max(1, first.numel() // max(1, len(first)))
    rows = max(1, BLOCK // width) if first.device.type == "cpu" else max(1, len(first))
    yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


@torch.no_grad()
def project_(grad: Tensor, W: Tensor, eps: float | None = None) -> None:
    """Remove from every row of `grad [d_sae, d]` its part along that row of W, in place.

    Args:
        grad: [d_sae, d].
        W: [d_sae, d].
        eps: divide by (|row| + eps)^2; None takes the rows of W as unit vectors.
    """
    for g, w in blocks(grad, W):
        along = (g * w).sum(1, keepdim=True)
        if eps is not None:
            along /= (torch.linalg.vector_norm(w, dim=1, keepdim=True) + eps) ** 2
        g.addcmul_(w, along, value=-1)


@torch.no_grad()
def normalize_(W: Tensor) -> None:
    """Divide every row of W by its norm plus the eps of its dtype, in place."""
    eps = torch.finfo(W.dtype).eps
    for (w,) in blocks(W):
        w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True) + eps)


@torch.no_grad()
def signum_(
    p: Tensor, z: Tensor, grad: Tensor, *, lr: float, momentum: float, average: float
) -> None:
    """Do a schedule-free step of sign descent on contiguous tensors of one shape, in place.

        x = p + (1 - 1 / momentum) (z - p),  z -= lr sign(grad),  x += average (z - x)
        p = x + (1 - momentum) (z - x)

    The last two are one interpolation. grad holds its signs afterwards.
    """
    to_z = 1 - (1 - average) * momentum
    for p_, z_, g_ in blocks(p.view(-1), z.view(-1), grad.view(-1)):
        p_.lerp_(z_, 1 - 1 / momentum)
        z_.add_(g_.sign_(), alpha=-lr)
        p_.lerp_(z_, to_z)
