"""Read files and believe nothing of them: kind, size, checksums, types, ranges, shapes.

Whatever is wrong is one ValueError (FileNotFoundError where nothing is) that names the file.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import stat
import unicodedata
import zipfile
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastsae._files import checksum
from fastsae._log import logger

LARGEST_JSON = 1 << 28
LARGEST_YAML = 1 << 17
READ_AT_ONCE = 1 << 24
NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def read_bytes(path: Path, owner: str) -> bytes:
    """Return the content of a regular file; a pipe or device is refused instead of waited for.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no regular file, or cannot be read.
    """
    handle = _open(path, owner)
    with os.fdopen(handle, "rb") as file:
        return file.read()


def read_json(path: Path, owner: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        FileNotFoundError, ValueError: as in `read_bytes`; also when it is no JSON object.
    """
    data = read_bytes(path, owner)
    try:
        if len(data) > LARGEST_JSON:
            raise ValueError(f"{len(data)} bytes")
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{owner}: expected {path} to be JSON, got {_short(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{owner}: expected {path} to be a JSON object, got {_kind(value)}")
    return value


def read_yaml(path: Path, owner: str) -> dict[str, Any]:
    """Return the mapping in a YAML file of plain values.

    Raises:
        FileNotFoundError, ValueError: as in `read_bytes`; also when it is no such mapping.
        ModuleNotFoundError: PyYAML is not installed.
    """
    data = read_bytes(path, owner)
    try:
        yaml: Any = import_module("yaml")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{owner}: expected PyYAML to be installed for {path}: pip install pyyaml"
        ) from None
    try:
        if len(data) > LARGEST_YAML:
            raise ValueError(f"{len(data)} bytes")
        value = yaml.safe_load(data)
        _count(value, LARGEST_YAML)
    except Exception as error:  # yaml raises what dates, numbers and encodings raise
        raise ValueError(f"{owner}: expected {path} to be YAML, got {_short(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{owner}: expected {path} to be a YAML mapping, got {_kind(value)}")
    return {str(name): item for name, item in value.items()}


def _count(value: Any, left: int) -> int:
    """Return how much of `left` remains when values are counted as often as aliases repeat them."""
    held = [*value, *value.values()] if isinstance(value, dict) else value
    if isinstance(held, (list, tuple, set)):
        for item in held:
            left = _count(item, left - 1)
    if left < 0:
        raise ValueError("aliases that make more of it than there is")
    return left


def check_seal(value: dict[str, Any], path: Path, owner: str) -> None:
    """Check and remove the checksum of `write.sealed`.

    Raises:
        ValueError: there is none, or the values are not those that were written.
    """
    if "checksum" not in value:
        raise ValueError(f"{owner}: expected {path} to have a checksum, got none")
    expected, got = value.pop("checksum"), checksum.of_json(value)
    if expected != got:
        raise ValueError(
            f"{owner}: expected the checksum {_short(expected)} of {path}, got {got}; it was "
            "damaged or edited"
        )


def field(
    values: dict[str, Any],
    name: str,
    kind: type,
    path: Path,
    owner: str,
    *,
    least: float | None = None,
    choices: Collection[Any] | None = None,
) -> Any:
    """Return `values[name]`, which was read from `path`, after a look at its type and range.

    An int counts as a float, a bool not as an int; numbers are finite.

    Raises:
        ValueError: it is missing, of another type, or out of range.
    """
    got = values.get(name)
    right = isinstance(got, (float, int) if kind is float else kind)
    right = right and (not isinstance(got, bool) or kind is bool)
    if right and isinstance(got, (int, float)) and not isinstance(got, bool):
        right = math.isfinite(got) and (least is None or got >= least)
    if right and choices is not None:
        right = got in choices
    if right:
        return got
    what = kind.__name__
    if choices is not None:
        what = f"one of {', '.join(map(str, choices))}"
    if least is not None:
        what += f" >= {least}"
    found = _short(repr(got)) if name in values else "none"
    raise ValueError(f"{owner}: expected {name} in {path} to be {what}, got {found}")


class TensorFile:
    """A safetensors file; its header is checked when it is opened, a tensor when it is read.

    Args:
        path: the file.
        owner: in whose name errors speak.
        seal: what `write_tensors` returned for it; None does not compare.

    Raises:
        FileNotFoundError, ValueError: it is not there, damaged, or another file.
    """

    def __init__(self, path: Path, owner: str, seal: str | None = None) -> None:
        self.path, self._owner = path, owner
        os.close(_open(path, owner))
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self.dtypes = {name: str(s.get_dtype()) for name, s in slices.items()}
                self.shapes = {name: list(s.get_shape()) for name, s in slices.items()}
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise self._damaged(f"to be a whole safetensors file, got {_short(error)}") from None
        mark, _, text = metadata.get("fastsae", "").partition(" ")
        self.seal: str | None = mark or None
        """As `write_tensors` returned it; None: the file holds no checksums."""
        self.about: Any = None
        """What the file says of itself."""
        self._sums: dict[str, list[str]] = {}
        if self.seal is not None:
            self._check_header(text)
        if seal is not None and self.seal != seal:
            raise self._damaged(f"to be the file with the seal {seal}, got {self.seal}")

    def tensor(self, name: str, *, verify: bool = True) -> Tensor:
        """Return a tensor on the CPU, mapped from the file, after a look at its checksums.

        Raises:
            ValueError: it is not there, or its numbers are not those that were written.
        """
        if name not in self.shapes:
            raise self._damaged(f"to hold {name}, got {', '.join(self.shapes) or 'nothing'}")
        tensor = self._get([name])[name]
        if verify and self.seal is not None:
            self._compare(name, checksum.of_tensor(tensor))
        return tensor

    def read_into(self, name: str, out: Tensor, *, verify: bool = True) -> None:
        """Read a tensor into contiguous memory of its dtype and shape on the CPU.

        A second thread verifies a block while the next one is read.

        Raises:
            ValueError: as in `tensor`; `out` then holds what was read.
        """
        data, start = checksum.as_bytes(out), self.offset(name)
        verify = verify and self.seal is not None
        handle = _open(self.path, self._owner)
        try:
            with ThreadPoolExecutor(1) as pool:
                sums = []
                for at in range(0, len(data), checksum.BLOCK):
                    block = data[at : at + checksum.BLOCK]
                    if os.preadv(handle, [block], start + at) != len(block):
                        raise self._damaged(f"to hold all of {name}, got the end of the file")
                    if verify:
                        sums.append(pool.submit(checksum.of_block, block))
                got = [found.result() for found in sums]
        except OSError as error:
            raise self._damaged(f"to be readable, got {error.strerror or error}") from None
        finally:
            os.close(handle)
        if verify:
            self._compare(name, got)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, checked."""
        found = self._get(self.shapes)
        if self.seal is not None:
            for name, tensor in found.items():
                self._compare(name, checksum.of_tensor(tensor))
        return found

    def offset(self, name: str) -> int:
        """Return where in the file the numbers of a tensor begin, in bytes."""
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        return int(8 + length + header[name]["data_offsets"][0])

    def _get(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors mapped from the file, whose header is read once."""
        try:
            with safe_open(self.path, "pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise self._damaged(f"to be a whole safetensors file, got {_short(error)}") from None

    def _compare(self, name: str, got: list[str]) -> None:
        """Raise ValueError where checksums are not those that were written."""
        if got == self._sums[name]:
            return
        pairs = zip(got, self._sums[name], strict=False)
        bad = next((i for i, (a, b) in enumerate(pairs) if a != b), 0)
        raise self._damaged(
            f"to hold {name} as it was written, got other bytes from offset "
            f"{self.offset(name) + bad * checksum.BLOCK}"
        )

    def _check_header(self, text: str) -> None:
        layout = {name: [self.dtypes[name], self.shapes[name]] for name in self.shapes}
        if checksum.of_json([layout, text]) != self.seal:
            raise self._damaged("to have the header that was written, got another one")
        values = json.loads(text)
        self.about, self._sums = values["about"], values["sums"]
        if values["block"] != checksum.BLOCK:
            raise self._damaged(
                f"to have checksums of {checksum.BLOCK} bytes, got {values['block']}; update "
                "fastsae"
            )

    def _damaged(self, expected: str) -> ValueError:
        return ValueError(f"{self._owner}: expected {self.path} {expected}")


def note_without_checksums(path: Path, owner: str, what: str) -> None:
    """Log that `path` was written by a version without checksums."""
    logger.warning(
        "%s: %s holds no checksums, so damage goes unnoticed; %s writes them", owner, path, what
    )


def printable(text: str) -> str:
    """Return text from a file with what controls a terminal or the order of letters escaped."""
    return "".join(_escaped(c) if _controls(c) else c for c in text)


def visible(text: str) -> str:
    """Return `printable` text in which line breaks and tabs are signs."""
    for blank, sign in (("\r\n", "↵"), ("\n", "↵"), ("\r", "↵"), ("\t", "⇥")):
        text = text.replace(blank, sign)
    return printable(text)


def _controls(c: str) -> bool:
    bidi = unicodedata.bidirectional(c)
    return unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or bidi in BIDI_CONTROLS


def _escaped(c: str) -> str:
    return c.encode("unicode_escape", "surrogatepass").decode()


def _open(path: Path, owner: str) -> int:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FileNotFoundError(f"{owner}: expected {path}, found none") from None
    except OSError as error:
        raise ValueError(
            f"{owner}: expected {path} to be readable, got {error.strerror or error}"
        ) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{owner}: expected {path} to be a regular file, got another kind")
    return handle


def _kind(value: Any) -> str:
    return type(value).__name__


def _short(value: Any) -> str:
    text = " ".join(printable(str(value)).split())
    return text if len(text) <= 120 else text[:117] + "..."


def read_torch(
    path: Path, owner: str, *, allow_pickle: bool = False, skip: int = 0
) -> dict[str, Any]:
    """Return the dictionary in a file of `torch.save`, its tensors on the CPU.

    Args:
        path: the file.
        owner: in whose name errors speak.
        allow_pickle: whether objects of any class are made, for which the file may run any code.
        skip: bytes in front that are not torch's.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, holds something else, or needs `allow_pickle`.
    """
    os.close(_open(path, owner))
    try:
        file = io.BytesIO(read_bytes(path, owner)[skip:]) if skip else path
        value = torch.load(file, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "not an allowed global" in text or "is blocked" in text:
            raise ValueError(
                f"{owner}: expected {path} to hold tensors, lists and numbers only, got objects of "
                "other classes, whose file may run any code when it is read; if you trust it, "
                "give allow_pickle=True"
            ) from None
        cause = text.rpartition("WeightsUnpickler error:")[2].partition("Check the doc")[0]
        raise ValueError(
            f"{owner}: expected {path} to be a whole file of torch.save, got {_short(cause)}"
        ) from None
    except Exception as error:  # torch and pickle raise what they come across in damaged files
        raise ValueError(
            f"{owner}: expected {path} to be a whole file of torch.save, got "
            f"{type(error).__name__}: {_short(error)}"
        ) from None
    if isinstance(value, torch.nn.Module):
        return {"module": value}
    if not isinstance(value, dict):
        raise ValueError(f"{owner}: expected {path} to hold a dictionary, got {_kind(value)}")
    return {str(name): item for name, item in value.items()}


def read_npz(path: Path, owner: str) -> dict[str, Tensor]:
    """Return the floating arrays in a file of `numpy.savez`, on the CPU; nothing is unpickled.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or holds something else.
    """
    os.close(_open(path, owner))
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                info.filename.removesuffix(".npy"): _read_npy(archive, info)
                for info in archive.infolist()
            }
    except Exception as error:  # zipfile and numpy raise what they come across in damaged files
        raise ValueError(
            f"{owner}: expected {path} to be a whole file of numpy.savez, got "
            f"{type(error).__name__}: {_short(error)}"
        ) from None


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    """Return one array; its header may not promise more bytes than there are."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in NPY_HEADERS:
            raise ValueError(f"version {version} of {info.filename}")
        shape, fortran_order, dtype = NPY_HEADERS[version](file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind != "f" or min(shape, default=0) < 0 or size > info.file_size:
            raise ValueError(f"{dtype} {list(shape)} in {info.file_size} bytes as {info.filename}")
        data = bytearray(size)
        got = 0
        while part := file.read(min(READ_AT_ONCE, size - got)):
            data[got : got + len(part)] = part
            got += len(part)
    if got != size:
        raise ValueError(f"{got} of {size} bytes of {info.filename}")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")
    native = np.ascontiguousarray(array, dtype.newbyteorder("="))
    return torch.from_numpy(native).reshape(shape)
