"""SparseActs in torch's own machinery: trees, vmap, files, data loaders."""

from __future__ import annotations

import io

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from fastsae import SparseActs, ops
from tests.ops.inputs import acts

LAYOUTS = ("fixed", "variable")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_leaves_are_tensors(layout) -> None:
    a = acts(4, 12, 3, torch.float32, layout)
    leaves, spec = pytree.tree_flatten(a)
    assert len(leaves) == (2 if layout == "fixed" else 3)
    assert all(isinstance(t, torch.Tensor) for t in leaves)
    b = pytree.tree_map(lambda t: t.clone(), a)
    assert torch.equal(b.to_dense(), a.to_dense())
    again = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert torch.equal(pytree.tree_unflatten(leaves, again).to_dense(), a.to_dense())
    names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(a)[0]]
    assert names == [".values", ".indices", ".offsets"][: len(leaves)]


def test_vmap_returns_and_takes_it() -> None:
    x, W = torch.randn(3, 5, 8), torch.randn(20, 8)

    def fixed(x):
        return SparseActs(*ops.encode_topk(x, W, None, 4), None, 20)

    def variable(x):
        return ops.encode_batch_topk(x, W, None, 4).acts

    for encode in (fixed, variable):
        batch = torch.vmap(encode)(x)
        want = torch.stack([encode(part).to_dense() for part in x])
        # Fewer than 32 rows take the library's matmul, whose last bit depends on their number.
        torch.testing.assert_close(torch.vmap(SparseActs.to_dense)(batch), want)
        decoded = torch.vmap(lambda a: ops.sparse_decode(a, W))(batch)
        torch.testing.assert_close(decoded, want @ W)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loads_without_running_code(layout) -> None:
    a = acts(4, 12, 3, torch.float32, layout)
    buffer = io.BytesIO()
    torch.save({"acts": a, "found": ops.topk(torch.randn(2, 5), 2)}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)["acts"]
    assert torch.equal(loaded.to_dense(), a.to_dense())


@pytest.mark.parametrize(
    "layouts", [("fixed",), ("fixed", "fixed"), ("variable", "variable"), ("fixed", "variable")]
)
def test_cat(layouts) -> None:
    parts = [acts(4 + i, 12, 3, torch.float64, layout) for i, layout in enumerate(layouts)]
    parts.append(acts(0, 12, 3, torch.float64, layouts[0]))
    leaves = [p.values.requires_grad_() for p in parts]
    got = SparseActs.cat(parts)
    assert torch.equal(got.to_dense(), torch.cat([p.to_dense() for p in parts]))
    assert got.values.numel() == sum(v.numel() for v in leaves)
    assert (got.offsets is None) == (set(layouts) == {"fixed"})
    weight = torch.randn(got.shape, dtype=torch.float64)
    (got.to_dense() * weight).sum().backward()
    total = torch.cat([v.grad.flatten() for v in leaves])
    dense = torch.cat([p.to_dense() for p in parts])
    for p, v in zip(parts, leaves, strict=True):
        row, (mine, weight) = p.rows(), weight.tensor_split([p.n])
        real = row < p.n
        want = torch.where(real, mine[row.clamp(max=p.n - 1), p.indices.long()] if p.n else 0, 0)
        assert torch.equal(v.grad, want.expand_as(v))
    assert total.numel() >= (dense != 0).sum()


def test_cat_joins_other_numbers_per_row() -> None:
    a, b = acts(2, 12, 3, torch.float32, "fixed"), acts(3, 12, 5, torch.float32, "fixed")
    got = SparseActs.cat([a, b])
    assert got.offsets.tolist() == [0, 3, 6, 11, 16, 21]
    assert torch.equal(got.to_dense(), torch.cat([a.to_dense(), b.to_dense()]))


def test_cat_refuses() -> None:
    a, b = acts(2, 12, 3, torch.float32, "fixed"), acts(2, 13, 3, torch.float32, "fixed")
    with pytest.raises(ValueError, match=r"cat: expected parts over the same d_sae.*\[12, 13\]"):
        SparseActs.cat([a, b])
    with pytest.raises(ValueError, match=r"cat: expected parts over the same d_sae.*got.*\[\]"):
        SparseActs.cat([])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loader_collates_rows(layout) -> None:
    rows = [acts(1, 12, 3, torch.float32, layout) for _ in range(6)]
    batches = list(DataLoader(rows, batch_size=4))
    assert [b.n for b in batches] == [4, 2]
    want = torch.cat([r.to_dense() for r in rows])
    assert torch.equal(torch.cat([b.to_dense() for b in batches]), want)


def test_flops_are_counted() -> None:
    n, d, d_sae, k = 10, 16, 64, 4
    x, W = torch.randn(n, d, requires_grad=True), torch.randn(d_sae, d, requires_grad=True)

    def count(f) -> int:
        with FlopCounterMode(display=False) as counter:
            f()
        return counter.get_total_flops()

    dense, sparse = count(lambda: x @ W.t()), 2 * n * k * d
    assert dense == 2 * n * d * d_sae
    b, m = torch.zeros(d_sae), torch.ones(d_sae, dtype=torch.int32)
    assert count(lambda: ops.encode_topk(x, W, b, k)) == dense
    assert count(lambda: ops.encode_batch_topk(x, W, b, k)) == dense
    assert count(lambda: ops.encode_threshold(x, W, b, torch.tensor(1.0), 40)) == dense
    assert count(lambda: ops.encode_feature_topk(x, W, b, m, 64)) == dense
    assert count(lambda: ops.encode_group_max(x, W, b, k)) == dense
    assert count(lambda: ops.latent_scores(x, W, b, k)) == dense
    assert count(lambda: ops.encode_gradient_topk(x, W, b, k, grad=x, W_dec=W)) == 2 * dense
    a = SparseActs(*ops.encode_topk(x, W, b, k), None, d_sae)
    assert count(lambda: ops.sparse_decode(a, W)) == sparse
    assert count(lambda: ops.sparse_decode(a, W).sum().backward(retain_graph=True)) == sparse * (
        1 + 2 + 2  # forward; of values and W_dec; of x and W_enc
    )
    assert count(lambda: ops.topk(x, 2)) == 0
    state = [ops.StepTensors(*map(torch.rand_like, (W, W, b, x[0]))) for _ in range(3)]
    still = SparseActs(a.values.detach(), a.indices, None, d_sae)
    step = lambda: ops.sparse_adam_step_(*state, still, still.values, x, x, lr=1e-3, step=1)  # noqa: E731
    assert count(step) == 2 * sparse
