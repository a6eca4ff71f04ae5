"""Finds and loads the compiled libraries, once, and gives every op a plain-torch stand-in."""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])

_INSTALL = "pip install --no-build-isolation ."

_warned: set[str] = set()
# Implementations that live as long as the process.
_fallbacks = torch.library.Library("fastsae", "FRAGMENT")


def find(name: str) -> Path | None:
    """Return the path of a compiled library of the package, or None.

    An editable install spreads the package over two folders, so all of its `__path__` counts.
    """
    for folder in sys.modules["fastsae"].__path__:
        path = Path(folder) / name
        if path.exists():
            return path
    return None


def _load(name: str, path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as e:
        built_for = "torch >= 2.11"
        raise RuntimeError(
            f"fastsae: expected {name} to load in torch {torch.__version__} (built for "
            f"{built_for}), got: {e}. Rebuild it with: {_INSTALL}"
        ) from None


def load_cpu() -> Path:
    """Load the CPU library, which also holds every schema."""
    path = find("libfastsae_cpu.so")
    if path is None:
        raise RuntimeError(
            "fastsae: expected the compiled library libfastsae_cpu.so in the package, found none. "
            f"Build it from the project folder with: {_INSTALL}"
        )
    _load("libfastsae_cpu.so", path)
    return path


def load_cuda() -> Path | None:
    """Load the CUDA library if it was built and this torch has CUDA; no GPU is touched."""
    path = find("libfastsae_cuda.so")
    if path is None or torch.version.cuda is None:
        return None
    _load("libfastsae_cuda.so", path)
    return path


def has_kernel(op: str, device_type: str) -> bool:
    """Return whether `op` has a native kernel for a device type such as "cpu" or "cuda"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"fastsae::{op}", key)
    )


def has_bf16() -> bool:
    """Return whether the CPU kernels multiply bfloat16 natively at the instruction set in use."""
    return bool(ctypes.CDLL(str(cpu_library)).fastsae_has_bf16())


def set_cuda_encode(way: str, library: Path | None = None) -> str:
    """Say how the CUDA encoders meet their pre-activations; for tests and measurements.

    Args:
        way: "rows" (the default), "hopper", "blocks" or "overlap", the latter two also with the
            sizes of a block, as in "blocks:2048x4096" (`docs/cuda.md`). The answers are the same,
            but for float32 sums that are in another order.
        library: the library that it is said to; None: the one that serves GPUs.

    Returns:
        What was in force before.

    Raises:
        RuntimeError: where that library was not built or not loaded.
        ValueError: for another `way`; nothing changes then.
    """
    ways = "rows, hopper, blocks, overlap, blocks:ROWSxLATENTS or overlap:ROWSxLATENTS "
    ways += "with latents a multiple of 64 up to 8192"
    return _set_cuda("encode", way, ways, library)


def set_cuda_adam(way: str, library: Path | None = None) -> str:
    """Say how the CUDA `sparse_adam_step_` gets the rows that it moves; for tests and measurements.

    Args:
        way: "direct" (the default), or "staged": they are copied into shared memory while the
            latent before is moved, where they fit (`docs/cuda.md`). Sums of squares are in another
            order where rows are so wide that blocks have more than 128 threads; all else is the
            same.
        library: the library that it is said to; None: the one that serves GPUs.

    Returns:
        What was in force before.

    Raises:
        RuntimeError: where that library was not built or not loaded.
        ValueError: for another `way`; nothing changes then.
    """
    return _set_cuda("adam", way, "direct or staged", library)


def _set_cuda(what: str, way: str, ways: str, library: Path | None) -> str:
    """Say the way of something to a library, and return what was in force there before."""
    library = library or cuda_library
    if library is None:
        raise RuntimeError(f"set_cuda_{what}: expected the library libfastsae_cuda.so, found none")
    loaded = ctypes.CDLL(str(library))
    said = loaded[f"fastsae_cuda_{what}"]
    said.restype = ctypes.c_char_p
    before = said().decode()
    if loaded[f"fastsae_set_cuda_{what}"](way.encode()) != 0:
        raise ValueError(f"set_cuda_{what}: expected way to be {ways}, got {way!r}")
    return str(before)


def fake(op: str) -> Callable[[F], F]:
    """Register what `op` returns for tensors without data: shapes, dtypes and strides."""
    return cast("Callable[[F], F]", torch.library.register_fake(f"fastsae::{op}"))


def fallback(op: str, *, slow: bool = True) -> Callable[[F], F]:
    """Register plain torch as `op` on every device that has no native kernel for it.

    Args:
        op: its name.
        slow: whether a GPU is told that a kernel is missing; False where plain torch is the way.
    """

    def register(f: F) -> F:
        def plain(*arguments: Any) -> Any:
            if slow:
                warn_if_slow(op, arguments)
            return _without_autocast(f, arguments)

        _fallbacks.impl(op, plain, "CompositeExplicitAutograd")
        return f

    return register


def composed(schema: str) -> Callable[[F], F]:
    """Define an op that is made of other ops, on every device."""

    def register(f: F) -> F:
        _fallbacks.define(schema)
        op = schema.partition("(")[0]

        def run(*arguments: Any) -> Any:
            return _without_autocast(f, arguments)

        _fallbacks.impl(op, run, "CompositeExplicitAutograd")
        return f

    return register


def _without_autocast(f: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call `f` as a kernel is called: autocast has been dealt with, and is off inside."""
    if not torch._C._is_any_autocast_enabled():
        return f(*arguments)
    device = next(a.device.type for a in arguments if isinstance(a, torch.Tensor))
    with torch.autocast(device, enabled=False):
        return f(*arguments)


def warn_if_slow(op: str, arguments: tuple[Any, ...]) -> None:
    """Warn, once for each op, that it runs as plain torch on a GPU for want of the CUDA library."""
    if op in _warned or not any(getattr(a, "is_cuda", False) for a in arguments):
        return
    _warned.add(op)
    warnings.warn(
        f"fastsae: {op} runs on cuda as plain torch, right but slow: expected the compiled library "
        f"libfastsae_cuda.so in the package, found none. With nvcc on the path: {_INSTALL}",
        RuntimeWarning,
        stacklevel=3,
    )


cpu_library = load_cpu()
cuda_library = load_cuda()
