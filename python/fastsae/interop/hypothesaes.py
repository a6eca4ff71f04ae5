"""HypotheSAEs: a `.pt` file of {config, state_dict}.

Formulas are those of hypothesaes 2.0.1 in eval mode. Prefixes only change its loss: with TopK, what
is left of them in use is a TopK SAE.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae._files.peek import pickled_names
from fastsae._files.read import field, read_torch
from fastsae.interop.weights import Options, Weights, take, transposed
from fastsae.nn import SAE, BatchTopKSAE, MatryoshkaSAE, NormalizedSAE, TopKSAE

NAME = "hypothesaes"
TENSORS = {
    "encoder.weight": "W_enc",  # [d_sae, d_in]
    "decoder.weight": "W_dec",  # [d_in, d_sae]
    "neuron_bias": "b_enc",
    "input_bias": "b_dec",
}


def matches(path: Path) -> bool:
    """Return whether `path` is a file of HypotheSAEs."""
    return pickled_names(path) >= {"state_dict", "input_bias", "neuron_bias"}


def read(path: Path, options: Options) -> SAE | NormalizedSAE:
    """Return the autoencoder in a file of HypotheSAEs."""
    held = read_torch(path, "load", allow_pickle=options.allow_pickle)
    config = field(held, "config", dict, path, "load")
    state = field(held, "state_dict", dict, path, "load")
    tensors = {str(name): t for name, t in state.items() if isinstance(t, Tensor)}
    batch = bool(config.get("use_batch_topk"))
    names = TENSORS | ({"threshold": "threshold"} if batch else {})
    found = take(tensors, names, path)
    for name in ("encoder.weight", "decoder.weight"):
        found[TENSORS[name]] = transposed(found[TENSORS[name]], name, path)
    weights = Weights(path, **found)
    k = field(config, "k_active_neurons", int, path, "load", least=1)
    if not batch:
        return weights.build(TopKSAE, options, k=k)
    groups = _groups(config, weights)
    if groups is None:
        return weights.build(BatchTopKSAE, options, k=k)
    return weights.build(MatryoshkaSAE, options, k=k, groups=groups)


def _groups(config: dict[str, Any], weights: Weights) -> list[int] | None:
    """Return the sizes of groups from the lengths of prefixes; None where there are none."""
    ends = config.get("prefix_lengths")
    if ends is None:
        return None
    if not isinstance(ends, (list, tuple)) or not all(type(end) is int for end in ends):
        raise weights.wrong("prefix_lengths to be integers", repr(ends)[:100])
    return [b - a for a, b in pairwise([0, *ends])]
