"""sparse_decode, with its error too, its gradients, group_by_latent and sparse_weight_grad."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.testing import assert_close

from bench.ops.inputs import Shape, acts, describe, peer, weights
from bench.timing import Case, Work
from fastsae import SparseActs, ops


def _bag(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return embedding_bag(indices, W, per_sample_weights=values, mode="sum")


def _codes(values: Tensor, indices: Tensor, m: int) -> Tensor:
    return values.new_zeros(values.shape[0], m).scatter(1, indices, values)


def _dense(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return _codes(values, indices, W.shape[0]) @ W


def _sorted_lists(indices: Tensor, m: int) -> tuple[Tensor, Tensor]:
    order = torch.sort(indices.flatten(), stable=True).indices
    return order, torch.bincount(indices.flatten(), minlength=m).cumsum(0)


def _index_add(values: Tensor, indices: Tensor, x: Tensor, m: int) -> Tensor:
    parts = (values.unsqueeze(2) * x.unsqueeze(1)).flatten(0, 1)
    return x.new_zeros(m, x.shape[1]).index_add_(0, indices.flatten(), parts)


def _gathered_products(grad: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return torch.bmm(W[indices], grad.unsqueeze(2)).squeeze(2)


def cases(name: str, shape: Shape, device: str, gpu: bool = False) -> Iterator[Case]:
    """Yield the cases; the floor counts each row of W_dec that is needed once."""
    for dtype in (torch.float32, torch.bfloat16):
        a = acts(shape, dtype, device)
        x, W, _ = weights(shape, dtype, device)
        yield _decode_case(a, W, name, shape, gpu)
        yield _error_case(a, x, W, name, shape, gpu)
        if dtype == torch.float32:
            yield from _bf16_rows_cases(a, x, W, name, shape)
        if gpu or dtype == torch.float32:
            yield from _gradient_cases(a, x, W, name, shape, gpu)


def _tolerance(W: Tensor) -> float:
    return 1e-4 if W.dtype == torch.float32 else 5e-2


def _decode_case(a: SparseActs, W: Tensor, name: str, shape: Shape, gpu: bool) -> Case:
    n, d, m, k = shape
    values, indices = a.values, a.indices.long()

    def same() -> None:
        t = _tolerance(W)
        assert_close(ops.sparse_decode(a, W), _bag(values, indices, W), rtol=t, atol=t)

    ways: dict[str, Work] = {
        "embedding_bag": lambda: _bag(values, indices, W),
        "scatter + dense product": lambda: _dense(values, indices, W),
    }
    parts: dict[str, Work] = {}
    if gpu:
        codes = _codes(values, indices, m)
        parts["dense product"] = lambda: codes @ W
        triton = peer("sparsify.xformers", "xformers_embedding_bag")
        if triton:
            ways["eai-sparsify"] = lambda: triton(indices, W, values)
    if gpu and name == "A":
        compiled = torch.compile(_dense)
        ways["torch.compile"] = lambda: compiled(values, indices, W)
    return Case(
        "sparse_decode",
        describe(name, shape),
        lambda: ops.sparse_decode(a, W),
        ways,
        same,
        bytes=W.element_size() * (min(n * k, m) * d + n * d),
        dtype=W.dtype,
        gather_bytes=W.element_size() * (n * k * d + n * d),
        parts=parts,
        targets={"gather": 0.7, "dense product": 3.0} if gpu else {},
    )


def _error_case(a: SparseActs, x: Tensor, W: Tensor, name: str, shape: Shape, gpu: bool) -> Case:
    """Also timed against the ops that a step takes otherwise, with what it does between them."""
    n, d, m, k = shape
    native, indices, sums = torch.ops.fastsae, a.indices.long(), torch.float32

    def separate(decoded: Tensor) -> tuple[Tensor, Tensor]:
        error = decoded.to(sums) - x.to(sums)
        return error, error.square().sum()

    def two_ops() -> tuple[Tensor, Tensor, Tensor]:
        error, squared = separate(native.sparse_decode(a.values, a.indices, None, W, None))
        grad = (2 * error).to(W.dtype)
        return (
            error,
            squared,
            native.sparse_decode_values_grad(grad, a.values, a.indices, None, W),
        )

    def plain() -> tuple[Tensor, Tensor, Tensor]:
        error, squared = separate(_bag(a.values, indices, W))
        return error, squared, _gathered_products((2 * error).to(W.dtype), indices, W)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        found = ops.sparse_decode_error(a, W, None, x)
        return found.error, found.squared.sum(), 2 * found.products

    def same() -> None:
        t = 10 * _tolerance(W)
        for got, want in zip(ours(), two_ops(), strict=True):
            assert_close(got, want.to(sums), rtol=t, atol=t)

    size = W.element_size()
    return Case(
        "sparse_decode_error",
        describe(name, shape),
        ours,
        {"two ops": two_ops, "embedding_bag + bmm": plain},
        same,
        bytes=size * (min(n * k, m) * d + 2 * n * d) + 4 * n * d,
        dtype=W.dtype,
        gather_bytes=size * (n * k * d + 2 * n * d) + 4 * n * d,
        targets={"two ops": 1.0} if gpu else {},
    )


def _bf16_rows_cases(
    a: SparseActs, x: Tensor, W: Tensor, name: str, shape: Shape
) -> Iterator[Case]:
    """Float32 numbers, and rows of a bfloat16 copy of W_dec; timed against the float32 rows."""
    n, d, m, k = shape
    rows = W.bfloat16()
    rounded = rows.float()

    def all_of(W: Tensor, copy: Tensor | None) -> tuple[Work, Work, Work]:
        return (
            lambda: ops.sparse_decode(a, W, bf16_W_dec=copy),
            lambda: ops.sparse_decode_values_grad(x, a, W, bf16_W_dec=copy),
            lambda: ops.sparse_decode_error(a, W, None, x, bf16_W_dec=copy).products,
        )

    # What each op reads and writes besides the rows, in numbers of [n, d].
    of_tokens = {"sparse_decode": 1, "sparse_decode_values_grad": 1, "sparse_decode_error": 3}
    every = zip(of_tokens, all_of(W, rows), all_of(W, None), all_of(rounded, None), strict=True)
    for op, ours, whole, wanted in every:

        def same(ours: Work = ours, wanted: Work = wanted) -> None:
            assert_close(ours(), wanted(), rtol=1e-3, atol=1e-3)

        others = 4 * of_tokens[op] * n * d
        yield Case(
            f"{op} (bfloat16 rows)",
            describe(name, shape),
            ours,
            {"float32 rows": whole},
            same,
            bytes=2 * min(n * k, m) * d + others,
            dtype=W.dtype,
            gather_bytes=2 * n * k * d + others,
        )


def _gradient_cases(
    a: SparseActs, x: Tensor, W: Tensor, name: str, shape: Shape, gpu: bool
) -> Iterator[Case]:
    n, d, m, k = shape
    dtype, size, values, indices = W.dtype, W.element_size(), a.values, a.indices.long()
    tolerance = 1e-3 if W.dtype == torch.float32 else 5e-2
    leaves = [t.clone().requires_grad_() for t in (values, W)]

    def backward(decode: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(decode(*leaves), leaves, x)

    def sparse(v: Tensor, W: Tensor) -> Tensor:
        return ops.sparse_decode(SparseActs(v, a.indices, None, a.d_sae), W)

    def bag(v: Tensor, W: Tensor) -> Tensor:
        return _bag(v, indices, W)

    def dense(v: Tensor, W: Tensor) -> Tensor:
        return _dense(v, indices, W)

    def same_gradients() -> None:
        for got, want in zip(backward(sparse), backward(dense), strict=True):
            assert_close(got, want, rtol=tolerance, atol=tolerance)

    yield Case(
        "sparse_decode + backward",
        describe(name, shape),
        lambda: backward(sparse),
        {
            "embedding_bag": lambda: backward(bag),
            "scatter + dense product": lambda: backward(dense),
        },
        same_gradients,
        bytes=size * (2 * min(n * k, m) * d + m * d),
        dtype=dtype,
    )
    if gpu:
        grad_of_values = torch.ops.fastsae.sparse_decode_values_grad

        def same_values_grad() -> None:
            got = grad_of_values(x, values, a.indices, None, W)
            want = _gathered_products(x, indices, W).to(got.dtype)
            assert_close(got, want, rtol=tolerance, atol=tolerance)

        yield Case(
            "sparse_decode_values_grad",
            describe(name, shape),
            lambda: grad_of_values(x, values, a.indices, None, W),
            {"gather + bmm": lambda: _gathered_products(x, indices, W)},
            same_values_grad,
            bytes=size * (min(n * k, m) * d + n * d),
            dtype=dtype,
            gather_bytes=size * (n * k * d + n * d),
        )

    def same_lists() -> None:
        order, ends = _sorted_lists(indices, m)
        lists = ops.group_by_latent(a)
        assert torch.equal(lists.slots.long(), order)
        assert torch.equal(lists.offsets[1:].long(), ends)

    yield Case(
        "group_by_latent",
        describe(name, shape),
        lambda: ops.group_by_latent(a),
        {"sort + bincount": lambda: _sorted_lists(indices, m)},
        same_lists,
        bytes=24 * n * k + 4 * m,
        dtype=dtype,
    )
    lists = ops.group_by_latent(a)

    def same_weight() -> None:
        got = ops.sparse_weight_grad(values, lists, x)
        want = _codes(values, indices, m).t() @ x
        assert_close(got[0], want, rtol=tolerance, atol=tolerance)
        again = ops.sparse_weight_grad(values, lists, x)
        assert all(torch.equal(p, q) for p, q in zip(got, again, strict=True))

    ways: dict[str, Work] = {
        "index_add": lambda: _index_add(values, indices, x, m),
        "scatter + dense product": lambda: _codes(values, indices, m).t() @ x,
    }
    if gpu:
        out = _bag(values, indices, leaves[1])
        ways["embedding_bag backward"] = lambda: torch.autograd.grad(
            out, leaves[1], x, retain_graph=True
        )
    yield Case(
        "sparse_weight_grad",
        describe(name, shape),
        lambda: ops.sparse_weight_grad(values, lists, x),
        ways,
        same_weight,
        bytes=size * (n * d + m * d),
        dtype=dtype,
        gather_bytes=size * (n * k * d + m * d),
        targets={"index_add": 2.0, "embedding_bag backward": 2.0} if gpu else {},
    )
