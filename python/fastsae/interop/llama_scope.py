"""Llama Scope: folders of lm_saes, which is not on PyPI.

Two layouts, by the formulas of lm_saes 1e710367 (Llama Scope, October 2024) and 9c97b678
(R1-Distill, February 2025):

    hyperparams.json, checkpoints/final.safetensors
        the code is in units of x; decoder norms, after scales, are folded into it before
        it is compared with one threshold
    config.json, sae_weights.safetensors
        the code is in units of the scaled input; a latent is active where its pre-activation times
        its decoder norm is above its threshold

An input is scaled by sqrt(d_in) / its average norm, an output by that of its own.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae._files.peek import tensor_names
from fastsae._files.read import TensorFile, field, read_json
from fastsae.interop.weights import Options, Weights, facts, refuse, take, transposed
from fastsae.nn import SAE, JumpReLUSAE, NormalizedSAE, ReLUSAE, TopKSAE

NAME = "llama-scope"
HYPERPARAMS = "hyperparams.json"
FINAL = Path("checkpoints") / "final.safetensors"
CONFIG = "config.json"
WEIGHTS = "sae_weights.safetensors"
MODEL = "lm_config.json"
LOGS = "log_jumprelu_threshold"
LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
"""Matrices of `nn.Linear`, `[out, in]`."""


def matches(path: Path) -> bool:
    """Return whether `path` is a folder of Llama Scope."""
    if (path / HYPERPARAMS).is_file():
        return (path / FINAL).is_file()
    names = tensor_names(path / WEIGHTS) if (path / CONFIG).is_file() else ()
    return "encoder.weight" in names


def read(path: Path, options: Options) -> SAE | NormalizedSAE:
    """Return the SAE or transcoder in a folder of Llama Scope."""
    released = (path / HYPERPARAMS).is_file()
    file = path / (HYPERPARAMS if released else CONFIG)
    cfg = read_json(file, "load")
    weights_file = path / (FINAL if released else WEIGHTS)
    tensors = TensorFile(weights_file, "load").tensors()
    if cfg.get("use_glu_encoder"):
        raise refuse(file, "use_glu_encoder, a second encoder that multiplies pre-activations")
    weights = _weights(cfg, tensors, weights_file)
    weights.expect_width(field(cfg, "d_model", int, file, "load"))
    weights.metadata = hooks(cfg, path)
    norms = _norms(cfg, tensors, file, weights_file)
    scale_in, scale_out = (scale(cfg, weights, norm, file) for norm in norms)
    if released:
        _fold(weights, cfg, scale_in, scale_out)
    kind = field(cfg, "act_fn", str, file, "load")
    if kind == "jumprelu":
        _set_threshold(weights, cfg, tensors, released, file)
    if not released:
        weights.fold_scale(scale_in, scale_out)
    arguments: dict[str, Any] = {"transcoder": "hook_name_out" in weights.metadata}
    if kind == "topk":
        if not released and by_norm(cfg):
            arguments["select_by_decoder_norm"] = True
        k = field(cfg, "top_k", int, file, "load", least=1)
        return weights.build(TopKSAE, options, k=k, **arguments)
    if kind == "jumprelu":
        return weights.build(JumpReLUSAE, options, **arguments)
    if kind == "relu":
        return weights.build(ReLUSAE, options, **arguments)
    raise refuse(file, f"act_fn {kind!r}")


def scale(cfg: dict[str, Any], weights: Weights, norm: Any, file: Path) -> float:
    """Return what activations of an average norm are multiplied by: 1 where they are not."""
    kind = cfg.get("norm_activation", "dataset-wise")
    if kind == "inference":  # folded already
        return 1.0
    if kind != "dataset-wise":
        raise refuse(file, f"norm_activation {kind!r}")
    if not (isinstance(norm, (int, float)) and 0 < norm < math.inf):
        raise weights.wrong("an average norm of activations above 0", repr(norm)[:100])
    return float(weights.d_in**0.5 / norm)


def by_norm(cfg: dict[str, Any]) -> bool:
    """Return whether selection looks at pre-activations times decoder norms."""
    return bool(cfg.get("sparsity_include_decoder_norm", True))


def hooks(cfg: dict[str, Any], folder: Path) -> dict[str, str]:
    """Return what a folder says of its model; `hook_name_out` where it is a transcoder's."""
    model = read_json(folder / MODEL, "load") if (folder / MODEL).is_file() else {}
    x, y = cfg.get("hook_point_in"), cfg.get("hook_point_out")
    out = y if y != x else None
    return facts(model_name=model.get("model_name"), hook_name=x, hook_name_out=out)


def _weights(cfg: dict[str, Any], tensors: dict[str, Tensor], file: Path) -> Weights:
    names = LINEAR | {"encoder.bias": "b_enc"}
    if cfg.get("use_decoder_bias", True):
        names |= {"decoder.bias": "b_dec"}
    found = take(tensors, names, file)
    for name, own in LINEAR.items():
        found[own] = transposed(found[own], name, file)
    if "b_dec" not in found:
        found["b_dec"] = found["W_dec"].new_zeros(found["W_dec"].shape[1])
    centered = bool(cfg.get("apply_decoder_bias_to_pre_encoder"))
    return Weights(file, **found, apply_b_dec_to_input=centered)


def _norms(
    cfg: dict[str, Any], tensors: dict[str, Tensor], file: Path, weights_file: Path
) -> tuple[Any, Any]:
    """Return the average norms of inputs and of outputs, from the settings or the tensors."""
    norms = cfg.get("dataset_average_activation_norm")
    if isinstance(norms, dict):
        return norms.get("in"), norms.get("out")
    if cfg.get("norm_activation", "dataset-wise") != "dataset-wise":
        return None, None
    return norm_tensors(cfg, tensors, file, weights_file)


def norm_tensors(
    cfg: dict[str, Any], tensors: dict[str, Tensor], file: Path, weights_file: Path
) -> tuple[float, float]:
    """Return the average norms of inputs and of outputs that are among the tensors."""
    found = []
    for end in ("in", "out"):
        hook = field(cfg, f"hook_point_{end}", str, file, "load")
        name = f"dataset_average_activation_norm.{hook}"
        norm = take(tensors, {name: "norm"}, weights_file)["norm"]
        if norm.numel() != 1 or not norm.is_floating_point():
            raise ValueError(
                f"load: expected {name} in {weights_file} to be one number, got {[*norm.shape]}"
            )
        found.append(float(norm))
    return found[0], found[1]


def _fold(weights: Weights, cfg: dict[str, Any], scale_in: float, scale_out: float) -> None:
    """Fold scales such that the code is in units of x, and then decoder norms into it."""
    weights.b_enc = weights.b_enc.double() / scale_in
    weights.W_dec = weights.W_dec.double() * (scale_in / scale_out)
    weights.b_dec = weights.b_dec.double() / scale_out
    if by_norm(cfg):
        weights.fold_norms()


def _set_threshold(
    weights: Weights, cfg: dict[str, Any], tensors: dict[str, Tensor], released: bool, file: Path
) -> None:
    """Set the threshold of pre-activations; norms are those before scales are folded."""
    if released:
        one = field(cfg, "jump_relu_threshold", float, file, "load", least=0)
        weights.threshold = torch.tensor(one, dtype=torch.float64)
        return
    set_log_threshold(weights, take(tensors, {LOGS: "logs"}, weights.where)["logs"], cfg)


def set_log_threshold(weights: Weights, logs: Tensor, cfg: dict[str, Any]) -> None:
    """Set the threshold of pre-activations from logs `[d_sae]` of what gates are compared with."""
    if logs.shape != (weights.d_sae,) or not logs.is_floating_point():
        raise weights.wrong(f"logs of thresholds to be floating [{weights.d_sae}]", logs)
    weights.threshold = logs.double().exp()
    if by_norm(cfg):
        weights.compare_by_norm()
