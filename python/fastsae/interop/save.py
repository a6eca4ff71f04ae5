"""Write an SAE for fastsae and SAELens, or for another library."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastsae._files.write import publish, reason, staging
from fastsae.interop import folder
from fastsae.nn import SAE, NormalizedSAE

WRITERS = {
    "saelens": "folder",
    "sparsify": "sparsify",
    "dictionary-learning": "dictionary_learning",
    "circuit-tracer": "circuit_tracer",
}
"""Modules of formats that are written, by the names of the formats."""


def save(
    sae: SAE | NormalizedSAE, path: str | os.PathLike[str], *, format: str | None = None
) -> str | None:
    """Write `sae` into the folder `path`, which is made if needed.

    fastsae's own folder is one of SAELens >= 6, where that has the architecture; `load` brings back
    the same class, arguments and numbers. A crash or a full disk at any moment leaves a folder that
    loads, as the previous save or as this one.

    Args:
        sae: for raw activations.
        path: the folder; of circuit-tracer the file of a layer, `layer_3.safetensors`, unless it is
            a cross-layer transcoder.
        format: None: fastsae's own; `saelens`: the same, but refused where SAELens would not read
            it; `sparsify`, `dictionary-learning`, `circuit-tracer`: what that library reads, with
            the same code and reconstruction, for the classes that it has.

    Returns:
        A checksum of all that was written, of fastsae's own format.

    Raises:
        TypeError: `sae.metadata` or a constructor argument is not JSON.
        ValueError: the format has nothing that computes what `sae` does, or the module holds a
            parameter or buffer that its class does not make.
        RuntimeError: a file cannot be written.
    """
    if format is not None and format not in WRITERS:
        raise ValueError(f"save: expected format to be one of {', '.join(WRITERS)}, got {format!r}")
    if format in (None, "saelens"):
        if format is not None:
            _check_saelens(sae)
        _check_place(Path(path), folder.WEIGHTS)
        return folder.write(sae, path)
    if isinstance(sae, NormalizedSAE):
        raise ValueError(
            f"save: expected an SAE of activations as they are for {format}, got a NormalizedSAE"
        )
    module: Any = import_module(f"fastsae.interop.{WRITERS[format]}")
    if format == "circuit-tracer":
        module.write(sae, Path(path))
        return None
    _write(module, sae, Path(path))
    return None


def _write(module: Any, sae: SAE, path: Path) -> None:
    """Write the two files of a format at once."""
    write_files = module.writer_of(sae)
    _check_place(path, module.WEIGHTS)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with staging(path) as stage:
            write_files(stage)
            publish(stage, path, [module.WEIGHTS, module.CONFIG])
    except (OSError, SafetensorError) as error:
        raise RuntimeError(
            f"save: could not write {path} ({reason(error)}); what was there before is kept"
        ) from error


def _check_place(path: Path, weights: str) -> None:
    """Raise ValueError for a folder that holds an SAE of another format, whose files would be
    mixed up with these."""
    others = {folder.WEIGHTS, "sae.safetensors", "ae.pt"} - {weights}
    found = sorted(name for name in others if (path / name).exists())
    if found:
        raise ValueError(
            f"save: expected a folder without an SAE of another format, got {path} with "
            f"{', '.join(found)}"
        )


def _check_saelens(sae: SAE | NormalizedSAE) -> None:
    """Raise ValueError for what SAELens has no architecture for."""
    from fastsae.interop.saelens import CLASSES

    name = folder.contents(sae)[1]["architecture"]
    if name not in {*CLASSES, "matching_pursuit"}:
        raise ValueError(
            f"save: expected a class that SAELens has for saelens, got "
            f"{folder.class_name(sae.sae if isinstance(sae, NormalizedSAE) else sae)}"
        )


def to_sae_lens(sae: SAE | NormalizedSAE) -> Any:
    """Return the SAE of the package `sae_lens` that computes what `sae` does, in eval mode.

    Nothing is written; its tensors are copies. It has what tools of SAELens need, such as hooks,
    `cfg` and `fold_W_dec_norm`.

    Args:
        sae: for raw activations, of a class that SAELens has.

    Returns:
        `sae_lens.SAE`, in the dtype and on the device of `sae`.

    Raises:
        ModuleNotFoundError: sae_lens is not installed.
        ValueError: SAELens has no architecture for it.
    """
    _check_saelens(sae)
    try:
        peer: Any = import_module("sae_lens")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "to_sae_lens: expected sae_lens to be installed: pip install sae-lens"
        ) from None
    tensors, cfg = folder.contents(sae)
    device = (sae.sae if isinstance(sae, NormalizedSAE) else sae).W_dec.device
    theirs = peer.SAE.from_dict({**cfg, "device": str(device)})
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    theirs.process_state_dict_for_loading(tensors)
    theirs.load_state_dict(tensors)
    return theirs.eval()
