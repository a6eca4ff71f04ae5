"""Compare every byte of a folder that fastsae wrote with its checksums."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastsae._files.read import TensorFile, check_seal, read_bytes, read_json
from fastsae._log import logger
from fastsae.data.shards import MANIFEST, PARTIAL, WAITING, open_shard, read_manifest, shard_from
from fastsae.interop import load
from fastsae.interop.folder import CONFIG, WEIGHTS
from fastsae.interpret.sample import CONTEXTS
from fastsae.train.checkpoint import STATE, checkpoints, load_checkpoint
from fastsae.train.metrics import METRICS, is_marked
from fastsae.train.trainer import RUN


@dataclass
class Verification:
    """What `verify` found."""

    kind: str
    """activations, run, checkpoint, SAE, or contexts."""
    checked: list[str] = field(default_factory=list)
    """Files of which every byte was compared, or folders of such files."""
    problems: list[str] = field(default_factory=list)
    """One line each: what was expected of which file, and where it differs."""

    @property
    def ok(self) -> bool:
        """Whether every file is what was written."""
        return not self.problems


def verify(path: str | os.PathLike[str]) -> Verification:
    """Check a store, a training run, a checkpoint, an SAE, and sampled contexts that lie there.

    All problems are collected, each with its file and, in tensors, the offset in bytes. Files of a
    version that wrote no checksums are a problem too: nothing can be said about them.

    Raises:
        FileNotFoundError: there is nothing of fastsae in that folder.
    """
    folder = Path(path)
    for kind, signs, check in (
        ("activations", (MANIFEST, PARTIAL), _store),
        ("checkpoint", (STATE,), _checkpoint),
        ("run", (RUN, METRICS, "checkpoints"), _run),
        ("SAE", (WEIGHTS, CONFIG), _sae),
        ("contexts", (CONTEXTS,), lambda *_: None),
    ):
        if any((folder / sign).exists() for sign in signs):
            found = Verification(kind)
            check(folder, found)
            if (folder / CONTEXTS).exists():
                with _collected(found, folder / CONTEXTS):
                    _tensors(TensorFile(folder / CONTEXTS, "verify"), found)
            return found
    what = "none of their files in it" if folder.is_dir() else "no such folder"
    raise FileNotFoundError(
        f"verify: expected a store, a run, a checkpoint, an SAE or contexts, got {folder}: {what}"
    )


def _store(folder: Path, found: Verification) -> None:
    for name in (MANIFEST, PARTIAL):
        if not (folder / name).exists():
            continue
        with _collected(found, folder / name):
            manifest, rest = read_manifest(folder / name)
            shards = [*manifest.shards]
            shards += [shard_from(s, WAITING, folder / name) for s in rest.get("waiting", [])]
            for shard in shards:
                with _collected(found, folder / shard.file):
                    _tensors(open_shard(folder, shard), found)


def _run(folder: Path, found: Verification) -> None:
    for checkpoint in checkpoints(folder / "checkpoints"):
        _checkpoint(checkpoint, found)
    if (folder / WEIGHTS).exists() or (folder / CONFIG).exists():
        _sae(folder, found)
    if (folder / RUN).exists():
        with _collected(found, folder / RUN):
            end = read_json(folder / RUN, "verify")
            check_seal(end, folder / RUN, "verify")
            TensorFile(folder / WEIGHTS, "verify", end[WEIGHTS])
            with _collected(found, folder / METRICS):
                _metrics(folder / METRICS, end[METRICS], whole=True)
        return
    for checkpoint in checkpoints(folder / "checkpoints")[:1]:
        with _collected(None, checkpoint):
            mark = load_checkpoint(checkpoint)["metrics"]
            with _collected(found, folder / METRICS):
                _metrics(folder / METRICS, mark, whole=False)


def _metrics(path: Path, mark: dict[str, int | str] | None, *, whole: bool) -> None:
    data = read_bytes(path, "verify")
    if mark is None or not is_marked(data, mark) or (whole and len(data) != mark["bytes"]):
        raise ValueError(f"verify: expected {path} as the run wrote it, got another content")


def _checkpoint(folder: Path, found: Verification) -> None:
    with _collected(found, folder / STATE):
        load_checkpoint(folder)
    if not any(folder.glob("shard-*")):  # one of several processes holds no SAE
        _sae(folder, found)


def _sae(folder: Path, found: Verification) -> None:
    with _collected(found, folder):
        notes: list[str] = []
        with _listening(notes.append):
            load(folder)
        if notes:
            raise ValueError(f"verify: {'; '.join(notes)}")
        if TensorFile(folder / WEIGHTS, "verify").seal is None:
            raise ValueError(f"verify: expected {folder / WEIGHTS} to have checksums, got none")


def _tensors(file: TensorFile, found: Verification) -> None:
    if file.seal is None:
        raise ValueError(f"verify: expected {file.path} to have checksums, got none")
    bad = []
    for name in file.shapes:
        try:
            file.tensor(name)
        except ValueError as error:
            bad.append(str(error))
    found.problems += bad[1:]
    if bad:
        raise ValueError(bad[0])


@contextmanager
def _collected(found: Verification | None, path: Path) -> Iterator[None]:
    """Put what goes wrong with `path` into the report, and go on."""
    try:
        yield
    except (ValueError, OSError) as error:
        if found is not None:
            found.problems.append(str(error))
    else:
        if found is not None:
            found.checked.append(str(path))


@contextmanager
def _listening(take: Callable[[str], None]) -> Iterator[None]:
    """Give the warnings of fastsae to `take` instead of a handler."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "of step" not in record.getMessage():  # a checkpoint may be half-way
                take(record.getMessage())

    handler, propagate = Handler(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
