"""Meshes of processes, and collectives over one of their dimensions."""

from __future__ import annotations

import atexit
import os
import weakref
from collections import Counter
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

NAMES = ("data", "latent")
TIMEOUT = timedelta(seconds=60)
"""After which a process that waits for another one gives up."""


def make_mesh(data: int, latent: int, device: str = "cpu") -> DeviceMesh:
    """Return a mesh of `data * latent` processes: those of this job.

    Processes that differ in `latent` alone have consecutive ranks. Joins the job first where that
    was not done, by what torchrun puts into the environment.

    Args:
        data: groups that tokens are split over.
        latent: processes of a group that latents are split over.
        device: cpu (gloo), or cuda (NCCL).

    Raises:
        ValueError: the job has another number of processes.
        RuntimeError: there is no job, or torch was built without `torch.distributed`.
    """
    if not dist.is_available():
        raise RuntimeError("make_mesh: expected torch with torch.distributed, got one without")
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched():
            raise RuntimeError(
                f"make_mesh: expected {data * latent} processes, started by `torchrun "
                f"--nproc-per-node {data * latent}`, or torch.distributed.init_process_group, "
                "got neither"
            )
        _join()
    if (world := dist.get_world_size()) != data * latent:
        raise ValueError(
            f"make_mesh: expected data * latent = {world} processes, got {data} * {latent}"
        )
    mesh = init_device_mesh(device, (data, latent), mesh_dim_names=NAMES)
    if not _MESHES:
        atexit.register(_leave)
    _MESHES.append(mesh)
    return mesh


_MESHES: list[DeviceMesh] = []
HOLDERS: weakref.WeakSet[Any] = weakref.WeakSet()
"""Objects that hold process groups, and `let_go` of them."""


def _leave() -> None:
    """Let go of all process groups before the interpreter ends.

    Those of gloo that end with it abort the process, in torch 2.13: a job would fail after its
    work was done.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    for holder in list(HOLDERS):
        holder.let_go()
    for mesh in _MESHES:
        getattr(mesh, "_pg_registry", {}).clear()


def _join() -> None:
    """Join the job that torchrun has started.

    After a restart (`--max-restarts`) torchrun of torch 2.13 hands out the store of the
    attempt before, in which gloo finds the addresses of processes that are gone: it fails to
    connect, or waits. So every attempt has names of its own there.
    """
    store, rank, world = next(iter(dist.rendezvous("env://")))  # type: ignore[attr-defined]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"fastsae_attempt_{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(store=store, rank=rank, world_size=world, timeout=TIMEOUT)


def check_mesh(mesh: DeviceMesh) -> None:
    """Raise ValueError unless `mesh` has the dimensions of `make_mesh`."""
    if not isinstance(mesh, DeviceMesh) or mesh.mesh_dim_names != NAMES:
        got = getattr(mesh, "mesh_dim_names", type(mesh).__name__)
        raise ValueError(f"shard_: expected a DeviceMesh with dimensions {NAMES}, got {got}")


_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name from torch 2.13 on, and before."""


class Peers:
    """The processes along one dimension of a mesh, this one among them.

    Args:
        mesh: of the job.
        name: of the dimension.
        used: counts collectives and the bytes that this process hands to them.
    """

    def __init__(self, mesh: DeviceMesh, name: str, used: Counter[str] | None = None) -> None:
        self.size: int = mesh.size(NAMES.index(name))
        self.rank: int = mesh.get_local_rank(name)
        self._group: Any = mesh.get_group(name)
        self._name, self._used = name, Counter() if used is None else used
        HOLDERS.add(self)

    def let_go(self) -> None:
        """Keep the process group no longer."""
        self._group = None

    def sum(self, t: Tensor) -> Tensor:
        """Return the sum over the processes, the same bits on each; `t` is not changed."""
        if self.size == 1:
            return t
        total = t.detach().clone(memory_format=torch.contiguous_format)
        self._count("all_reduce", total)
        self._wait(dist.all_reduce, total)
        return total

    def gather(self, t: Tensor) -> Tensor:
        """Return what all processes have, which is of one shape: [size, *t.shape]."""
        if self.size == 1:
            return t.detach().unsqueeze(0)
        t = t.detach().contiguous()
        every = t.new_empty(self.size, *t.shape)
        self._count("all_gather", t)
        self._wait(_ALL_GATHER, every.flatten(0, 1) if t.ndim else every, t)
        return every

    def _count(self, kind: str, t: Tensor) -> None:
        self._used[f"{kind} {self._name}"] += 1
        self._used["bytes"] += t.numel() * t.element_size()

    def _wait(self, collective: Any, *tensors: Tensor) -> None:
        try:
            collective(*tensors, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"fastsae: expected all {self.size} processes of the {self._name} dimension, but "
                f"one has ended or does not answer ({str(error).strip().splitlines()[0]})"
            ) from error
