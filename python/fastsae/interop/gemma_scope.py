"""Gemma Scope: `params.npz` of version 1, `params.safetensors` of version 2.

    z = x W_enc + b_enc,   f = z 1[z > threshold]
    y = f W_dec + b_dec (+ x affine_skip_connection)

As circuit-tracer 0.5.0 reads them, and the release says: b_dec is not subtracted from x. A file
does not say whether it is a transcoder; the `config.json` of version 2 does, so one without, or of
version 1, is read as an SAE, which computes the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae._files.peek import tensor_names
from fastsae._files.read import TensorFile, read_json, read_npz
from fastsae.interop.weights import Options, Weights, facts, refuse, take, transposed
from fastsae.nn import SAE, JumpReLUSAE, NormalizedSAE

NAME = "gemma-scope"
FIRST = "params.npz"
SECOND = "params.safetensors"
CONFIG = "config.json"
SKIP = "affine_skip_connection"
TENSORS = {
    "w_enc": "W_enc",  # [d_in, d_sae]
    "w_dec": "W_dec",  # [d_sae, d_out]
    "b_enc": "b_enc",
    "b_dec": "b_dec",
    "threshold": "threshold",
}


def matches(path: Path) -> bool:
    """Return whether `path` is a folder or file of Gemma Scope."""
    if path.is_dir():
        return _inside(path) is not None
    if path.name == SECOND or path.suffix == ".npz":
        return path.is_file()
    return path.suffix == ".safetensors" and tensor_names(path) >= TENSORS.keys()


def read(path: Path, options: Options) -> SAE | NormalizedSAE:
    """Return the SAE or transcoder in a folder or file of Gemma Scope."""
    file = _inside(path) if path.is_dir() else path
    if file is None:
        raise FileNotFoundError(f"load: expected {path} to hold {FIRST} or {SECOND}, found neither")
    first = file.suffix == ".npz"
    tensors = read_npz(file, "load") if first else TensorFile(file, "load").tensors()
    config = {} if first else _config(file)
    found = _tensors(tensors, file)
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise refuse(file.parent / CONFIG, f"architecture {config['architecture']!r}")
    x, y = (config.get(f"hf_hook_point_{end}") for end in ("in", "out"))
    transcoder = config.get("type") == "transcoder" or x != y
    about = facts(
        model_name=config.get("model_name"),
        hook_name=x,
        hook_name_out=y if transcoder else None,
    )
    weights = Weights(file, **found, apply_b_dec_to_input=False, metadata=about)
    return weights.build(JumpReLUSAE, options, transcoder=transcoder)


def _inside(folder: Path) -> Path | None:
    return next((folder / name for name in (FIRST, SECOND) if (folder / name).is_file()), None)


def _config(file: Path) -> dict[str, Any]:
    config = file.parent / CONFIG
    return read_json(config, "load") if config.exists() else {}


def _tensors(tensors: dict[str, Tensor], file: Path) -> dict[str, Any]:
    """Return the tensors of either version; names of version 1 are upper case in most files."""
    tensors = {name.lower(): tensor for name, tensor in tensors.items()}
    found = take(tensors, TENSORS, file)
    if found["W_dec"].ndim == 3:
        raise refuse(file, "w_dec of several layers: a layer of a cross-layer transcoder")
    if SKIP in tensors:
        found["W_skip"] = transposed(tensors[SKIP], SKIP, file)  # [d_in, d_out]
    return found
