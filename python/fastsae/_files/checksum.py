"""Checksums of tensors and of settings: XXH3, which runs at the speed of memory.

They tell accidents (a bad disk, a cut transfer, a file of another save) from what was written, not
an attacker, who can compute them as well.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import xxhash
from torch import Tensor

BLOCK = 1 << 22
"""Bytes of a tensor under one checksum, so that damage has a place."""


def of_json(value: Any) -> str:
    """Return the checksum of JSON values; the order of keys does not count."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def of_tensor(tensor: Tensor) -> list[str]:
    """Return the checksums of the blocks of a contiguous tensor on the CPU."""
    data = as_bytes(tensor)
    return [of_block(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)]


def of_block(data: memoryview) -> str:
    """Return the checksum of one block; other threads go on meanwhile."""
    return xxhash.xxh3_64_hexdigest(data)


def of_rows(tensor: Tensor, chunk: int = 1 << 26) -> str:
    """Return one checksum of all of a tensor, on any device, with its dtype and shape."""
    total = xxhash.xxh3_128(f"{tensor.dtype} {[*tensor.shape]}".encode())
    rows = max(1, chunk // max(1, tensor[:1].numel() * tensor.element_size()))
    for part in tensor.detach().split(rows) if len(tensor) else ():
        total.update(as_bytes(part.cpu().contiguous()))
    return total.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, not copied."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= 1:  # whatever its stride says
        flat = flat.new_empty(flat.shape).copy_(flat)
    return flat.view(torch.uint8).numpy().data
