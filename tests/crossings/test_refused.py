"""What an op cannot take: one clear line, in the grammar of the other errors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from fastsae import SparseActs, ops

W = torch.randn(20, 8)
CALLS = {
    "topk": lambda x: ops.topk(x, 2),
    "batch_topk": lambda x: ops.batch_topk(x, 2),
    "feature_topk": lambda x: ops.feature_topk(x, 2),
    "threshold_select": lambda x: ops.threshold_select(x, torch.tensor(0.0), 20),
    "encode_topk": lambda x: ops.encode_topk(x, W, None, 2),
    "encode_batch_topk": lambda x: ops.encode_batch_topk(x, W, None, 2),
    "encode_group_max": lambda x: ops.encode_group_max(x, W, None, 2),
    "encode_gradient_topk": lambda x: ops.encode_gradient_topk(
        x, W, None, 2, grad=torch.randn(4, 8), W_dec=W
    ),
    "latent_scores": lambda x: ops.latent_scores(x, W, None, 2),
    "encode_threshold": lambda x: ops.encode_threshold(x, W, None, torch.tensor(0.0), 20),
    "sparse_decode": lambda x: ops.sparse_decode(
        SparseActs(x, torch.zeros(4, 8, dtype=torch.int32), None, 20), W
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", CALLS)
def test_other_layouts(op) -> None:
    x = torch.randn(4, 8)
    jagged = torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)
    for made, got in (
        (jagged, "a nested one"),
        (torch.nested.nested_tensor([x, x[:2]]), "a nested one"),
        (x.to_sparse(), "layout torch.sparse_coo"),
        (x.to_sparse_csr(), "layout torch.sparse_csr"),
        (x.to_mkldnn(), "layout torch._mkldnn"),
    ):
        with pytest.raises(
            TypeError, match=f"{op}: expected (x|values) to be a dense .*{got}"
        ) as e:
            CALLS[op](made)
        assert "\n" not in str(e.value)


@pytest.fixture
def mesh(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    store = dist.FileStore(f"{tmp_path}/store", 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_dtensor(mesh) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.experimental import local_map

    x = torch.randn(4, 8)
    sharded = distribute_tensor(x, mesh, [Shard(0)])
    for op, call in CALLS.items():
        with pytest.raises(TypeError, match=f"{op}: expected .* local tensor, got a DTensor; call"):
            call(sharded)
    # What the message says to do.
    encode = local_map(
        lambda x: tuple(ops.encode_topk(x, W, None, 2)),
        ([Shard(0)], [Shard(0)]),
        ([Shard(0)],),
        device_mesh=mesh,
    )
    values, indices = encode(sharded)
    want = ops.encode_topk(x, W, None, 2)
    assert_close((values.to_local(), indices.to_local()), tuple(want))


def test_numbers_beyond_int64_mean_everything() -> None:
    x = torch.randn(40, 64)
    assert_close(ops.batch_topk(x, 1e30).acts.to_dense(), x.relu())
    threshold = torch.tensor(0.5)
    assert_close(ops.threshold_select(x, threshold, 10**30).to_dense(), x * (x > threshold))
    assert_close(ops.feature_topk(x, 10**30).to_dense(), x.relu())
    V = torch.randn(50, 64)
    assert_close(ops.encode_batch_topk(x, V, None, 1e30).acts.to_dense(), (x @ V.t()).relu())
    kept = ops.encode_threshold(x, V, None, threshold, 10**30).to_dense()
    assert_close(kept, x @ V.t() * (x @ V.t() > threshold))
