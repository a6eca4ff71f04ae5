"""Hooks and threads: a hook is on its module for every thread that runs it, also where it must not.

A stream runs a model in a thread of its own, while others may run it too, with hooks of theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

_local = threading.local()


@contextmanager
def alone() -> Iterator[None]:
    """Keep hooks that other threads set out of what this one runs."""
    before = getattr(_local, "alone", False)
    _local.alone = True
    try:
        yield
    finally:
        _local.alone = before


@contextmanager
def probing() -> Iterator[None]:
    """Keep hooks that were set before out of what this thread runs meanwhile."""
    before = getattr(_local, "probe", None)
    _local.probe = object()
    try:
        yield
    finally:
        _local.probe = before


def not_elsewhere(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that does nothing in a thread that runs alone, unless that one made it, nor
    while a model is probed, unless it is the probe's."""
    owner, probe = threading.get_ident(), getattr(_local, "probe", None)

    @wraps(hook)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if getattr(_local, "alone", False) and threading.get_ident() != owner:
            return None
        now = getattr(_local, "probe", None)
        if now is not None and now is not probe:
            return None
        return hook(*args, **kwargs)

    return checked


def only_here(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that does nothing in another thread than the one that made it."""
    owner = threading.get_ident()

    @wraps(hook)
    def checked(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == owner else None

    return checked
