"""What the trainer reads: rows of activations in batches, the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Batches(Protocol):
    """A data set of `len(data)` rows of `d_in` numbers, read in shuffled epochs.

    A class may also have `sample(n) -> Tensor [<= n, d_in]`, rows for statistics; without it the
    first batches of epoch 0 serve.
    """

    d_in: int

    def __len__(self) -> int:
        """Return the number of rows."""

    def batches(self, batch_size: int, seed: int, epoch: int, start: int) -> Iterator[Tensor]:
        """Yield batches `start`, `start + 1`, ... of an epoch of `len(data) // batch_size` batches.

        Each is `[batch_size, d_in]`, in any floating dtype and on any device. The same four numbers
        give the same batches in every process, which is what makes a resumed run exact.
        """


class TensorData:
    """The rows of `x: [n, d_in]`, permuted anew each epoch; the last partial batch is dropped."""

    def __init__(self, x: Tensor) -> None:
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(
                f"TensorData: expected floating x [n, d_in], got {x.dtype} {[*x.shape]}"
            )
        self.x = x
        self.d_in = x.shape[1]

    def __len__(self) -> int:
        return self.x.shape[0]

    def batches(self, batch_size: int, seed: int, epoch: int, start: int) -> Iterator[Tensor]:
        """See `Batches.batches`."""
        generator = torch.Generator().manual_seed((seed << 24) + epoch)
        order = torch.randperm(len(self), generator=generator).to(self.x.device)
        for i in range(start, len(self) // batch_size):
            yield self.x[order[i * batch_size : (i + 1) * batch_size]]

    def sample(self, n: int) -> Tensor:
        """Return at most `n` rows, evenly spaced."""
        return self.x[:: -(-len(self) // n)]


def as_batches(data: Tensor | Batches) -> Batches:
    """Wrap a tensor; pass on what has `d_in`, `__len__` and `batches`.

    Raises:
        TypeError: data is something else.
    """
    if isinstance(data, Tensor):
        return TensorData(data)
    if not isinstance(data, Batches):
        raise TypeError(
            "Trainer: expected data to be a tensor [n, d_in] or to have d_in, __len__ and batches, "
            f"got {type(data).__name__}"
        )
    return data


def sample_rows(data: Batches, n: int, batch_size: int, seed: int) -> Tensor:
    """Return about `n` rows of `data` for statistics: `data.sample(n)`, or the first batches."""
    sample = getattr(data, "sample", None)
    if sample is not None:
        rows: Tensor = sample(n)
        return rows
    first = data.batches(batch_size, seed, 0, 0)
    return torch.cat(list(islice(first, -(-n // batch_size))))


def scaled(batch: Tensor, widths: tuple[int, ...], scales: Sequence[float]) -> Tensor:
    """Return `batch: [n, sum(widths)]` with each block of columns times its scale."""
    if len(widths) == 1:
        return batch * scales[0]
    blocks = zip(batch.split(widths, 1), scales, strict=True)
    return torch.cat([block * scale for block, scale in blocks], 1)


def bad_rows(x: Tensor) -> int:
    """Return how many rows of `x: [n, d]` hold NaN or Inf; on a GPU this waits for the device.

    A finite sum proves that there is none, so the usual cost is one read of `x`.
    """
    total = x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return 0 if bool(total.isfinite()) else int((~x.isfinite().all(1)).sum())
