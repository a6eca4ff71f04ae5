"""Write files that are either the old one or the whole new one, and are on the disk."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file so that it is either the old one or the whole new one, never a part.

    Raises:
        OSError: it cannot be written; what was there before is kept.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` as safetensors, row-major, and wait until they are on the disk."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file)
    sync(file)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: Exception) -> str:
    """Return the short cause of a failed write."""
    return getattr(error, "strerror", None) or str(error)
