"""Tensors of a spread SAE on disk, through `torch.distributed.checkpoint`.

Every process writes the rows it holds, as safetensors (`HuggingFaceStorageWriter`), and reads those
it needs, whoever wrote them: by any number of processes, this one alone included. Nothing is
pickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate, Shard

from fastsae._files.write import sync
from fastsae.distributed.layout import Layout
from fastsae.distributed.shard import BY_LATENT

COUNTERS = ("tokens_since_fired",)
SUFFIX = ".safetensors"


def is_by_latent(name: str, t: Tensor | torch.Size) -> bool:
    """Return whether a tensor of a trainer's state, `part.of.its.name`, has a row per latent."""
    shape = t if isinstance(t, torch.Size) else t.shape
    return len(shape) > 0 and any(part in BY_LATENT + COUNTERS for part in name.split("."))


def save_tensors(
    stage: Path, tensors: dict[str, Tensor], layout: Layout, group: Any = None
) -> dict[str, str]:
    """Write what all processes hold into the folder `stage`.

    Args:
        stage: on a file system that all processes see.
        tensors: by name; those that are `is_by_latent` are the rows of the latents here, all others
            the same everywhere.
        layout: of the SAE.
        group: of all processes, to write by; None: the default one.

    Returns:
        The checksum of every file.
    """
    writer = HuggingFaceStorageWriter(str(stage), save_distributed=True)
    state = {name: _spread(name, t, layout) for name, t in tensors.items()}
    with _quiet():
        save(state, storage_writer=writer, process_group=group)
    own = {
        path.name: str(_checksum(path))
        for path in sorted(stage.glob(f"shard-{layout.mesh.get_rank() + 1:05d}-*{SUFFIX}"))
    }
    for name in own:
        sync(stage / name)
    every: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, own, group=group)
    return {name: found for part in every for name, found in part.items()}


def load_tensors(folder: Path, seals: dict[str, str], layout: Layout | None) -> dict[str, Tensor]:
    """Return what `save_tensors` wrote, or a plain safetensors file holds: the rows of the latents
    here, or without a layout all.

    Args:
        folder: of the files.
        seals: their checksums, each of which one process compares.
        layout: of the SAE.

    Raises:
        FileNotFoundError, ValueError: a file is missing or is not the one that was written.
    """
    _compare(folder, seals, layout)
    reader = HuggingFaceStorageReader(str(folder))
    sizes = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {}
    for name, about in sizes.items():
        shape, dtype = about.size, about.properties.dtype  # type: ignore[union-attr]
        if layout is None or not is_by_latent(name, shape):
            state[name] = torch.empty(shape, dtype=dtype)
        else:
            part = torch.empty(layout.held, *shape[1:], dtype=dtype)
            state[name] = _as_part(part.to(layout.mesh.device_type), layout)
    with _quiet():
        load(state, storage_reader=reader, no_dist=layout is None)
    return {name: t.to_local() if isinstance(t, DTensor) else t for name, t in state.items()}


def own_rows(tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return the rows of the latents here of a whole state."""
    own = layout.of_own_latents
    return {name: own(t) if is_by_latent(name, t) else t for name, t in tensors.items()}


def _compare(folder: Path, seals: dict[str, str], layout: Layout | None) -> None:
    rank, size = (0, 1) if layout is None else (layout.mesh.get_rank(), dist.get_world_size())
    wrong = [
        name
        for i, (name, expected) in enumerate(sorted(seals.items()))
        if i % size == rank and _checksum(folder / name) != expected
    ]
    every: list[list[str]] = [wrong]
    if layout is not None:
        every = [[] for _ in range(size)]
        dist.all_gather_object(every, wrong)
    if found := sorted(name for part in every for name in part):
        name = found[0]
        if not (folder / name).is_file():
            raise FileNotFoundError(f"Trainer: expected {folder / name}, which is not there")
        raise ValueError(
            f"Trainer: expected {folder / name} with the checksum {seals[name]}, got another; it "
            "was damaged or edited"
        )


def _spread(name: str, t: Tensor, layout: Layout) -> Tensor:
    if not is_by_latent(name, t):
        return t.detach()
    return _as_part(t.detach(), layout)


def _as_part(part: Tensor, layout: Layout) -> DTensor:
    shape = torch.Size([layout.d_sae, *part.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    where = [Replicate(), Shard(0)]
    return DTensor.from_local(part, layout.mesh, where, run_check=False, shape=shape, stride=stride)


def _checksum(path: Path) -> str | None:
    if not path.is_file():
        return None
    total = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            total.update(block)
    return str(total.hexdigest())


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch says of planners and of a missing process group."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
