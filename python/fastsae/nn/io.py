"""Save and load: `sae_weights.safetensors` and `cfg.json`, the folder that SAELens >= 6 loads.

The weights file holds W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_enc, b_dec and, for selections
that use one, threshold [d_sae]. `cfg.json` holds SAELens' keys; our class and its constructor
arguments are under `metadata.fastsae`, which SAELens carries along. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsae.nn.sae import SAE

WEIGHTS = "sae_weights.safetensors"
CONFIG = "cfg.json"
PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}


def save(sae: SAE, path: str | os.PathLike[str]) -> None:
    """Write `sae` into the folder `path`, which is made if needed.

    Both files are written completely beside the old ones and reach the disk before they take their
    place, so a full disk or a crash leaves the previous save as it was.

    Raises:
        RuntimeError: a file cannot be written.
    """
    folder = Path(path)
    tensors, cfg = contents(sae)
    staged = [(folder / f".{name}.tmp", folder / name) for name in (CONFIG, WEIGHTS)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(staged[0][0], cfg)
        write_tensors(staged[1][0], tensors)
        for temporary, final in staged:
            os.replace(temporary, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        for temporary, _ in staged:
            with suppress(OSError):
                temporary.unlink()
        raise RuntimeError(
            f"save: could not write {folder} ({reason(error)}); what was there before is kept"
        ) from error


def contents(sae: SAE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of the weights file and the content of `cfg.json`."""
    export, extra = sae.export()
    cfg = {
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **export,
        "metadata": {
            **sae.metadata,
            "sae_lens_version": "6.0.0",  # the version of this layout; SAELens migrates older ones
            "fastsae": {
                "class": type(sae).__name__,
                "config": sae.config(),
                "learned": sae.learned(),
            },
        },
    }
    return {sae.FILE_NAMES.get(name, name): getattr(sae, name) for name in PARAMETERS} | extra, cfg


def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> SAE:
    """Read the module that `save` wrote: same class, arguments, dtype and threshold, in eval mode.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: a file is damaged, the class is not known, or shapes disagree.
    """
    folder = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"load: expected {folder} to hold {name}, found none")
    sae, learned = _build(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS, device=str(device))
    except SafetensorError as error:
        raise ValueError(
            f"load: expected {folder / WEIGHTS} to be a safetensors file ({error})"
        ) from error
    names = {name: sae.FILE_NAMES.get(name, name) for name in PARAMETERS}
    expected = {names[name]: getattr(sae, name).shape for name in PARAMETERS}
    expected |= {name: tensor.shape for name, tensor in sae.export()[1].items()}
    for name, shape in expected.items():
        got = tensors[name].shape if name in tensors else None
        if got != shape:
            found = "none" if got is None else str([*got])
            raise ValueError(
                f"load: expected {name} to be {[*shape]} in {folder / WEIGHTS}, got {found}"
            )
    sae.to_empty(device=device)
    for name in PARAMETERS:
        setattr(sae, name, tensors[names[name]])
    sae.restore(tensors, learned)
    return sae.eval()


def _build(file: Path) -> tuple[SAE, dict[str, Any]]:
    """Return the module that `file` describes, without storage (on the meta device), and what it
    had learned beside its tensors.
    """
    try:
        cfg = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"load: expected {file} to be JSON ({error})") from error
    try:
        metadata = dict(cfg["metadata"])
        ours = metadata.pop("fastsae")
        cls, dtype = SAE.registry[ours["class"]], DTYPES[cfg["dtype"]]
        sae = cls(**ours["config"], dtype=dtype, device="meta")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"load: expected {file} to describe one of {', '.join(sorted(SAE.registry))} under "
            f"metadata.fastsae, got {_summary(cfg)} ({type(error).__name__}: {error})"
        ) from error
    metadata.pop("sae_lens_version", None)
    sae.metadata = metadata
    return sae, ours.get("learned", {})


def _summary(cfg: Any) -> str:
    """Return what an unreadable configuration says about its kind."""
    if not isinstance(cfg, dict):
        return type(cfg).__name__
    metadata = cfg.get("metadata")
    ours = metadata.get("fastsae") if isinstance(metadata, dict) else None
    return f"architecture = {cfg.get('architecture')!r}, fastsae = {ours!r}"


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` as safetensors, row-major, and wait until they are on the disk."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file)
    sync(file)


def write_json(file: Path, value: Any) -> None:
    """Write `value` as JSON and wait until it is on the disk."""
    file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    sync(file)


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
