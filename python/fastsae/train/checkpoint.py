"""Checkpoints: everything an exact continuation needs, complete on disk or not there at all.

    checkpoints/step_000001000/
        cfg.json, sae_weights.safetensors   the SAE for raw activations; `fastsae.load` reads it
        state.safetensors                   the tensors of `Trainer.state_dict()`
        state.json                          the rest of it, and the settings of the run

A checkpoint is written under another name, reaches the disk, and is then renamed. Nothing is
pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastsae._files import reason, sync, write_json, write_tensors
from fastsae.interop.saelens import CONFIG, WEIGHTS, contents
from fastsae.nn import SAE

TENSORS, STATE = "state.safetensors", "state.json"
FORMAT = 2
"""Development versions of 0.1.0 wrote no format; their states have other names."""


def save_checkpoint(folder: Path, sae: SAE, state: dict[str, Any], keep: int) -> Path:
    """Write checkpoint `state["step"]` into `folder`, then delete all but the newest `keep`.

    Args:
        folder: of all checkpoints of the run.
        sae: the module for raw activations.
        state: from `Trainer.state_dict`.
        keep: how many stay.

    Raises:
        RuntimeError: it cannot be written; the checkpoints that were there are untouched.
    """
    final = folder / f"step_{state['step']:09d}"
    temporary = folder / f".tmp_{final.name}"
    tensors: dict[str, Tensor] = {}
    values = _without_tensors(state, "", tensors)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights, cfg = contents(sae)
        write_tensors(temporary / WEIGHTS, weights)
        write_json(temporary / CONFIG, cfg)
        write_tensors(temporary / TENSORS, tensors)
        write_json(temporary / STATE, {"format": FORMAT, "state": values})
        sync(temporary)
        shutil.rmtree(final, ignore_errors=True)  # an incomplete one of the same step
        os.replace(temporary, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RuntimeError(
            f"checkpoint: could not write {final} ({reason(error)}); "
            f"the newest complete one is {latest(folder)}"
        ) from error
    for old in _complete(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in `folder`, or None."""
    return next(iter(_complete(folder)), None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state of the checkpoint `path`.

    Raises:
        ValueError: it was written by another version of fastsae.
    """
    header = json.loads((path / STATE).read_text())
    if header.get("format") != FORMAT:
        raise ValueError(
            f"Trainer: expected a checkpoint of format {FORMAT} in {path}, got "
            f"{header.get('format', 'one of a development version')}; finish that run with the "
            "version that began it, or train fastsae.load(...) of the same folder further"
        )
    state: dict[str, Any] = _with_tensors(header["state"], load_file(path / TENSORS))
    return state


def check_same_run(where: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise ValueError where the settings `theirs` of a state are not `ours`."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"Trainer: expected {name} = {theirs.get(name)!r} as in {where}, got {value!r}"
            )


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


def _complete(folder: Path) -> list[Path]:
    """Return the checkpoints of `folder` that can be read, newest first."""
    found = sorted(folder.glob("step_*"), reverse=True)
    return [path for path in found if _is_complete(path)]


def _is_complete(path: Path) -> bool:
    try:
        header = json.loads((path / STATE).read_text())
        if "state" not in header and "about" not in header:  # development versions had the latter
            return False
        with safe_open(path / TENSORS, "pt"):  # compares the file's size with its header
            return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
