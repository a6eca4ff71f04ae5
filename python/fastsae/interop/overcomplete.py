"""Overcomplete: a file of `torch.save` with a state dict, or with a whole module.

    f = select(relu(x W + b)),   x_hat = f D

Formulas are those of overcomplete 0.3.0 in eval mode. A state dict does not hold what are
attributes there, so it is read as the library reads it into a module made with default arguments:
rows of D have norm 1, those of an archetypal dictionary are convex combinations of its points plus
at most delta = 1 (kept as they are where `eval()` has projected them before they were saved). It
does not say either which latents stay active: all positive ones, unless `k` (TopKSAE) or
`threshold` (the running_threshold of a BatchTopKSAE, whose top_k counts a batch) is given.

A whole module says it all. Its file may run any code when it is read, and needs the library.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsae._files.peek import pickled_names
from fastsae._files.read import read_torch
from fastsae._log import logger
from fastsae.interop.weights import Options, Weights, is_plain, refuse, take
from fastsae.nn import SAE, BatchTopKSAE, JumpReLUSAE, NormalizedSAE, ReLUSAE, TopKSAE

NAME = "overcomplete"
PACKAGE = "overcomplete"
LAYER = "encoder.final_block"
BATCH_NORM = {
    f"{LAYER}.1.{name}": name for name in ("weight", "bias", "running_mean", "running_var")
}
ATOMS, POINTS = "dictionary._weights", "dictionary.C"
TINY = 1e-8
"""What the library adds to norms and sums before it divides by them."""
ROUNDING = 1e-5
"""How far from 1 a sum of weights may be that is 1."""
BATCH_NORM_EPS = 1e-5
KINDS = ("SAE", "TopKSAE", "BatchTopKSAE", "JumpSAE", "RATopKSAE", "RAJumpSAE")


def matches(path: Path) -> bool:
    """Return whether `path` is a file of Overcomplete."""
    names = pickled_names(path)
    return not names.isdisjoint((ATOMS, POINTS)) or _is_module(names)


def read(path: Path, options: Options) -> SAE | NormalizedSAE:
    """Return the autoencoder in a file of Overcomplete."""
    if _is_module(pickled_names(path)):
        _check_allowed(path, options)
    held = read_torch(path, "load", allow_pickle=options.allow_pickle)
    module = held.get("module")
    if isinstance(module, nn.Module):
        return _read_module(module, path, options)
    state = {name: t for name, t in held.items() if isinstance(t, Tensor)}
    weights = _weights(state, path, _dictionary(state, path))
    if weights.threshold is None and options.k is None and options.threshold is None:
        logger.warning(
            "load: %s does not say which latents stay active; took all positive ones. Give k= of a "
            "TopKSAE, or threshold= of a BatchTopKSAE",
            path,
        )
    return _build(weights, options, options.k, options.threshold)


def _is_module(names: frozenset[str]) -> bool:
    return any(name.startswith(f"{PACKAGE}.") for name in names)


def _check_allowed(path: Path, options: Options) -> None:
    """Raise an error unless a whole module may and can be unpickled."""
    if not options.allow_pickle:
        raise ValueError(
            f"load: expected {path} to hold a state dict, got a whole module, whose file may run "
            f"any code when it is read; if you trust it, give allow_pickle=True, with {PACKAGE} "
            "installed"
        )
    if find_spec(PACKAGE) is None:
        raise ModuleNotFoundError(
            f"load: expected {PACKAGE} to be installed for the whole module in {path}: pip install "
            f"{PACKAGE}"
        )


def _read_module(module: nn.Module, path: Path, options: Options) -> SAE | NormalizedSAE:
    """Return the SAE of a whole module; its dictionary is computed by its own code, in float64."""
    kind = type(module).__name__
    if kind not in KINDS:
        raise refuse(path, f"a module {kind}")
    state = {name: t.detach().clone() for name, t in module.state_dict().items()}
    try:
        threshold, k = getattr(module, "running_threshold", None), getattr(module, "top_k", None)
        with torch.no_grad():
            atoms = module.train().double().get_dictionary()  # type: ignore[operator]
        if kind == "BatchTopKSAE":
            threshold, k = float(threshold), options.k  # type: ignore[arg-type]
    except (AttributeError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"load: expected {path} to hold a trained {kind}, got {type(error).__name__}: {error}"
        ) from None
    return _build(_weights(state, path, atoms.detach().clone()), options, k, threshold)


def _build(
    weights: Weights, options: Options, k: int | None, threshold: float | None
) -> SAE | NormalizedSAE:
    """Return the SAE that keeps what the file says, or else what is said beside it."""
    weights.inclusive = True
    if weights.threshold is not None:
        return weights.build(JumpReLUSAE, options)
    if threshold is not None:
        weights.threshold = torch.tensor(threshold, dtype=torch.float64)
        if k is None:  # the same, and needs no mean number of active latents
            return weights.build(JumpReLUSAE, options)
        return weights.build(BatchTopKSAE, options, k=k)
    if k is not None:
        return weights.build(TopKSAE, options, k=k)
    return weights.build(ReLUSAE, options)


def _weights(state: dict[str, Tensor], path: Path, atoms: Tensor) -> Weights:
    """Return what a state dict computes with the dictionary `atoms: [d_sae, d_in]`."""
    _check_encoder(state, path)
    found = take(state, {f"{LAYER}.0.weight": "W_enc", f"{LAYER}.0.bias": "b_enc"}, path)
    weights = Weights(
        path,
        W_enc=found["W_enc"].t() if found["W_enc"].ndim == 2 else found["W_enc"],
        W_dec=atoms,
        b_enc=found["b_enc"],
        b_dec=atoms.new_zeros(atoms.shape[1]),
        threshold=state.get("thresholds"),
        apply_b_dec_to_input=False,
    )
    weights.expect_width(weights.d_out)
    if weights.threshold is not None:
        weights.threshold = weights.threshold.double().exp()
    if f"{LAYER}.1.running_mean" in state:
        _fold_batch_norm(weights, take(state, BATCH_NORM, path))
    return weights


def _check_encoder(state: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError unless the encoder is a linear layer, with a batch norm or without."""
    if "Q" in state:
        raise refuse(path, "codes that are quantized to the levels Q")
    if any(name.startswith("encoder.mlp_blocks.") for name in state):
        raise refuse(path, "an encoder with hidden layers")
    if not any(name.startswith("encoder.") for name in state):
        raise refuse(path, "a dictionary without an encoder, of matching pursuit")
    if f"{LAYER}.0.weight" not in state:
        raise refuse(path, "an encoder that is no linear layer")
    if f"{LAYER}.1.weight" in state and f"{LAYER}.1.running_mean" not in state:
        raise refuse(path, "an encoder with a layer norm behind its linear layer")


def _fold_batch_norm(weights: Weights, norm: dict[str, Any]) -> None:
    """Fold the batch norm behind the linear layer, with its running statistics."""
    for name, tensor in norm.items():
        if tensor.shape != (weights.d_sae,) or not is_plain(tensor):
            raise weights.wrong(f"{name} of the batch norm to be [{weights.d_sae}]", tensor)
    factor = norm["weight"].double() / (norm["running_var"].double() + BATCH_NORM_EPS).sqrt()
    weights.W_enc = weights.W_enc.double() * factor
    shift = weights.b_enc.double() - norm["running_mean"].double()
    weights.b_enc = shift * factor + norm["bias"].double()


def _dictionary(state: dict[str, Tensor], path: Path) -> Tensor:
    """Return the dictionary `[d_sae, d_in]` of a state dict, float64."""
    if POINTS in state:
        atoms = _archetypes(state, path)
    else:
        rows = _matrix(state, ATOMS, path)
        atoms = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + TINY)
    multiplier = take(state, {"dictionary.multiplier": "m"}, path)["m"]
    if multiplier.shape != () or not is_plain(multiplier):
        raise ValueError(
            f"load: expected dictionary.multiplier in {path} to be [], got {[*multiplier.shape]}"
        )
    scaled: Tensor = atoms * multiplier.double().exp()
    return scaled


def _archetypes(state: dict[str, Tensor], path: Path) -> Tensor:
    """Return convex combinations of points, each plus a vector of norm delta at most."""
    points, raw = _matrix(state, POINTS, path), _matrix(state, "dictionary.W", path)
    relax = _matrix(state, "dictionary.Relax", path)
    if raw.shape[1] != len(points) or relax.shape != (len(raw), points.shape[1]):
        raise ValueError(
            f"load: expected dictionary.W [n, c], C [c, d] and Relax [n, d] in {path}, got "
            f"{[*raw.shape]}, {[*points.shape]} and {[*relax.shape]}"
        )
    W = raw.relu()
    total = W.sum(dim=1, keepdim=True)
    projected = bool((raw >= 0).all()) and bool(((total - 1).abs() <= ROUNDING).all())
    if not projected:
        size = torch.linalg.vector_norm(relax, dim=1, keepdim=True)
        relax = relax * torch.where(size > 1, 1 / size, 1)
        if bool((size > 1).any()):
            logger.warning(
                "load: %s does not say how far archetypes may be from its points; took delta = 1. "
                "Call eval() before you save the state dict of a module with another delta",
                path,
            )
    return W / (total + TINY) @ points + relax


def _matrix(state: dict[str, Tensor], name: str, path: Path) -> Tensor:
    matrix: Tensor = take(state, {name: "matrix"}, path)["matrix"]
    if matrix.ndim != 2 or not is_plain(matrix):
        raise ValueError(
            f"load: expected {name} to be a floating matrix in {path}, got {[*matrix.shape]}"
        )
    return matrix.double()
