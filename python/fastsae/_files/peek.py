"""Look at what files hold without reading their tensors, and without making any object.

Whatever is wrong with a file gives no names here; who reads it says what.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path

from fastsae._files.read import TensorFile

LARGEST_PICKLE = 1 << 20
"""Bytes of a pickle that are looked at; that of an SAE has a few thousand."""
LARGEST_LINE = 1 << 16
PICKLES = 4
"""Pickles in a row at the start of a file of torch < 1.6; the last one holds the object."""


def tensor_names(path: Path) -> frozenset[str]:
    """Return the names of the tensors of a safetensors file, from its header."""
    if not path.is_file():
        return frozenset()
    try:
        return frozenset(TensorFile(path, "peek").shapes)
    except ValueError:
        return frozenset()


def pickled_names(path: Path) -> frozenset[str]:
    """Return every string and class that the pickle in a file of torch.save names.

    Keys of a dictionary are among them. Opcodes are read one by one and not executed.
    """
    if not path.is_file():
        return frozenset()
    names: set[str] = set()
    try:
        data, pickles = _pickle(path)
        stream = io.BytesIO(data)
        for _ in range(pickles):
            names |= {arg for _, arg, _ in pickletools.genops(stream) if isinstance(arg, str)}
    except Exception:  # zipfile, zlib and pickletools raise what they come across
        pass
    return frozenset(names)


def json_line(path: Path) -> bytes | None:
    """Return the line of JSON in front of a file of torch.save; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        if file.read(1) != b"{":
            return None
        line = b"{" + file.readline(LARGEST_LINE)
        rest = file.read(4)
    return line if line.endswith(b"\n") and rest.startswith((b"PK\x03\x04", b"\x80")) else None


def _pickle(path: Path) -> tuple[bytes, int]:
    """Return the bytes in front that hold pickles, and how many pickles those are at most."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            data = file.read(LARGEST_PICKLE)
        return (data, PICKLES) if data.startswith(b"\x80") else (b"", 0)
    with zipfile.ZipFile(path) as archive:
        held = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if not held:
            return b"", 0
        with archive.open(held[0]) as file:
            return file.read(LARGEST_PICKLE), 1
