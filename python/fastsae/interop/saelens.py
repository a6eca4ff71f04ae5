"""SAELens: its folders of every version, and what its architectures are here.

Formulas and settings are those of sae-lens 6.54.12; folders of versions below 6 are read as 5.10.7
does. A folder of a run in the middle of training holds weights for scaled or whitened activations,
with the factor beside them; it is folded in, which SAELens itself does not do when it loads one.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae._files.read import TensorFile, field, read_json
from fastsae.interop.weights import Options, Weights, is_plain, refuse, take
from fastsae.nn import (
    SAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatchingPursuitSAE,
    MatryoshkaSAE,
    NormalizedSAE,
    ReLUSAE,
    TopKSAE,
)

NAME = "saelens"
WEIGHTS = "sae_weights.safetensors"
CONFIG = "cfg.json"
SCALER = "activation_scaler.json"
WHITENING = "activation_whitening.safetensors"
IDENTITIES = ("none", "expected_average_only_in", "covariance_whitening", None)
"""Normalizations that are folded into the weights when training ends."""
CLASSES: dict[str, type[SAE]] = {
    "standard": ReLUSAE,
    "gated": GatedSAE,
    "jumprelu": JumpReLUSAE,
    "topk": TopKSAE,
    "abstopk": TopKSAE,
    "batchtopk": BatchTopKSAE,
    "matryoshka_batchtopk": MatryoshkaSAE,
    "transcoder": ReLUSAE,
    "skip_transcoder": ReLUSAE,
    "jumprelu_transcoder": JumpReLUSAE,
    "jumprelu_skip_transcoder": JumpReLUSAE,
}


def matches(path: Path) -> bool:
    """Return whether `path` is a folder of SAELens."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def read(path: Path, options: Options) -> SAE | NormalizedSAE:
    """Return the SAE in a folder of SAELens."""
    file = path / CONFIG
    cfg = read_json(file, "load")
    weights = TensorFile(path / WEIGHTS, "load").tensors()
    sizes = {key: field(cfg, key, int, file, "load", least=1) for key in ("d_in", "d_sae")}
    cfg = _modern(cfg, weights, file)
    name = field({"architecture": "standard"} | cfg, "architecture", str, file, "load")
    metadata = dict(cfg["metadata"])
    for own in ("fastsae", "sae_lens_version"):
        metadata.pop(own, None)
    if name == "matching_pursuit":
        return _matching_pursuit(path, cfg | sizes, weights, metadata, options)
    if name not in CLASSES:
        raise refuse(file, f"architecture {name!r}")
    held = _weights(path, cfg, name, weights, metadata)
    _check_sizes(held, sizes)
    _fold_scaler(path, held, cfg)
    rescale = name in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")
    if rescale and cfg.get("rescale_acts_by_decoder_norm"):
        held.fold_norms()
    return held.build(
        CLASSES[name],
        options,
        **_around(cfg, file),
        transcoder=name.endswith("transcoder"),
        **_arguments(name, cfg, file),
    )


def _check_sizes(held: Weights, cfg: dict[str, Any]) -> None:
    """Raise ValueError where tensors are not of the sizes that cfg.json says."""
    if (cfg["d_in"], cfg["d_sae"]) != (held.d_in, held.d_sae):
        sizes = [held.d_in, held.d_sae]
        raise held.wrong(f"[d_in, d_sae] = {[cfg['d_in'], cfg['d_sae']]}", sizes)


def _arguments(name: str, cfg: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return constructor arguments of an architecture."""
    if name in ("topk", "abstopk"):
        k = field(cfg, "k", float, file, "load", least=1)
        if k != int(k):
            raise ValueError(f"load: expected k in {file} to be a whole number, got {k}")
        return {"k": int(k), "absolute": name == "abstopk"}
    if name == "batchtopk":
        return {"k": field(cfg, "k", float, file, "load")}
    if name == "matryoshka_batchtopk":
        ends = field(cfg, "matryoshka_widths", list, file, "load")
        if not all(type(end) is int for end in ends):
            raise ValueError(f"load: expected matryoshka_widths in {file} to be whole numbers")
        groups = [b - a for a, b in pairwise([0, *ends])]
        return {"k": field(cfg, "k", float, file, "load"), "groups": groups}
    return {}


def _around(cfg: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return how activations are normalized and reshaped."""
    kind = cfg.get("normalize_activations")
    if kind not in (*IDENTITIES, "layer_norm", "constant_norm_rescale"):
        raise refuse(file, f"normalize_activations {kind!r}")
    shape = cfg.get("reshape_activations") or "none"
    if shape not in ("none", "hook_z"):
        raise refuse(file, f"reshape_activations {shape!r}")
    kind = "none" if kind in IDENTITIES else str(kind)
    return {"normalize_activations": kind, "reshape_activations": shape}


def _weights(
    path: Path, cfg: dict[str, Any], name: str, tensors: dict[str, Tensor], about: dict[str, Any]
) -> Weights:
    """Return the tensors of a folder."""
    file = path / WEIGHTS
    names = {"W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    names |= {"b_gate": "b_enc"} if name == "gated" else {"b_enc": "b_enc"}
    if name == "gated":
        names |= {"b_mag": "b_mag", "r_mag": "r_mag"}
    if name.startswith("jumprelu"):
        if "log_threshold" in tensors:  # training folders before 6.14
            tensors = {**tensors, "threshold": tensors["log_threshold"].double().exp()}
        names["threshold"] = "threshold"
    if name.endswith("batchtopk"):
        names["topk_threshold"] = "threshold"
    if name.endswith("skip_transcoder"):
        names["W_skip"] = "W_skip"
    found = take(tensors, names, file)
    if unread := tensors.keys() - names.keys() - {"log_threshold", "threshold"}:
        raise refuse(file, f"{', '.join(sorted(unread))}, which {name} does not have")
    centered = cfg.get("apply_b_dec_to_input", not name.endswith("transcoder"))
    return Weights(file, **found, apply_b_dec_to_input=bool(centered), metadata=about)


def _fold_scaler(path: Path, held: Weights, cfg: dict[str, Any]) -> None:
    """Fold what a run in the middle of training has beside its weights."""
    scale, whitening = _scaler(path)
    if whitening is not None:
        _fold_whitening(held, whitening, bool(cfg.get("rescale_acts_by_decoder_norm")))
        cfg["rescale_acts_by_decoder_norm"] = False
    if scale is not None:
        held.fold_scale(scale)
        if held.threshold is not None and cfg.get("rescale_acts_by_decoder_norm"):
            held.threshold = held.threshold.double() / scale  # the norms are divided by it


def _scaler(path: Path) -> tuple[float | None, dict[str, Tensor] | None]:
    """Return the factor and the whitening beside the weights, None each where there is none."""
    if not (path / SCALER).exists():
        return None, None
    about = read_json(path / SCALER, "load")
    scale = about.get("scaling_factor")
    if "scaling_factor" not in about and not about.get("has_whitening"):
        raise ValueError(f"load: expected scaling_factor in {path / SCALER}, got none")
    if scale is not None:
        scale = field(about, "scaling_factor", float, path / SCALER, "load")
        if scale <= 0:
            raise ValueError(f"load: expected scaling_factor > 0 in {path / SCALER}, got {scale}")
    whitening = None
    if about.get("has_whitening"):
        whitening = TensorFile(path / WHITENING, "load").tensors()
        names = {name: name for name in ("mean", "matrix", "inverse_matrix")}
        whitening = take(whitening, names, path / WHITENING)
        if not all(map(is_plain, whitening.values())):
            raise ValueError(f"load: expected floating tensors in {path / WHITENING}, got others")
    return scale, whitening


def _fold_whitening(held: Weights, whitening: dict[str, Tensor], rescaled: bool) -> None:
    """Make an SAE of `(x - mean) M` one of x; the code stays as it is.

    The norms that a rescaled selection looks at are those before.
    """
    mean, matrix, inverse = (
        whitening[name].double() for name in ("mean", "matrix", "inverse_matrix")
    )
    if matrix.shape != (held.d_in, held.d_in) or inverse.shape != matrix.shape:
        raise held.wrong(f"a whitening of width {held.d_in}", matrix)
    if held.d_out != held.d_in:
        raise held.wrong("an SAE of whitened activations", "a transcoder")
    if mean.shape != (held.d_in,):
        raise held.wrong(f"a mean of width {held.d_in}", mean)
    if rescaled:
        held.fold_norms()
    held.W_enc = matrix @ held.W_enc.double()
    if not held.apply_b_dec_to_input:
        shift = mean @ held.W_enc
        held.b_enc = held.b_enc.double() - shift
        if held.b_mag is not None and held.r_mag is not None:
            held.b_mag = held.b_mag.double() - shift * held.r_mag.double().exp()
    held.W_dec = held.W_dec.double() @ inverse
    held.b_dec = held.b_dec.double() @ inverse + mean


def _matching_pursuit(
    path: Path,
    cfg: dict[str, Any],
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    options: Options,
) -> SAE | NormalizedSAE:
    file = path / CONFIG
    found = take(tensors, {"W_dec": "W_dec", "b_dec": "b_dec"}, path / WEIGHTS)
    W_dec = found["W_dec"]
    if W_dec.ndim != 2:
        raise ValueError(
            f"load: expected W_dec to be a matrix in {path / WEIGHTS}, got {[*W_dec.shape]}"
        )
    held = Weights(
        path / WEIGHTS,
        W_enc=W_dec.t(),
        **found,
        b_enc=W_dec.new_zeros(len(W_dec)),
        apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", True)),
        metadata=metadata,
    )
    _check_sizes(held, cfg)
    stop = float(field(cfg, "residual_threshold", float, file, "load", least=0))
    scale, whitening = _scaler(path)
    if whitening is not None:
        raise refuse(file, "matching pursuit of whitened activations")
    if scale is not None:
        # f of c x is c f of x, so the decoder stays: outputs and the code are both in raw units.
        held.b_dec = held.b_dec.double() / scale
        stop /= scale
    iterations = cfg.get("max_iterations")
    if iterations is not None:
        iterations = field(cfg, "max_iterations", int, file, "load", least=1)
    return held.build(
        MatchingPursuitSAE,
        options,
        **_around(cfg, file),
        residual_threshold=stop,
        max_iterations=iterations,
        stop_on_duplicate_support=bool(cfg.get("stop_on_duplicate_support", True)),
    )


def _modern(cfg: dict[str, Any], tensors: dict[str, Tensor], file: Path) -> dict[str, Any]:
    """Return the settings of a folder of a version below 6 as those of version 6, and fold its
    factors; others as they are."""
    metadata = cfg.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"load: expected metadata in {file} to be an object, got another value")
    version = str((metadata if isinstance(metadata, dict) else cfg).get("sae_lens_version", ""))
    major = version.split(".")[0]
    if isinstance(metadata, dict) and (int(major) if major.isdecimal() else 6) >= 6:
        return cfg
    old = {**cfg, **(metadata if isinstance(metadata, dict) else {})}
    hook = str(old.get("hook_name") or old.get("hook_point") or "")
    act = old.get("activation_fn_str") or old.get("activation_fn") or "relu"
    new = {
        "architecture": old.get("architecture") or "standard",
        "apply_b_dec_to_input": old.get("apply_b_dec_to_input", True),
        "normalize_activations": old.get("normalize_activations"),
        "reshape_activations": "hook_z" if "hook_z" in hook else "none",
        "metadata": {
            "hook_name": hook,
            **{
                name: old[name]
                for name in ("model_name", "prepend_bos", "context_size")
                if name in old
            },
        },
    }
    if isinstance(new["normalize_activations"], bool):  # the average norm, folded in the end
        new["normalize_activations"] = "none"
    if act == "topk" and new["architecture"] in ("standard", "topk"):
        kwargs = old.get("activation_fn_kwargs")
        k = kwargs.get("k") if isinstance(kwargs, dict) else None
        new |= {"architecture": "topk", "k": k}
    elif act != "relu":
        raise refuse(file, f"activation {act!r} of {new['architecture']}")
    _fold_factor(bool(old.get("finetuning_scaling_factor")), tensors, file)
    return new


def _fold_factor(declared: bool, tensors: dict[str, Tensor], file: Path) -> None:
    """Fold the factors on a fine-tuned SAE's code, which its decoder alone saw."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        factor = tensors.pop(name, None)
        if factor is None:
            continue
        W_dec = tensors.get("W_dec")
        if W_dec is None or W_dec.ndim != 2 or factor.shape != W_dec.shape[:1]:
            raise ValueError(
                f"load: expected {name} to be [d_sae] in {file}, got {[*factor.shape]}"
            )
        if not (is_plain(factor) and is_plain(W_dec)):
            raise ValueError(f"load: expected {name} and W_dec in {file} to be floating")
        if bool((factor == 1).all()):
            continue
        if not declared:
            raise refuse(file, f"{name} is not 1, while finetuning_scaling_factor is false")
        tensors["W_dec"] = factor.double().unsqueeze(1) * W_dec.double()


__all__ = ["matches", "read"]
