"""A source for all processes out of one that each process has for itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastsae._files import checksum
from fastsae.data.source import ActivationSource, fingerprint, hold_back, sample_rows
from fastsae.distributed.mesh import Peers, check_mesh


def gathered(source: ActivationSource, mesh: DeviceMesh) -> Gathered:
    """Return the rows of all processes, each of which has other ones: a stream, for instance.

        mesh = make_mesh(1, 4)
        own = fastsae.data.stream(model, tokenizer, texts[dist.get_rank()::4], site)
        Trainer(sae, gathered(own, mesh), TrainConfig(mesh=(1, 4), total_tokens=10**8)).fit()

    A training batch is given in equal parts by all processes of the mesh; each receives those of
    its data group. What is read in order, or sampled, everyone receives whole.

    Args:
        source: of this process; of the same width on all.
        mesh: from `make_mesh`.
    """
    return Gathered(source, mesh)


class Gathered:
    """What `gathered` returns: an `ActivationSource` without a length."""

    of_data_group = True
    """Training batches are those of this data group already."""

    def __init__(self, source: ActivationSource, mesh: DeviceMesh) -> None:
        check_mesh(mesh)
        self.source, self.mesh, self.d_in = source, mesh, int(source.d_in)

    def batches(self, batch_size: int, *, seed: int | None = 0) -> Iterator[Tensor]:
        """See `ActivationSource.batches`.

        Raises:
            ValueError: the batch cannot be given in equal parts.
        """
        size = self.mesh.size()
        if seed is None:
            return self._in_order(batch_size)
        if batch_size % size:
            raise ValueError(
                f"gathered: expected batch_size to be a multiple of {size} processes, got "
                f"{batch_size}"
            )
        return _Batches(self, self.source.batches(batch_size // size, seed=seed))

    def sample(self, n: int) -> Tensor:
        """Return about `n` rows, of all processes equally many, the same everywhere."""
        own = -(-n // self.mesh.size())
        return torch.cat(self._objects(sample_rows(self.source, own, own, 0)))

    def fingerprint(self) -> str:
        """Return what stands for the content of all."""
        return checksum.of_json(self._objects(fingerprint(self.source)))

    def hold_back(self, n: int) -> tuple[Gathered, Gathered] | None:
        """Return the sources without and of about `n` rows, in equal parts of all processes."""
        parts = hold_back(self.source, -(-n // self.mesh.size()))
        if not all(self._objects(parts is not None)):
            return None
        assert parts is not None
        return Gathered(parts[0], self.mesh), Gathered(parts[1], self.mesh)

    def whole_state(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return the states of the batches of all processes, given that of this one."""
        if state is None or "processes" in state:
            return state
        return {"processes": self._objects(state)}

    def _in_order(self, batch_size: int) -> Iterator[Tensor]:
        """Yield rows of one process after the other, to the end of the longest."""
        own = self.source.batches(batch_size, seed=None)
        while parts := [p for p in self._objects(_next(own, self.d_in)) if len(p)]:
            yield from parts

    def _objects(self, own: Any) -> list[Any]:
        every: list[Any] = [None] * self.mesh.size()
        dist.all_gather_object(every, own)
        return every


class _Batches:
    """Training batches of a data group; their state is that of this process."""

    def __init__(self, rows: Gathered, own: Iterator[Tensor]) -> None:
        self._rows, self._own = rows, own
        self._latent = Peers(rows.mesh, "latent")
        if hasattr(own, "state_dict") and hasattr(own, "load_state_dict"):
            self.state_dict = own.state_dict
            self.load_state_dict = self._load_state_dict

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Tensor:
        rows = next(self._own)
        return self._latent.gather(rows).flatten(0, 1)

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        states = state["processes"]
        if len(states) != self._rows.mesh.size():
            raise ValueError(
                f"gathered: expected the {len(states)} processes that have read so far, each its "
                f"own rows, got {self._rows.mesh.size()}"
            )
        self._own.load_state_dict(states[self._rows.mesh.get_rank()])  # type: ignore[attr-defined]


def _next(batches: Iterator[Tensor], width: int) -> Tensor:
    found = next(batches, None)
    return torch.empty(0, width) if found is None else found.cpu()
