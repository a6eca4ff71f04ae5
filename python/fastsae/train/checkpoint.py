"""Checkpoints: everything an exact continuation needs, complete on disk or not there at all.

    checkpoints/step_000001000/
        cfg.json, sae_weights.safetensors   the SAE for raw activations; `fastsae.load` reads it
        state.safetensors                   weights as trained, optimizer, dead latents, torch's RNG
        state.json                          step, scales, configuration

A checkpoint is written under another name, reaches the disk, and is then renamed. Nothing is
pickled.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastsae.nn import SAE
from fastsae.nn.io import CONFIG, WEIGHTS, contents, reason, sync, write_json, write_tensors
from fastsae.train.dead import DeadLatents
from fastsae.train.sgd_sai import SGDSaI

TENSORS, STATE = "state.safetensors", "state.json"


@dataclass
class TrainState:
    """The moving parts of a run."""

    sae: SAE
    """Takes the blocks of columns of a batch, each times its scale."""
    optimizer: torch.optim.Optimizer
    """Holds the averages of every parameter of `sae`."""
    dead: DeadLatents
    """Tokens since each latent fired."""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """What each block of columns of the raw data is multiplied by; see `SAE.data_widths`."""
    step: int = 0
    """Updates done."""


def save_checkpoint(folder: Path, state: TrainState, about: dict[str, Any], keep: int) -> Path:
    """Write checkpoint `state.step` into `folder`, then delete all but the newest `keep`.

    Args:
        about: JSON values that a resumed run compares with its own.

    Raises:
        RuntimeError: it cannot be written; the checkpoints that were there are untouched.
    """
    final = folder / f"step_{state.step:09d}"
    temporary = folder / f".tmp_{final.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights, cfg = contents(_for_raw_input(state))
        write_tensors(temporary / WEIGHTS, weights)
        write_json(temporary / CONFIG, cfg)
        write_tensors(temporary / TENSORS, _tensors(state))
        write_json(temporary / STATE, {"step": state.step, "scales": state.scales, "about": about})
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


def read_about(path: Path) -> dict[str, Any]:
    """Return the `about` of the checkpoint `path`."""
    about: dict[str, Any] = json.loads((path / STATE).read_text())["about"]
    return about


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Copy the checkpoint `path` into `state`, bit for bit, and restore torch's RNG."""
    header = json.loads((path / STATE).read_text())
    tensors = load_file(path / TENSORS)
    state.step = header["step"]
    state.scales = header["scales"] if "scales" in header else [header["scale"]]
    with torch.no_grad():
        for name, tensor in _tensors(state).items():
            if not name.startswith("rng."):
                tensor.copy_(tensors[name])
    torch.set_rng_state(tensors["rng.cpu"])
    device = state.sae.W_enc.device
    if device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)


def prepare_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its state before the first step, so that a checkpoint can be loaded.

    Raises:
        TypeError: it is neither Adam nor SGDSaI.
    """
    if isinstance(optimizer, SGDSaI):
        optimizer.prepare()
    elif isinstance(optimizer, torch.optim.Adam):
        prepare_adam(optimizer)
    else:
        got = type(optimizer).__name__
        raise TypeError(f"checkpoint: expected optimizer to be Adam or SGDSaI, got {got}")


def prepare_adam(optimizer: torch.optim.Adam) -> None:
    """Give every parameter the state that Adam makes at its first step, in the same layout."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                step = torch.zeros((), device=p.device if group["fused"] else "cpu")
                optimizer.state[p] = {
                    "step": step,
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Return every tensor of a run by name: the live ones, not copies."""
    tensors = {f"sae.{name}": t for name, t in state.sae.state_dict().items()}
    prefix = type(state.optimizer).__name__.lower()
    for name, p in state.sae.named_parameters():
        for key, t in state.optimizer.state[p].items():
            tensors[f"{prefix}.{name}.{key}"] = t
    tensors |= {f"dead.{name}": t for name, t in state.dead.tensors().items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    device = state.sae.W_enc.device
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def _for_raw_input(state: TrainState) -> SAE:
    """Return a copy of the SAE that takes raw activations; it shares what folding leaves alone."""
    kept = () if state.sae.FOLDS_MATRICES else (state.sae.W_enc, state.sae.W_dec)
    shared: dict[int, Any] = {id(p): p for p in kept}
    sae = copy.deepcopy(state.sae, shared)
    sae.fold_input_scales_(state.scales)
    return sae


def _complete(folder: Path) -> list[Path]:
    """Return the checkpoints of `folder` that can be read, newest first."""
    found = sorted(folder.glob("step_*"), reverse=True)
    return [path for path in found if _is_complete(path)]


def _is_complete(path: Path) -> bool:
    try:
        json.loads((path / STATE).read_text())["about"]
        with safe_open(path / TENSORS, "pt"):  # compares the file's size with its header
            return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
