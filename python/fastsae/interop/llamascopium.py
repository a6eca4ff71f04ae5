"""llamascopium, the successor of lm_saes, which is not on PyPI.

A folder with `config.json` and `sae_weights.safetensors` or `sae_weights.pt`, by the formulas of
95281ac7: the code is that of the normalized input, and a latent is active where its pre-activation
times the norm of its decoder row is above 0, above its threshold, or among the k largest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae._files.read import TensorFile, field, read_json, read_torch
from fastsae.interop.llama_scope import by_norm, hooks, norm_tensors, scale, set_log_threshold
from fastsae.interop.weights import Options, Weights, refuse, take
from fastsae.nn import SAE, JumpReLUSAE, NormalizedSAE, ReLUSAE, TopKSAE

NAME = "llamascopium"
CONFIG = "config.json"
FILES = ("sae_weights.safetensors", "sae_weights.pt")
LOGS = "activation_function.log_jumprelu_threshold"
CLASSES: dict[str, type[SAE]] = {"relu": ReLUSAE, "jumprelu": JumpReLUSAE, "topk": TopKSAE}


def matches(path: Path) -> bool:
    """Return whether `path` is a folder of llamascopium."""
    return (path / CONFIG).is_file() and _file(path) is not None


def read(path: Path, options: Options) -> SAE | NormalizedSAE:
    """Return the SAE or transcoder in a folder of llamascopium."""
    cfg = read_json(path / CONFIG, "load")
    file = _file(path)
    if file is None:
        raise FileNotFoundError(f"load: expected {path} to hold {FILES[0]}, found none")
    about = hooks(cfg, path)
    _check(cfg, path / CONFIG, "hook_name_out" in about)
    tensors = _tensors(file, options)
    names = {"W_E": "W_enc", "W_D": "W_dec", "b_E": "b_enc"}
    names |= {"b_D": "b_dec"} if cfg.get("use_decoder_bias", True) else {}
    found = take(tensors, names, file)
    if "b_dec" not in found:
        found["b_dec"] = found["W_dec"].new_zeros(found["W_dec"].shape[-1])
    weights = Weights(file, **found, apply_b_dec_to_input=False, metadata=about)
    weights.expect_width(field(cfg, "d_model", int, path / CONFIG, "load"))
    kind = field(cfg, "act_fn", str, path / CONFIG, "load")
    if kind == "jumprelu":
        set_log_threshold(weights, take(tensors, {LOGS: "logs"}, file)["logs"], cfg)
    _fold(weights, cfg, tensors, path / CONFIG)
    return weights.build(
        CLASSES[kind],
        options,
        transcoder="hook_name_out" in about,
        normalize_activations=_normalization(cfg),
        **_arguments(kind, cfg, path / CONFIG),
    )


def _file(folder: Path) -> Path | None:
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def _check(cfg: dict[str, Any], file: Path, transcoder: bool) -> None:
    """Raise ValueError for what is not a scale and an SAE."""
    if (kind := cfg.get("sae_type", "sae")) != "sae":
        raise refuse(file, f"sae_type {kind!r}")
    if cfg.get("use_glu_encoder"):
        raise refuse(file, "use_glu_encoder, a second encoder that multiplies pre-activations")
    if (act := field(cfg, "act_fn", str, file, "load")) not in CLASSES:
        raise refuse(file, f"act_fn {act!r}")
    norm = cfg.get("norm_activation", "dataset-wise")
    if norm not in ("dataset-wise", "token-wise", "inference"):
        raise refuse(file, f"norm_activation {norm!r}")
    if norm == "token-wise" and transcoder:
        raise refuse(file, "a transcoder whose output is scaled by the norm of its target")


def _tensors(file: Path, options: Options) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return TensorFile(file, "load").tensors()
    held = read_torch(file, "load", allow_pickle=options.allow_pickle)
    state = field(held, "sae", dict, file, "load")
    return {str(name): t for name, t in state.items() if isinstance(t, Tensor)}


def _fold(weights: Weights, cfg: dict[str, Any], tensors: dict[str, Tensor], file: Path) -> None:
    """Fold average norms; where activations are not scaled by them, those in the file are
    garbage."""
    if cfg.get("norm_activation", "dataset-wise") != "dataset-wise":
        return
    norms = norm_tensors(cfg, tensors, file, weights.where)
    weights.fold_scale(*(scale(cfg, weights, norm, file) for norm in norms))


def _normalization(cfg: dict[str, Any]) -> str:
    return "constant_norm_rescale" if cfg.get("norm_activation") == "token-wise" else "none"


def _arguments(kind: str, cfg: dict[str, Any], file: Path) -> dict[str, Any]:
    if kind != "topk":
        return {}
    k = field(cfg, "top_k", int, file, "load", least=1)
    return {"k": k, "select_by_decoder_norm": by_norm(cfg)}
