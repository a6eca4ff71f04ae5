"""What a training step knows besides its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Reduce = Callable[[Tensor, str], Tensor]
"""From a statistic of one process, and `mean`, `sum`, `min` or `max`, to that of all processes."""


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """The facts of one training step that are neither data nor parameters.

    The defaults are those of a step in a hand-written loop on one process.
    """

    dead: Tensor | None = None
    """bool [d_sae]: the latents that the auxiliary loss trains. None: no auxiliary loss."""
    turn: int | Tensor | None = None
    """A number that goes up by one from step to step: which of the dead latents come next where
    there are more than a step has room for, see `nn.objective.dead_rows`. An int, or [] int64.
    None: all of them on a CPU, always the first of them on a GPU."""
    sparsity_scale: float | Tensor = 1.0
    """Factor of the sparsity loss; a trainer raises it from 0 to 1 at the start of a run. A number,
    or [] float64 in a step that is recorded."""
    progress: float | Tensor = 0.0
    """How much of the run is done, 0..1, for losses that change over a run; likewise."""
    compute_dtype: torch.dtype | None = None
    """What the encoder's matmul may round its factors to; see `ops.encode_topk`."""
    reduce: Reduce | None = None
    """Combines a statistic (threshold, density, L0) over processes. None: inside the forward of
    `DistributedDataParallel` its process group, elsewhere this process alone."""
    recorded: bool = False
    """Whether this step is being recorded by the trainer, to be replayed without its Python:
    nothing may be asked of the device, and `SAE.count_replay` follows every replay, the first one
    too."""

    def reduced(self, statistic: Tensor, op: str) -> Tensor:
        """Return `statistic` combined over the processes that share this step.

        Args:
            statistic: any shape; not changed.
            op: `mean`, `sum`, `min` or `max`.
        """
        reduce = self.reduce or _active_ddp_reduce()
        return statistic if reduce is None else reduce(statistic, op)


def _active_ddp_reduce() -> Reduce | None:
    """Return the reduction of the DDP module whose forward is running, or None."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    from torch.nn.parallel import DistributedDataParallel

    active = DistributedDataParallel._get_active_ddp_module()
    return None if active is None else group_reduce(active.process_group)


def group_reduce(group: object = None) -> Reduce:
    """Return the `StepContext.reduce` of a process group; None: the default group."""

    def reduce(statistic: Tensor, op: str) -> Tensor:
        from torch import distributed

        names = {"mean": "SUM", "sum": "SUM", "min": "MIN", "max": "MAX"}
        total = statistic.detach().clone()
        distributed.all_reduce(total, getattr(distributed.ReduceOp, names[op]), group=group)
        return total / distributed.get_world_size(group) if op == "mean" else total  # type: ignore[arg-type]

    return reduce


def updates_statistics(module: nn.Module, *, loss_depends: bool = False) -> bool:
    """Return whether this forward of `module` updates statistics: in training mode, once a step.

    Activation checkpointing runs a forward again inside the backward pass. Statistics are left
    alone then.

    Args:
        module: the SAE.
        loss_depends: whether the loss depends on the statistics that the first forward updated.

    Raises:
        RuntimeError: the second forward would compute another loss than the first.
    """
    if not module.training or torch.compiler.is_compiling():
        return module.training
    if torch._C._current_graph_task_id() == -1:  # no backward is running
        return True
    if loss_depends:
        raise RuntimeError(
            f"{type(module).__name__}: expected training_loss outside of torch.utils.checkpoint, "
            "whose second forward would see other statistics than the first"
        )
    return False


STEP = StepContext()
"""A step of which nothing is known but the batch."""
