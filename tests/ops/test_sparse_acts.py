"""The sparse format: what it means, and that it goes through pytrees and compiled code."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from fastsae import SparseActs
from tests.ops.inputs import acts

LAYOUTS = ("fixed", "variable")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_and_counts(layout) -> None:
    a = acts(6, 30, 4, torch.float32, layout)
    dense = torch.zeros(6, 30)
    for row in range(6):
        begin, end = (row * 4, row * 4 + 4) if layout == "fixed" else a.offsets[row : row + 2]
        for j in range(int(begin), int(end)):
            dense[row, a.indices.flatten()[j]] += a.values.flatten()[j]
    assert torch.equal(a.to_dense(), dense)
    assert a.row_counts().tolist() == (dense != 0).sum(1).tolist()
    assert a.l0() == (dense != 0).sum() / 6
    assert torch.equal(a.fired(), (dense != 0).any(0))
    assert a.shape == (6, 30)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_csr(layout) -> None:
    a = acts(6, 30, 4, torch.float32, layout)
    csr = a.to_csr()
    assert csr.layout == torch.sparse_csr
    assert torch.equal(csr.to_dense(), a.to_dense())
    assert csr._nnz() == (a.values != 0).sum()


def test_from_dense_round_trip() -> None:
    dense = torch.randn(5, 12).relu()
    assert torch.equal(SparseActs.from_dense(dense).to_dense(), dense)
    with pytest.raises(ValueError, match=r"expected dense to be \[n, d_sae\], got \[12\]"):
        SparseActs.from_dense(dense[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_dense_is_differentiable(layout) -> None:
    a = acts(4, 12, 3, torch.float64, layout)
    values = a.values.clone().requires_grad_()
    weight = torch.randn(4, 12, dtype=torch.float64)
    (SparseActs(values, a.indices, a.offsets, 12).to_dense() * weight).sum().backward()
    rows = a.rows()
    real = rows < 4
    want = torch.where(real, weight[rows.clamp(max=3), a.indices.long()], 0)
    assert torch.equal(values.grad, want)


def test_to_casts_values_only() -> None:
    a = acts(4, 12, 3, torch.float32, "variable").to(torch.float64)
    assert (a.values.dtype, a.indices.dtype) == (torch.float64, torch.int32)
    assert a.offsets.dtype == torch.int32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_a_pytree(layout) -> None:
    a = acts(4, 12, 3, torch.float32, layout)
    leaves, spec = pytree.tree_flatten(a)
    b = pytree.tree_unflatten(leaves, spec)
    assert isinstance(b, SparseActs)
    assert b.d_sae == 12
    assert b.values is a.values
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: t * 2, a)
    assert torch.equal(doubled.values, a.values * 2)


def test_crosses_a_compiled_graph() -> None:
    @torch.compile(fullgraph=True)
    def f(a: SparseActs) -> SparseActs:
        return SparseActs(a.values * 2, a.indices, a.offsets, a.d_sae)

    a = acts(4, 12, 3, torch.float32, "fixed")
    assert torch.equal(f(a).values, a.values * 2)
