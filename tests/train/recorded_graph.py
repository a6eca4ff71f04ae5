"""A stand-in for a CUDA graph on the CPU: what was started in one run is started again.

Recording keeps every call that comes to the dispatcher with the tensors that it was given. A replay
makes the same calls on the same memory: a number that Python has read or worked out, such as a
learning rate, is the one of the recording, as it is in a graph. What cannot be in a graph raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

ASKING = {
    "aten._local_scalar_dense.default",
    "aten.equal.default",
    "aten.is_nonzero.default",
    "aten.masked_select.default",
    "aten.nonzero.default",
    "aten.repeat_interleave.Tensor",
    "aten._unique2.default",
    "aten.unique_consecutive.default",
}
"""Reads a number, or returns what has a shape that depends on one."""
FROM_THE_HOST = {
    "aten.lift_fresh.default",
    "aten.lift_fresh_copy.default",
    "aten._pin_memory.default",
}
"""A tensor from Python numbers: a copy from memory that is gone at the replay."""
MOVING = {"aten.resize_.default", "aten.set_.source_Storage", "aten.set_.source_Tensor"}


def asks(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether a call waits for the device."""
    masks = str(func).startswith("aten.index") and any(
        isinstance(i, Tensor) and i.dtype == torch.bool
        for i in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
    )
    return str(func) in ASKING or masks


class NotForGraphs(Exception):
    """What a graph cannot hold."""


def _unseen(*_: object) -> None:
    raise NotForGraphs("numbers are read past the dispatcher")


class _Calls(TorchDispatchMode):
    """Keeps all calls, and what they write to that was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if asks(func, args) or str(func) in FROM_THE_HOST | MOVING:
            raise NotForGraphs(str(func))
        for t in written(func, args, kwargs):
            storage = t.untyped_storage()
            if storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that a call writes to."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        yield from (t for t in pytree.tree_leaves(given) if isinstance(t, Tensor))


class RecordedGraph:
    """See `captured_step.Graph`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.counts: Counter[str] = Counter()
        """How often steps were run, recorded and replayed."""

    def warm_up(self, run):
        self.counts["warm_up"] += 1
        return run()

    def record(self, run):
        self.counts["record"] += 1
        rng = torch.get_rng_state()
        with _Calls() as found, patch.multiple(Tensor, tolist=_unseen, numpy=_unseen):
            out = run()
        for storage, before in found.before.values():
            storage.copy_(before)
        torch.set_rng_state(rng)
        self.calls = found.calls
        for t in tensors(out):  # nothing of the recording may be left to be read
            if t.is_floating_point():
                t.detach().fill_(float("nan"))
        return out

    @torch.no_grad()
    def replay(self):
        self.counts["replay"] += 1
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tensors(out), tensors(again), strict=True):
                    if old.shape != new.shape or old.stride() != new.stride():
                        raise NotForGraphs(f"{func}: {old.shape} became {new.shape}")
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in what a call returns, or in a step's result."""
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]
