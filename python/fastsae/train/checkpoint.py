"""Checkpoints: everything an exact continuation needs, complete on disk or not there at all.

    checkpoints/step_000001000/
        cfg.json, sae_weights.safetensors   the SAE for raw activations; `fastsae.load` reads it
        state.safetensors                   the tensors of `Trainer.state_dict()`
        state.json                          the rest of it, the settings of the run, and the seals
                                            of the two tensor files

or, of a run over a mesh of processes,

        shard-*.safetensors                 tensors of the state, the rows that each process held
        state.json                          as above, with the checksums of these files

A checkpoint is written under another name, reaches the disk, and is then renamed; one that is no
longer wanted is renamed before it is deleted. So a folder `step_*` that cannot be read was damaged,
and is named instead of being passed over. Nothing is pickled.
"""

from __future__ import annotations

import math
import re
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor, distributed

from fastsae._files.read import TensorFile, check_seal, field, read_json
from fastsae._files.write import (
    as_json,
    own_folder,
    publish_folder,
    reason,
    remove,
    sealed,
    staging,
    write_file,
    write_tensors,
)
from fastsae.interop.folder import WEIGHTS, contents, write_files
from fastsae.nn import SAE

if TYPE_CHECKING:
    from fastsae.distributed import Layout

TENSORS, STATE = "state.safetensors", "state.json"
NAME = re.compile(r"step_(\d{9,})")
FORMAT = 4
"""Development versions of 0.1.0 wrote no format or 2: other names, and no checksums; or 3: no rows
were held back from training."""


def save_checkpoint(
    folder: Path, sae: SAE, state: dict[str, Any], keep: int, steps: int | None = None
) -> Path:
    """Write checkpoint `state["step"]` into `folder`, then delete all but the newest `keep`.

    Args:
        folder: of all checkpoints of the run.
        sae: the module for raw activations.
        state: from `Trainer.state_dict`.
        keep: how many stay.
        steps: of the whole run, for `fastsae.load` to say how far the module has come.

    Raises:
        RuntimeError: it cannot be written; the checkpoints that were there are untouched.
    """
    final = folder / f"step_{state['step']:09d}"
    tensors: dict[str, Tensor] = {}
    values = _without_tensors(state, "", tensors)
    progress = None if steps is None else {"step": state["step"], "steps": steps}
    try:
        own_folder(folder)
        with staging(folder) as stage:
            weights = write_files(stage, *contents(sae, progress))
            seals = {WEIGHTS: weights, TENSORS: write_tensors(stage / TENSORS, tensors)}
            header = {"format": FORMAT, "seals": seals}
            write_file(stage / STATE, as_json(sealed({**header, "state": values})))
            publish_folder(stage, final)
    except (OSError, SafetensorError) as error:
        raise _not_written(final, error) from error
    prune(folder, keep)
    return final


def save_spread_checkpoint(
    folder: Path, state: dict[str, Any], keep: int, layout: Layout, group: Any = None
) -> Path:
    """Write checkpoint `state["step"]` of a run over a mesh, which all processes call.

    Args:
        folder: of all checkpoints of the run, on a file system that all processes see.
        state: from `Trainer.state_dict` of each.
        keep: how many stay.
        layout: of the SAE.
        group: of all processes, to write by; None: the default one.

    Raises:
        RuntimeError: as `save_checkpoint`.
    """
    from fastsae.distributed.checkpoint import save_tensors

    first = layout.mesh.get_rank() == 0
    final = folder / f"step_{state['step']:09d}"
    tensors: dict[str, Tensor] = {}
    values = _without_tensors(state, "", tensors)
    try:
        if first:
            own_folder(folder)
        with staging(folder) if first else nullcontext() as stage:
            place = [None if stage is None else str(stage)]
            distributed.broadcast_object_list(place, src=0, group=group)
            files = save_tensors(Path(str(place[0])), tensors, layout, group)
            if stage is not None:
                header = {"format": FORMAT, "files": files}
                write_file(stage / STATE, as_json(sealed({**header, "state": values})))
                publish_folder(stage, final)
    except (OSError, SafetensorError) as error:
        raise _not_written(final, error) from error
    if first:
        prune(folder, keep)
    return final


def _not_written(path: Path, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"checkpoint: could not write {path} ({reason(error)}); the newest complete one is "
        f"{latest(path.parent)}"
    )


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; what cannot be deleted stays."""
    for old in checkpoints(folder)[keep:]:
        with suppress(OSError):
            remove(old)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, damaged ones too, newest first."""
    found = [path for path in folder.glob("step_*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint in `folder`, or None; `load_checkpoint` says if it is whole."""
    return next(iter(checkpoints(folder)), None)


def load_checkpoint(path: Path, layout: Layout | None = None) -> dict[str, Any]:
    """Return the state of the checkpoint `path`, every byte of it compared with its checksum.

    Args:
        path: of the checkpoint, of a run over any number of processes.
        layout: of an SAE that is spread: its rows come alone.

    Raises:
        FileNotFoundError: there is none, or a file of it is missing.
        ValueError: it is damaged, or was written by another version of fastsae.
    """
    header = _header(path)
    if "files" in header:
        from fastsae.distributed.checkpoint import load_tensors

        files = field(header, "files", dict, path / STATE, "Trainer")
        tensors = load_tensors(path, files, layout)
    else:
        seals = field(header, "seals", dict, path / STATE, "Trainer")
        for name in (TENSORS, WEIGHTS):
            field(seals, name, str, path / STATE, "Trainer")
        TensorFile(path / WEIGHTS, "Trainer", seals[WEIGHTS])
        tensors = TensorFile(path / TENSORS, "Trainer", seals[TENSORS]).tensors()
        if layout is not None:
            from fastsae.distributed.checkpoint import own_rows

            tensors = own_rows(tensors, layout)
    state: dict[str, Any] = _with_tensors(header["state"], tensors)
    if path.name != f"step_{state['step']:09d}":
        raise ValueError(f"Trainer: expected {path} to hold its step, got {state['step']}")
    return state


def settings_of(path: Path) -> dict[str, Any]:
    """Return the settings of the run that checkpoint `path` belongs to; no tensor is read.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or was written by another version of fastsae.
    """
    about: dict[str, Any] = _header(path)["state"]["about"]
    return about


def _header(path: Path) -> dict[str, Any]:
    """Return the content of the state file of checkpoint `path`, compared with its checksum."""
    header = read_json(path / STATE, "Trainer")
    if header.get("format") != FORMAT:
        raise ValueError(
            f"Trainer: expected a checkpoint of format {FORMAT} in {path}, got "
            f"{header.get('format', 'one of a development version')}; finish that run with the "
            "version that began it, or train fastsae.load(...) of the same folder further"
        )
    check_seal(header, path / STATE, "Trainer")
    return header


def newest_state(folder: Path, layout: Layout | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint in `folder` and its state, None if there is none.

    Args:
        folder: of all checkpoints of the run.
        layout: as in `load_checkpoint`.

    Raises:
        ValueError: it cannot be read; an older one is named, but not taken.
    """
    found = checkpoints(folder)
    if not found:
        return None
    try:
        return found[0], load_checkpoint(found[0], layout)
    except (ValueError, FileNotFoundError) as error:
        older = f"; fit(resume={str(found[1])!r}) goes on from the one before" if found[1:] else ""
        raise ValueError(f"{error}{older}") from error


def check_same_run(where: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise ValueError where the settings `theirs` of a state are not `ours`.

    Data that cannot say what they hold count as the same.
    """
    for name, value in ours.items():
        if theirs.get(name) != value:
            if name == "data" and None in (value, theirs.get(name)):
                continue
            what = "the same data" if name == "data" else f"{name} = {theirs.get(name)!r}"
            got = "data of another content" if name == "data" else repr(value)
            raise ValueError(f"Trainer: expected {what} as in {where}, got {got}")


def check_alike(theirs: Any, ours: Any, name: str, where: str) -> None:
    """Raise ValueError where `theirs`, a part of a state, is not built like `ours`.

    Names, types, lengths, shapes and dtypes are compared, and floats have to be finite.
    """
    got: Any = type(theirs).__name__
    if isinstance(ours, Tensor):
        expected = f"{ours.dtype} {[*ours.shape]}"
        if isinstance(theirs, Tensor):
            got = f"{theirs.dtype} {[*theirs.shape]}"
        right = got == expected
    elif isinstance(ours, dict):
        expected = f"a dict of {', '.join(map(str, ours))}"
        if isinstance(theirs, dict):
            got = f"one of {', '.join(map(str, theirs))}"
        right = isinstance(theirs, dict) and theirs.keys() == ours.keys()
    elif isinstance(ours, list):
        expected = f"a list of {len(ours)}"
        right = isinstance(theirs, list) and len(theirs) == len(ours)
    elif isinstance(ours, float):
        expected, got = "a finite number", repr(theirs)
        right = type(theirs) in (int, float) and math.isfinite(theirs)
    else:
        expected, got = f"of type {type(ours).__name__}", repr(theirs)
        right = type(theirs) is type(ours)
    if not right:
        raise ValueError(f"Trainer: expected {name} to be {expected} in {where}, got {got}")
    if isinstance(ours, dict):
        for key, value in ours.items():
            check_alike(theirs[key], value, f"{name}.{key}", where)
    elif isinstance(ours, list):
        for i, value in enumerate(ours):
            check_alike(theirs[i], value, f"{name}[{i}]", where)


def _without_tensors(value: Any, name: str, found: dict[str, Tensor]) -> Any:
    """Return `value` with `{"tensor": name}` in place of tensors, which are put into `found`."""
    if isinstance(value, Tensor):
        found[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {
            str(key): _without_tensors(item, f"{name}.{key}".lstrip("."), found)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_tensors(x, f"{name}.{i}", found) for i, x in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value
