"""Compiled models: hooks that are set after compilation are ignored, so run them uncompiled."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_lock = threading.Lock()
_inside = 0
_stance: Any = None


def is_compiled(model: nn.Module) -> bool:
    """Return whether a model, one of its modules or a forward of them is compiled."""
    if "torch._dynamo" not in sys.modules:
        return False
    return any(
        "_orig_mod" in module._modules
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled functions as they were before compilation meanwhile, if a model is compiled.

    It is so for all threads, until the last of those that are inside leaves.
    """
    if not is_compiled(model):
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside, _stance
    with _lock:
        if _inside == 0:
            _stance = torch.compiler.set_stance("force_eager")
        _inside += 1


def _leave() -> None:
    global _inside, _stance
    with _lock:
        _inside -= 1
        if _inside == 0:
            _stance.__exit__(None, None, None)
            _stance = None
