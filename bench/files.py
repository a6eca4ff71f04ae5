"""What checksums cost: a store written and read with and without them, in turns.

    python -m bench.files [--megabytes 512] [--folder /somewhere] [--repeats 7]

Prints medians, and the median of the ratios of turns. The read is one shuffled epoch by a fresh
`ActivationStore`, from the page cache, where a checksum costs most; the write ends when the disk
has the data.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastsae._files import checksum
from fastsae._files.read import TensorFile
from fastsae.data import ActivationStore
from fastsae.data.shards import Manifest, ShardWriter

D, SHARD_ROWS = 1024, 32768


@contextmanager
def without_checksums() -> Iterator[None]:
    """Write and read as if there were none."""

    read_into = TensorFile.read_into

    def unverified(self: TensorFile, name: str, out: Tensor, *, verify: bool) -> None:
        read_into(self, name, out, verify=False)

    with (
        mock.patch.object(checksum, "of_block", return_value="0" * 16),
        mock.patch.object(TensorFile, "read_into", unverified),
    ):
        yield


def write(folder: Path, x: Tensor) -> None:
    """Write a store of the rows `x`."""
    folder.mkdir()
    manifest = Manifest(model="bench", dtype="float16", sites={"a": D})
    writer = ShardWriter(folder, manifest, SHARD_ROWS)
    index = torch.arange(len(x), dtype=torch.int32)
    columns = {"token_ids": index, "doc_ids": index, "positions": index, "acts.a": x}
    for start in range(0, len(x), SHARD_ROWS):
        part = slice(start, start + SHARD_ROWS)
        writer.add("train", {name: column[part] for name, column in columns.items()})
    writer.close()


def read(folder: Path) -> float:
    """Return the sum of one shuffled epoch."""
    store = ActivationStore(folder, buffer_bytes=SHARD_ROWS * D * 2 * 4)
    return float(sum(batch.sum() for batch in store.epoch(4096)))


def seconds(action: Callable[[], Any]) -> float:
    """Return how long `action` takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def paired(values: list[float], others: list[float]) -> float:
    """Return the median of the ratios of what was measured in turns."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    x = torch.randn(arguments.megabytes * 2**20 // (2 * D), D).half()
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as top:
        for repeat in range(arguments.repeats):
            sums = {}
            for checked in (True, False) if repeat % 2 else (False, True):
                folder = Path(top) / str(checked)
                with mock.patch.dict({}) if checked else without_checksums():
                    name = "with" if checked else "without"
                    times.setdefault(f"write {name}", []).append(seconds(lambda: write(folder, x)))  # noqa: B023
                    sums[checked] = read(folder)  # warms the page cache
                    times.setdefault(f"read {name}", []).append(seconds(lambda: read(folder)))  # noqa: B023
                shutil.rmtree(folder)
            assert sums[True] == sums[False]
    tensor = torch.ones(256 * 2**20, dtype=torch.uint8)
    hashing = min(seconds(lambda: checksum.of_tensor(tensor)) for _ in range(5))
    copying = min(seconds(tensor.clone) for _ in range(5))
    median = {name: statistics.median(values) for name, values in times.items()}
    print(json.dumps({
        "megabytes": arguments.megabytes,
        **{name: round(value, 4) for name, value in median.items()},
        "write ratio": round(paired(times["write with"], times["write without"]), 4),
        "read ratio": round(paired(times["read with"], times["read without"]), 4),
        "checksum GB/s": round(tensor.numel() / hashing / 1e9, 1),
        "copy GB/s (read and written)": round(2 * tensor.numel() / copying / 1e9, 1),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
