"""sparse_decode, its gradients, transpose and sparse_weight_grad."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.testing import assert_close

from bench.ops.inputs import SHAPES, acts, describe, weights
from bench.timing import Case
from fastsae import SparseActs, ops


def _bag(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return embedding_bag(indices, W, per_sample_weights=values, mode="sum")


def _dense(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    codes = values.new_zeros(values.shape[0], W.shape[0])
    return codes.scatter(1, indices, values) @ W


def _sorted_lists(indices: Tensor, m: int) -> tuple[Tensor, Tensor]:
    order = torch.sort(indices.flatten(), stable=True).indices
    return order, torch.bincount(indices.flatten(), minlength=m).cumsum(0)


def _index_add(values: Tensor, indices: Tensor, x: Tensor, m: int) -> Tensor:
    parts = (values.unsqueeze(2) * x.unsqueeze(1)).flatten(0, 1)
    return x.new_zeros(m, x.shape[1]).index_add_(0, indices.flatten(), parts)


def _scatter_product(values: Tensor, indices: Tensor, x: Tensor, m: int) -> Tensor:
    return values.new_zeros(values.shape[0], m).scatter(1, indices, values).t() @ x


def cases(device: str) -> Iterator[Case]:
    """Yield the cases; the floor counts every gathered row of W_dec once per use."""
    for name in SHAPES:
        n, d, m, k = SHAPES[name]
        for dtype in (torch.float32, torch.bfloat16):
            a = acts(name, dtype, device)
            values, indices = a.values, a.indices.long()
            x, W, _ = weights(name, dtype, device)
            size = W.element_size()
            tolerance = 1e-4 if dtype == torch.float32 else 5e-2

            def same(a: SparseActs = a, i: Tensor = indices, W: Tensor = W, t=tolerance) -> None:
                assert_close(ops.sparse_decode(a, W), _bag(a.values, i, W), rtol=t, atol=t)

            yield Case(
                "sparse_decode",
                describe(name),
                lambda a=a, W=W: ops.sparse_decode(a, W),
                {
                    "embedding_bag": lambda v=values, i=indices, W=W: _bag(v, i, W),
                    "scatter + dense product": lambda v=values, i=indices, W=W: _dense(v, i, W),
                },
                same,
                bytes=size * (min(n * k, m) * d + n * d),
                dtype=dtype,
            )
        a = acts(name, torch.float32, device)
        values, indices = a.values, a.indices.long()
        x, W, _ = weights(name, torch.float32, device)
        leaves = [t.clone().requires_grad_() for t in (values, W)]

        def backward(
            decode: object, leaves: list[Tensor] = leaves, x: Tensor = x
        ) -> tuple[Tensor, ...]:
            return torch.autograd.grad(decode(*leaves), leaves, x)  # type: ignore[operator]

        def ours(v: Tensor, W: Tensor, a: SparseActs = a) -> Tensor:
            return ops.sparse_decode(SparseActs(v, a.indices, None, a.d_sae), W)

        def bag(v: Tensor, W: Tensor, i: Tensor = indices) -> Tensor:
            return _bag(v, i, W)

        def dense(v: Tensor, W: Tensor, i: Tensor = indices) -> Tensor:
            return _dense(v, i, W)

        def same_gradients(backward=backward, ours=ours, bag=bag) -> None:
            for got, want in zip(backward(ours), backward(bag), strict=True):
                assert_close(got, want, rtol=1e-3, atol=1e-3)

        yield Case(
            "sparse_decode + backward",
            describe(name),
            lambda f=backward, g=ours: f(g),
            {
                "embedding_bag": lambda f=backward, g=bag: f(g),
                "scatter + dense product": lambda f=backward, g=dense: f(g),
            },
            same_gradients,
            bytes=4 * (2 * min(n * k, m) * d + m * d),
        )

        def same_lists(a: SparseActs = a, i: Tensor = indices) -> None:
            order, ends = _sorted_lists(i, a.d_sae)
            lists = ops.transpose(a)
            assert torch.equal(lists.slots.long(), order)
            assert torch.equal(lists.offsets[1:].long(), ends)

        yield Case(
            "transpose",
            describe(name),
            lambda a=a: ops.transpose(a),
            {"sort + bincount": lambda i=indices, m=m: _sorted_lists(i, m)},
            same_lists,
            bytes=24 * n * k + 4 * m,
        )
        lists = ops.transpose(a)

        def same_weight(
            v: Tensor = values, i: Tensor = indices, x: Tensor = x, m: int = m, lists=lists
        ) -> None:
            got = ops.sparse_weight_grad(v, lists, x)[0]
            assert_close(got, _index_add(v, i, x, m), rtol=1e-3, atol=1e-3)

        yield Case(
            "sparse_weight_grad",
            describe(name),
            lambda v=values, lists=lists, x=x: ops.sparse_weight_grad(v, lists, x),
            {
                "index_add": lambda v=values, i=indices, x=x, m=m: _index_add(v, i, x, m),
                "scatter + dense product": (
                    lambda v=values, i=indices, x=x, m=m: _scatter_product(v, i, x, m)
                ),
            },
            same_weight,
            bytes=4 * (n * d + m * d),
        )
