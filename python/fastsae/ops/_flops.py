"""What `torch.utils.flop_counter.FlopCounterMode` counts for each op.

A multiplication and an addition are two. An encoder counts the whole matmul, 2 n d_in d_sae, as its
dense twin does; a decoder and each of its gradients 2 d for every place of the activations, padding
included, because a formula sees shapes only. Selecting and grouping count 0, as `torch.topk` and
`sort` do; an update counts the gradients of its two matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]


def register(op: str, formula: Callable[..., int]) -> None:
    """Count `op` by `formula`, which gets its arguments with a shape in place of each tensor."""
    register_flop_formula(getattr(torch.ops.fastsae, op))(formula)


def encode(x: Shape, W_enc: Shape, *_: Any, **__: Any) -> int:
    """Matmul with the whole of W_enc."""
    n, d = x
    return 2 * n * d * W_enc[0]


def decode(values: Shape, indices: Shape, offsets: Any, W_dec: Shape, *_: Any, **__: Any) -> int:
    """One row of W_dec per place."""
    return 2 * math.prod(values) * W_dec[1]


def values_grad(grad: Shape, values: Shape, *_: Any, **__: Any) -> int:
    """One dot product per place."""
    return 2 * math.prod(values) * grad[1]


def decode_error(*arguments: Any, **_: Any) -> int:
    """A decode, and one dot product per place."""
    return 2 * decode(*arguments)


def weight_grad(
    values: Shape, offsets: Shape, rows: Shape, slots: Shape, x: Shape, *_: Any, **__: Any
) -> int:
    """One row of x per place of the lists."""
    return 2 * rows[0] * x[1]


def adam_step(*arguments: Any, **_: Any) -> int:
    """The gradients of both matrices."""
    shapes: list[Shape] = [arguments[i] for i in (12, 15, 16, 19)]
    values, grad_output, grad_values, x = shapes
    return 2 * (math.prod(values) * grad_output[1] + math.prod(grad_values) * x[1])
