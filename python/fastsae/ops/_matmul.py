"""The library's own dense matmul, which codes that are hardly sparse are multiplied with."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae._library import fake, fallback
from fastsae.types import can_look


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    where: Tensor | None = None,
) -> Tensor:
    """Return `a b`, and what is often done to it in the pass that has just written it.

    Args:
        a: [n, k], float32 or float64, of any strides.
        b: [k, m] likewise.
        bias: [m], added.
        relu: then what is negative becomes 0; NaN stays.
        where: [n, m]: then what is at a 0 becomes 0.

    Returns:
        [n, m], without a graph.

    Numerics:
        Sums over k are added up in blocks of up to 512, the same for any number of threads. Without
        AVX2, and on other devices than a CPU, the product is torch's.
    """
    out: Tensor = torch.ops.fastsae.dense_matmul(
        *(None if t is None else t.detach() for t in (a, b, bias, where)), relu
    )
    return out


def where_active(values: Tensor, grad: Tensor) -> Tensor:
    """Return `grad` where `values` is not 0, else 0."""
    if torch.is_grad_enabled() or not can_look(values) or values.dtype != grad.dtype:
        return torch.where(values != 0, grad, 0)
    # The same, which torch does in vectors.
    out: Tensor = torch.ops.aten.hardshrink_backward(grad, values, 0.0)
    return out


@fake("dense_matmul")
def _fake(a: Tensor, b: Tensor, bias: Tensor | None, where: Tensor | None, relu: bool) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@fallback("dense_matmul", slow=False)
def _plain(a: Tensor, b: Tensor, bias: Tensor | None, where: Tensor | None, relu: bool) -> Tensor:
    out = a @ b if bias is None else torch.addmm(bias, a, b)
    if relu:
        out = out.relu_()
    return out if where is None else torch.where(where != 0, out, 0)
