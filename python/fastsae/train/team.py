"""The processes of a run: this one alone, or a mesh of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsae.nn import SAE

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from fastsae.distributed import Layout
    from fastsae.train.config import TrainConfig


class Team:
    """A run in one process."""

    is_first = True
    """Whether this process writes the files of the run."""
    data_groups = 1
    layout: Layout | None = None
    saving: Any = None
    """The process group that checkpoints are written by; None: the default one."""

    def shard_(self, sae: SAE) -> None:
        """Keep the latents of this process."""

    def unshard_(self, sae: SAE) -> None:
        """Bring all latents together again."""

    def own_rows(self, batch: Tensor) -> Tensor:
        """Return what this process trains on of a batch `[n, d]` that all of them have read."""
        return batch

    def gathered(self, rows: Tensor) -> Tensor:
        """Return what this process trains on where each has read `rows: [n, d]` of its own."""
        return rows

    def total(self, count: int) -> int:
        """Return the sum of a number over all processes."""
        return count

    def largest(self, *numbers: int) -> list[int]:
        """Return of each number the largest that a process has."""
        return [*numbers]

    def expect_same(self, values: Any, what: str) -> None:
        """Raise ValueError if other processes have other values."""

    def from_first(self, number: int) -> int:
        """Return the number that the first process has."""
        return number


class Processes(Team):
    """A run over the processes of a mesh.

    Args:
        mesh: from `distributed.make_mesh`.
        beside: whether checkpoints are written while training goes on.
    """

    def __init__(self, mesh: DeviceMesh, beside: bool = False) -> None:
        self.mesh = mesh
        if beside:
            from torch import distributed

            from fastsae.distributed.mesh import HOLDERS

            self.saving = distributed.new_group(backend="gloo")
            HOLDERS.add(self)
        self.is_first = mesh.get_rank() == 0
        self.data_groups = mesh.size(0)

    def let_go(self) -> None:
        """Keep the process group no longer."""
        self.saving = None

    def shard_(self, sae: SAE) -> None:
        """See `Team.shard_`."""
        from fastsae.distributed import Layout, shard_

        shard_(sae, self.mesh)
        assert isinstance(sae.parallel, Layout)
        self.layout = sae.parallel

    def unshard_(self, sae: SAE) -> None:
        """See `Team.unshard_`."""
        from fastsae.distributed import unshard_

        unshard_(sae)
        self.layout = None

    def own_rows(self, batch: Tensor) -> Tensor:
        """See `Team.own_rows`: a piece for each data group."""
        n = len(batch) // self.data_groups
        first = self.mesh.get_local_rank("data") * n
        return batch[first : first + n]

    def gathered(self, rows: Tensor) -> Tensor:
        """See `Team.gathered`: the rows of the data group."""
        assert self.layout is not None
        return self.layout.latent.gather(rows).flatten(0, 1)

    def total(self, count: int) -> int:
        """See `Team.total`."""
        from torch import distributed

        sum_ = torch.tensor(count, device=self.mesh.device_type)
        distributed.all_reduce(sum_)
        return int(sum_)

    def largest(self, *numbers: int) -> list[int]:
        """See `Team.largest`."""
        from torch import distributed

        most = torch.tensor(numbers, device=self.mesh.device_type)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        found: list[int] = most.tolist()
        return found

    def expect_same(self, values: Any, what: str) -> None:
        """See `Team.expect_same`."""
        from torch import distributed

        every: list[Any] = [None] * self.mesh.size()
        distributed.all_gather_object(every, values)
        if all(other == every[0] for other in every):
            return
        names = ""
        if isinstance(values, dict):
            first = every[0]
            keys = [key for key in first if any(o.get(key) != first[key] for o in every)]
            names = f" ({', '.join(keys)} differ)"
        raise ValueError(f"Trainer: expected {what} on all processes, got different ones{names}")

    def from_first(self, number: int) -> int:
        """See `Team.from_first`."""
        from torch import distributed

        box = torch.tensor(number, device=self.mesh.device_type)
        distributed.broadcast(box, src=0)
        return int(box)


def make_team(sae: SAE, config: TrainConfig) -> Team:
    """Return the processes of a run.

    Raises:
        ValueError: the SAE cannot be spread, or the job has another number of processes.
        RuntimeError: there is no job.
    """
    mesh = config.mesh
    if mesh is None:
        return Team()
    from fastsae.distributed import make_mesh, why_not_sharded

    if (why := why_not_sharded(sae)) is not None:
        raise ValueError(f"Trainer: expected mesh=None for this SAE, got {mesh}, where {why}")
    found = make_mesh(*mesh, sae.W_enc_rows.device.type)
    return Processes(found, config.async_checkpoints)
