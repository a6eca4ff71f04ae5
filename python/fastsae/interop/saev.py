"""saev: one file with a line of JSON and a state dict behind it.

The formula is that of saev 0.1.0, whose only activation is ReLU. Later versions put a schema into
the line and have more activations.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from fastsae._files.peek import json_line
from fastsae._files.read import read_torch
from fastsae.interop.weights import Options, Weights, refuse, take
from fastsae.nn import SAE, NormalizedSAE, ReLUSAE

NAME = "saev"
TENSORS = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


def matches(path: Path) -> bool:
    """Return whether `path` is a file of saev."""
    return json_line(path) is not None


def read(path: Path, options: Options) -> SAE | NormalizedSAE:
    """Return the autoencoder in a file of saev."""
    line = json_line(path)
    if line is None:
        raise ValueError(f"load: expected {path} to start with a line of JSON, got none")
    try:
        about = json.loads(line)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise ValueError(f"load: expected {path} to start with a JSON object, got another line")
    if "schema" in about:
        raise refuse(path, f"schema {about['schema']!r}, of saev after 0.1.0")
    held = read_torch(path, "load", allow_pickle=options.allow_pickle, skip=len(line))
    tensors = {name: t for name, t in held.items() if isinstance(t, Tensor)}
    if extra := tensors.keys() - TENSORS.keys():
        raise refuse(path, f"tensors that saev 0.1.0 does not have: {', '.join(sorted(extra))}")
    return Weights(path, **take(tensors, TENSORS, path)).build(ReLUSAE, options)
