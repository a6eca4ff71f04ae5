"""Every differentiable op as a function of its floating tensors, beside a dense twin.

What is selected is fixed by the data, which have no ties: the twin multiplies with that mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae import SparseActs, ops
from fastsae.types import LatentLists

N, D, F, K = 3, 4, 9, 2


@dataclass(frozen=True)
class Case:
    """`op(*inputs)` and `dense(*inputs)` are the same function."""

    name: str
    inputs: tuple[Tensor, ...]
    op: Callable[..., Tensor]
    dense: Callable[..., Tensor]

    def __str__(self) -> str:
        return self.name


def pre_activations(x: Tensor, W: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return the dense matrix that the encoders select from."""
    return (x - c) @ W.t() + b


def largest_of_rows(pre: Tensor, k: int = K) -> Tensor:
    """Return the mask of the k largest entries of every row."""
    return torch.zeros_like(pre).scatter(-1, pre.topk(k).indices, 1.0)


def largest(pre: Tensor, budget: int) -> Tensor:
    """Return the mask of the `budget` largest positive entries of the matrix."""
    kept = pre.flatten().topk(budget).values.amin()
    return ((pre >= kept) & (pre > 0)).to(pre)


def acts(layout: str) -> SparseActs:
    """Return a fixed pattern with an inactive entry and, in the variable layout, padding."""
    indices = torch.tensor([[0, 3], [1, 8], [3, 8]], dtype=torch.int32)
    values = torch.tensor([[0.7, -1.2], [0.0, 0.4], [1.5, 0.9]], dtype=torch.float64)
    if layout == "fixed":
        return SparseActs(values, indices, None, F)
    padded = torch.cat([values.flatten(), values.new_zeros(2)])
    columns = torch.cat([indices.flatten(), indices.new_zeros(2)])
    return SparseActs(padded, columns, torch.tensor([0, 1, 4, 6], dtype=torch.int32), F)


def _places(a: SparseActs) -> tuple[Tensor, Tensor, Tensor]:
    """Return row and column of every entry, and 1 for the active ones; by hand."""
    offsets = [0, 2, 4, 6] if a.offsets is None else a.offsets.tolist()
    rows = torch.tensor([i for i in range(N) for _ in range(offsets[i + 1] - offsets[i])])
    rows = torch.cat([rows, rows.new_zeros(a.values.numel() - len(rows))])
    return rows, a.indices.flatten().long(), (a.values.flatten() != 0).double()


def cases() -> list[Case]:
    """Return the table; the same numbers every time."""
    g = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, W, b, c, z = randn(N, D), randn(F, D), randn(F), randn(D), randn(N, F)
    encoder = (x, W, b, c)
    pre = pre_activations(*encoder)
    grad = torch.linspace(-1, 2, D, dtype=torch.float64)
    W_dec = torch.linspace(0.1, 2, F * D, dtype=torch.float64).sin().view(F, D)
    theta = torch.linspace(0.1, 0.6, F, dtype=torch.float64)
    m = torch.tensor([2, 0, 1, 1, 3, 1, 0, 2, 1], dtype=torch.int32)

    def of_columns(pre: Tensor) -> Tensor:
        place = pre.argsort(0, descending=True).argsort(0)
        return ((place < m) & (pre > 0)).to(pre)

    def fixed(found: ops.TopK) -> Tensor:
        return SparseActs(found.values, found.indices, None, F).to_dense()

    def selected(mask: Tensor) -> Callable[..., Tensor]:
        return lambda z: z * mask

    def encoded(mask: Tensor) -> Callable[..., Tensor]:
        return lambda *inputs: pre_activations(*inputs) * mask

    table = [
        Case("topk", (z,), lambda z: fixed(ops.topk(z, K)), selected(largest_of_rows(z))),
        Case(
            "batch_topk",
            (z,),
            lambda z: ops.batch_topk(z, 1.7).acts.to_dense(),
            selected(largest(z, 5)),
        ),
        Case(
            "feature_topk",
            (z,),
            lambda z: ops.feature_topk(z, m, capacity=12).to_dense(),
            selected(of_columns(z)),
        ),
        Case(
            "threshold_select",
            (z,),
            lambda z: ops.threshold_select(z, theta, 20).to_dense(),
            selected((z > theta).to(z)),
        ),
        Case(
            "encode_topk",
            encoder,
            lambda x, W, b, c: fixed(ops.encode_topk(x, W, b, K, b_dec=c)),
            encoded(largest_of_rows(pre) * (pre > 0)),
        ),
        Case(
            "encode_topk-absolute",
            encoder,
            lambda x, W, b, c: fixed(ops.encode_topk(x, W, b, K, b_dec=c, absolute=True)),
            encoded(largest_of_rows(pre.abs())),
        ),
        Case(
            "encode_group_max",
            encoder,
            lambda x, W, b, c: fixed(ops.encode_group_max(x, W, b, 3, b_dec=c)),
            encoded(largest_of_rows(pre.unflatten(1, (3, 3)), 1).flatten(1) * (pre > 0)),
        ),
        Case(
            "encode_gradient_topk",
            encoder,
            lambda x, W, b, c: fixed(
                ops.encode_gradient_topk(
                    x, W, b, K, grad=grad.expand(x.shape), W_dec=W_dec, normalize=False, b_dec=c
                )
            ),
            encoded(largest_of_rows(pre.relu() * (1 + (grad @ W_dec.t()).abs())) * (pre > 0)),
        ),
        Case(
            "encode_batch_topk",
            encoder,
            lambda x, W, b, c: ops.encode_batch_topk(x, W, b, 1.7, b_dec=c).acts.to_dense(),
            encoded(largest(pre, 5)),
        ),
        Case(
            "encode_threshold",
            encoder,
            lambda x, W, b, c: ops.encode_threshold(x, W, b, theta, 20, b_dec=c).to_dense(),
            encoded((pre > theta).to(pre)),
        ),
        Case(
            "encode_feature_topk",
            encoder,
            lambda x, W, b, c: ops.encode_feature_topk(x, W, b, m, 20, b_dec=c).to_dense(),
            encoded(of_columns(pre)),
        ),
    ]
    for layout in ("fixed", "variable"):
        table += _of_pattern(layout, randn(F, D), randn(D), randn(N, D))
    return table


def _columns(reconstruction: Tensor, error: Tensor, squared: Tensor) -> Tensor:
    return torch.cat([reconstruction, error, squared.unsqueeze(1)], 1)


def _of_pattern(layout: str, W: Tensor, b: Tensor, g: Tensor) -> list[Case]:
    a = acts(layout)
    rows, columns, active = _places(a)
    shape = a.values.shape
    lists: LatentLists = ops.group_by_latent(a)

    def with_values(values: Tensor) -> SparseActs:
        return SparseActs(values, a.indices, a.offsets, F)

    def matrix(values: Tensor) -> Tensor:
        dense = values.new_zeros(N, F)
        return dense.index_put((rows, columns), values.flatten() * active, accumulate=True)

    def weight_and_bias(values: Tensor, g: Tensor) -> Tensor:
        weight, bias = ops.sparse_weight_grad(values, lists, g)
        return torch.cat([weight, bias.unsqueeze(1)], 1)

    return [
        Case(
            f"sparse_decode-{layout}",
            (a.values, W, b),
            lambda values, W, b: ops.sparse_decode(with_values(values), W, b),
            lambda values, W, b: matrix(values) @ W + b,
        ),
        Case(
            f"sparse_decode_error-{layout}",
            (a.values, W, b, g),
            lambda values, W, b, g: _columns(
                *ops.sparse_decode_error(with_values(values), W, b, g)[:3]
            ),
            lambda values, W, b, g: _columns(
                x := matrix(values) @ W + b, x - g, (x - g).square().sum(1)
            ),
        ),
        Case(
            f"sparse_decode_error-squared-{layout}",
            (a.values, W, g),
            lambda values, W, g: ops.sparse_decode_error(with_values(values), W, None, g).squared,
            lambda values, W, g: (matrix(values) @ W - g).square().sum(1),
        ),
        Case(
            f"sparse_decode_values_grad-{layout}",
            (g, W),
            lambda g, W: ops.sparse_decode_values_grad(g, a, W),
            lambda g, W: ((g[rows] * W[columns]).sum(1) * active).view(shape),
        ),
        Case(
            f"sparse_weight_grad-{layout}",
            (a.values, g),
            weight_and_bias,
            lambda values, g: torch.cat(
                [matrix(values).t() @ g, matrix(values).sum(0).unsqueeze(1)], 1
            ),
        ),
    ]
