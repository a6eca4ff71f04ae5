"""One run per folder: a lock that ends with the process, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = ".fastsae.lock"


@contextmanager
def locked(folder: Path, owner: str) -> Iterator[None]:
    """Keep other runs out of `folder`, which is made if needed.

    The lock is a `flock`, which the kernel releases when the process is gone. A file system that
    has none (some network ones) is used without.

    Raises:
        RuntimeError: another run has the folder, or it cannot be written.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked_file(path)
    except BlockingIOError:
        raise RuntimeError(
            f"{owner}: expected no other run in {folder}, got process {_holder(path)}; wait for "
            "it, or choose another folder"
        ) from None
    except OSError as error:
        raise RuntimeError(
            f"{owner}: expected a folder that can be written, got {folder} "
            f"({error.strerror or error})"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(file)


def try_lock(file: int) -> bool:
    """Lock an open file or folder; return whether nobody else has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF):
            raise
    return True


def _locked_file(path: Path) -> int:
    """Open and lock `path`; one that was deleted between the two is opened anew."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            if not try_lock(file):
                raise BlockingIOError
            if _is_at(path, file):
                os.ftruncate(file, 0)
                os.write(file, f"{os.getpid()}\n".encode())
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _is_at(path: Path, file: int) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(file)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _holder(path: Path) -> str:
    with suppress(OSError, ValueError):
        number = int(path.read_text())
        return f"{number} (this one)" if number == os.getpid() else str(number)
    return "unknown"
