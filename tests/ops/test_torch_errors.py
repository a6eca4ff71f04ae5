"""What torch says when it fails inside an op reaches the caller."""

from __future__ import annotations

import pytest
import torch

# accelerate's find_executable_batch_size looks for these words.
OUT_OF_MEMORY = "CUDA out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory"
HUGE = 2**50

# From 2.13 on torch keeps the message of a call through its C functions.
pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="torch loses its message"
)


def test_out_of_memory_of_an_output(device: str) -> None:
    values = torch.zeros(HUGE // 4, 0, device=device)
    indices = torch.zeros(HUGE // 4, 0, dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=OUT_OF_MEMORY):
        torch.ops.fastsae.sparse_decode(
            values, indices, None, torch.zeros(4, 4, device=device), None
        )


def test_out_of_memory_of_a_contiguous_copy(device: str) -> None:
    x = torch.zeros(1, 4, device=device).expand(HUGE, 4)
    with pytest.raises(RuntimeError, match=OUT_OF_MEMORY):
        torch.ops.fastsae.topk(x, 2, False)
