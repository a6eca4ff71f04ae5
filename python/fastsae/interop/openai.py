"""OpenAI's sparse_autoencoder: a `.pt` file with a state dict and the name of its activation.

Formulas are those of its model.py at 4965b94. TopK goes with a layer norm, which no key of the file
says: there are released SAEs of both kinds, ReLU on raw activations and TopK on normalized ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae._files.peek import pickled_names
from fastsae._files.read import field, read_torch
from fastsae.interop.weights import Options, Weights, refuse, take, transposed
from fastsae.nn import SAE, NormalizedSAE, ReLUSAE, TopKSAE

NAME = "openai"
TENSORS = {
    "encoder.weight": "W_enc",  # [d_sae, d_in]
    "decoder.weight": "W_dec",  # [d_in, d_sae]
    "latent_bias": "b_enc",
    "pre_bias": "b_dec",
}


def matches(path: Path) -> bool:
    """Return whether `path` is a file of OpenAI."""
    return pickled_names(path) >= {"pre_bias", "latent_bias"}


def read(path: Path, options: Options) -> SAE | NormalizedSAE:
    """Return the autoencoder in a file of OpenAI; the statistics beside it are left."""
    held = read_torch(path, "load", allow_pickle=options.allow_pickle)
    found = take({name: t for name, t in held.items() if isinstance(t, Tensor)}, TENSORS, path)
    for name in ("encoder.weight", "decoder.weight"):
        found[TENSORS[name]] = transposed(found[TENSORS[name]], name, path)
    weights = Weights(path, **found)
    kind = held.get("activation", "ReLU")
    if kind == "ReLU":
        return weights.build(ReLUSAE, options)
    if kind != "TopK":
        raise refuse(path, f"activation {kind!r}")
    k = _k(held, path)
    return weights.build(TopKSAE, options, k=k, normalize_activations="layer_norm")


def _k(held: dict[str, Any], path: Path) -> int:
    """Return k of a TopK whose values go through a ReLU."""
    state = field(held, "activation_state_dict", dict, path, "load")
    after = state.get("postact_fn", "ReLU")
    if after != "ReLU":
        raise refuse(path, f"TopK with values through {after!r}, not ReLU")
    return int(field(state, "k", int, path, "load", least=1))
