"""Write files that are either the old ones or the whole new ones, and are on the disk.

Everything is written under a name that nobody can guess, reaches the disk, and is then renamed. A
symlink that stands where a file is to be is replaced, not followed. What a killed process leaves
under such a name is removed by the next one that writes into the folder.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastsae._files import checksum
from fastsae._files.lock import try_lock

PREFIX = ".fastsae-"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of safetensors."""
OVERLAPPED = 1 << 24
"""Bytes of tensors from which checksums are made while the disk works."""
NO_SUM = "0" * 16


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yield a new folder inside `folder` to write into; what is still there at the end is removed.

    Give the files their place with `publish`, or rename the folder as a whole.
    """
    sweep(folder)
    path, handle = _new_folder(folder)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def publish(stage: Path, folder: Path, names: Sequence[str]) -> None:
    """Move the files `names` from a staging folder into `folder`, in this order."""
    for name in names:
        os.replace(stage / name, folder / name)
    sync(folder)


def publish_folder(stage: Path, final: Path) -> None:
    """Give a whole staging folder its name; a folder of that name is removed."""
    sync(stage)
    if final.is_symlink() or final.exists():
        remove(final)
    os.rename(stage, final)
    sync(final.parent)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file so that it is either the old one or the whole new one, never a part.

    Raises:
        OSError: it cannot be written; what was there before is kept.
    """
    path = Path(path)
    with staging(path.parent) as stage:
        write_file(stage / path.name, data)
        publish(stage, path.parent, [path.name])


def write_file(path: Path, data: bytes | str) -> None:
    """Write a new file and wait until it is on the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as JSON, atomically."""
    write_atomic(path, as_json(value))


def as_json(value: Any) -> str:
    """Return `value` as the text of a JSON file."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Return JSON values with the checksum that `read.check_seal` looks for."""
    return {**value, "checksum": checksum.of_json(value)}


def write_tensors(file: Path, tensors: dict[str, Tensor], about: Any = None) -> str:
    """Write a new file of `tensors`, row-major, with their checksums, and wait for the disk.

    Args:
        file: in a staging folder.
        tensors: on any device.
        about: JSON values that the file is to say of itself.

    Returns:
        The seal of the file: a checksum of names, dtypes, shapes, `about` and all numbers.
    """
    tensors = _apart({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    if sum(t.nbytes for t in tensors.values()) < OVERLAPPED:
        seal, text = _header(
            tensors, about, {name: checksum.of_tensor(t) for name, t in tensors.items()}
        )
        _save(file, tensors, f"{seal} {text}")
        sync(file)
        return seal
    # Sums of the same length first; the true ones are made while the disk writes the tensors.
    blank = {name: [NO_SUM] * -(-t.nbytes // checksum.BLOCK) for name, t in tensors.items()}
    before = " ".join(_header(tensors, about, blank))
    _save(file, tensors, before)
    _start_writing(file)
    sums = {name: checksum.of_tensor(t) for name, t in tensors.items()}
    seal, text = _header(tensors, about, sums)
    _patch(file, before, f"{seal} {text}")
    sync(file)
    return seal


def remove(path: Path) -> None:
    """Remove a file or folder such that it is never seen in part."""
    grave = _name(path.parent)
    os.rename(path, grave)
    if grave.is_dir() and not grave.is_symlink():
        shutil.rmtree(grave, ignore_errors=True)
    else:
        grave.unlink()


def sweep(folder: Path) -> None:
    """Remove what killed processes have left in `folder` under the names of this module."""
    with suppress(OSError):
        for path in folder.glob(f"{PREFIX}*"):
            with suppress(OSError):
                _sweep_one(path)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def own_folder(path: Path) -> Path:
    """Make the folder `path` inside one of ours.

    Raises:
        NotADirectoryError: something else is there, or a symlink, which may lead anywhere.
    """
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise NotADirectoryError(20, f"expected a folder, got a symlink: {path}")
    return path


def reason(error: Exception) -> str:
    """Return the short cause of a failed write."""
    return getattr(error, "strerror", None) or str(error)


def _header(tensors: dict[str, Tensor], about: Any, sums: dict[str, list[str]]) -> tuple[str, str]:
    """Return the seal of a tensor file, and what the file says beside it."""
    layout = {name: [DTYPES[t.dtype], [*t.shape]] for name, t in tensors.items()}
    text = json.dumps({"about": about, "block": checksum.BLOCK, "sums": sums}, sort_keys=True)
    return checksum.of_json([layout, text]), text


def _save(file: Path, tensors: dict[str, Tensor], text: str) -> None:
    # One entry: safetensors writes several in an order that differs from run to run.
    save_file(tensors, file, {"fastsae": text})
    os.chmod(file, os.stat(file.parent).st_mode & 0o666)  # safetensors writes for the owner only


def _start_writing(path: Path) -> None:
    """Let the disk begin with what was written to a file, without waiting for it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _patch(path: Path, before: str, after: str) -> None:
    """Replace a text in the header of a tensor file by another one of the same length."""
    old, new = (json.dumps(text)[1:-1].encode() for text in (before, after))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        place = file.read(length).index(old)
        if len(old) != len(new):
            raise ValueError(f"write_tensors: expected {len(old)} bytes, got {len(new)}")
        file.seek(8 + place)
        file.write(new)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without shared memory, which safetensors refuses."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        if place in seen:
            tensors[name] = tensor.clone()
        seen.add(place)
    return tensors


def _name(folder: Path) -> Path:
    return folder / f"{PREFIX}{secrets.token_hex(8)}"


def _new_folder(folder: Path) -> tuple[Path, int]:
    """Make a folder and lock it, which tells `sweep` that somebody works in it."""
    while True:
        path = _name(folder)
        path.mkdir()
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if try_lock(handle) and path.exists():
            return path, handle
        os.close(handle)


def _sweep_one(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if try_lock(handle):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(handle)
