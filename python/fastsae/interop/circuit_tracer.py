"""circuit-tracer: sets of transcoders, one file for each layer, and cross-layer ones, both ways.

    config.yaml            {model_name, model_kind, feature_input_hook, feature_output_hook, scan}
    layer_N.safetensors    W_enc [d_sae, d], W_dec [d_sae, d], b_enc, b_dec, and where there are any
                           W_skip [d, d] and activation_function.threshold [d_sae]

    f = act(x W_enc^T + b_enc),   y = f W_dec + b_dec + x W_skip^T

Files of cross-layer transcoders are in `circuit_tracer_clt`. Formulas are those of circuit-tracer
0.5.0. The activation is a ReLU, or a JumpReLU where there is a threshold. That one has no ReLU, so
a negative threshold lets negative values through.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from fastsae._files.read import TensorFile, read_yaml
from fastsae._files.write import publish, reason, staging, write_file, write_tensors
from fastsae.interop import circuit_tracer_clt
from fastsae.interop.weights import Options, Weights, facts, listed, refuse, take, transposed
from fastsae.nn import (
    SAE,
    JumpReLUSAE,
    JumpReLUTranscoder,
    NormalizedSAE,
    ReLUSAE,
    ReLUTranscoder,
)
from fastsae.nn.cross_layer_base import CrossLayerMixin

NAME = "circuit-tracer"
CONFIG = "config.yaml"
KIND = "transcoder_set"
THRESHOLD = "activation_function.threshold"
TENSORS = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
OPTIONAL = {"W_skip": "W_skip", THRESHOLD: "threshold"}
LARGEST_LOOK = 1 << 16
LAYER_FILE = re.compile(r"layer_([0-9]{1,6})\.safetensors")


def matches(path: Path) -> bool:
    """Return whether `path` is the folder of a set, or the file of a layer."""
    if path.is_dir():
        held = _layers(path) or circuit_tracer_clt.layers_of(path)
        return bool(held) or _is_config(path / CONFIG)
    return path.is_file() and LAYER_FILE.fullmatch(path.name) is not None


def read(path: Path, options: Options) -> SAE | NormalizedSAE:
    """Return the transcoder of one layer: of `options.layer` where `path` holds several; or the
    cross-layer transcoder of all.

    `config.yaml` beside a file is read for names only, and left out where PyYAML is missing.
    """
    if path.is_dir():
        config = read_yaml(path / CONFIG, "load") if (path / CONFIG).exists() else {}
        if circuit_tracer_clt.layers_of(path):
            _check_kind(config, path / CONFIG, circuit_tracer_clt.KIND)
            sae = circuit_tracer_clt.read(path, options)
            sae.metadata = _metadata(config, None)
            return sae
        _check_kind(config, path / CONFIG, KIND)
        layer = _choose(path, config, options.layer)
        return _read_layer(path / f"layer_{layer}.safetensors", layer, config, options)
    beside = path.parent / CONFIG
    config = read_yaml(beside, "load") if beside.is_file() and find_spec("yaml") else {}
    named = LAYER_FILE.fullmatch(path.name)
    return _read_layer(path, int(named[1]) if named else options.layer, config, options)


def _read_layer(
    file: Path, layer: int | None, config: dict[str, Any], options: Options
) -> SAE | NormalizedSAE:
    tensors = TensorFile(file, "load").tensors()
    if unknown := tensors.keys() - TENSORS.keys() - OPTIONAL.keys():
        raise refuse(file, f"tensors that are none of a transcoder's: {listed(unknown)}")
    names = TENSORS | {name: own for name, own in OPTIONAL.items() if name in tensors}
    found = take(tensors, names, file)
    found["W_enc"] = transposed(found["W_enc"], "W_enc", file)
    weights = Weights(file, **found, apply_b_dec_to_input=False, metadata=_metadata(config, layer))
    weights.expect_width(weights.d_out)
    if weights.threshold is None:
        return weights.build(ReLUSAE, options, transcoder=True)
    if bool((weights.threshold < 0).any()):
        raise refuse(file, "thresholds below 0, above which negative values are active")
    return weights.build(JumpReLUSAE, options, transcoder=True)


def _check_kind(config: dict[str, Any], file: Path, expected: str) -> None:
    if (kind := config.get("model_kind", expected)) != expected:
        raise refuse(file, f"model_kind {kind!r}")


def _choose(folder: Path, config: dict[str, Any], layer: int | None) -> int:
    """Return which layer of a set to read.

    Raises:
        ValueError: there are several, and none was asked for.
        FileNotFoundError: there is none, or not this one.
    """
    held = _layers(folder)
    if not held or (layer is not None and layer not in held):
        wanted = "N" if layer is None else layer
        listed_elsewhere = "; config.yaml lists files elsewhere" if "transcoders" in config else ""
        raise FileNotFoundError(
            f"load: expected {folder} to hold layer_{wanted}.safetensors, found "
            f"{f'layers {held[0]} to {held[-1]}' if held else 'none'}{listed_elsewhere}"
        )
    if layer is None and len(held) > 1:
        raise ValueError(
            f"load: expected layer= one of the layers {held[0]} to {held[-1]} of {folder}, got none"
        )
    return held[0] if layer is None else layer


def _layers(folder: Path) -> list[int]:
    """Return the layers that a folder has files of."""
    found = (LAYER_FILE.fullmatch(entry.name) for entry in folder.iterdir())
    held = (int(named[1]) for named in found if named)
    return sorted(n for n in held if (folder / f"layer_{n}.safetensors").is_file())


def _is_config(file: Path) -> bool:
    """Return whether a file called config.yaml is that of a set; other libraries have one too."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return b"model_kind" in stream.read(LARGEST_LOOK)


def _metadata(config: dict[str, Any], layer: int | None) -> dict[str, str]:
    """Return names of the model and of its hooks, as circuit-tracer makes them of a layer."""
    found = facts(
        model_name=config.get("model_name"),
        hook_name=config.get("feature_input_hook"),
        hook_name_out=config.get("feature_output_hook"),
    )
    before = "" if layer is None else f"blocks.{layer}."
    return {name: text if name == "model_name" else before + text for name, text in found.items()}


def write(sae: SAE, path: str | os.PathLike[str]) -> None:
    """Write a transcoder into one file, best called `layer_N.safetensors`, atomically; or a
    cross-layer one into a folder, see `write_cross_layer`, without its config.yaml.

    Raises:
        ValueError: it is no transcoder that circuit-tracer computes.
        RuntimeError: the file cannot be written; what was there before is kept.
    """
    file = Path(path)
    if isinstance(sae, CrossLayerMixin):
        _write(file, _cross_layer_files(sae, file), {})
        return
    if LAYER_FILE.fullmatch(file.name) is None or file.is_dir():
        raise ValueError(
            f"save: expected a file layer_N.safetensors for circuit-tracer, got {file}"
        )
    _write(file.parent, {file.name: contents(sae)}, {})


def write_set(
    saes: Mapping[int, SAE],
    folder: str | os.PathLike[str],
    model_name: str,
    feature_input_hook: str,
    feature_output_hook: str,
) -> None:
    """Write transcoders of all layers of a model into a folder that circuit-tracer loads.

    Args:
        saes: by layer, from 0 on without a gap; all of one size, all with a skip or none.
        folder: made if needed.
        model_name: of the hub, such as `google/gemma-2-2b`.
        feature_input_hook: where x is read in every block, such as `ln2.hook_normalized`.
        feature_output_hook: where y is, such as `hook_mlp_out`.

    Raises:
        ValueError: circuit-tracer would not take them as one set, or the folder holds other layers.
        RuntimeError: a file cannot be written.
    """
    folder = Path(folder)
    files = {f"layer_{layer}.safetensors": contents(sae) for layer, sae in sorted(saes.items())}
    _check_set(saes, folder, files.values())
    config = _config(KIND, model_name, feature_input_hook, feature_output_hook)
    _write(folder, files, {CONFIG: config})


def write_cross_layer(
    sae: CrossLayerMixin,
    folder: str | os.PathLike[str],
    model_name: str,
    feature_input_hook: str,
    feature_output_hook: str,
) -> None:
    """Write a cross-layer transcoder into a folder that circuit-tracer loads.

    Decoders that are tied, of low rank or of single layers are written out in full, with a warning;
    the threshold of a BatchTopK as one for each latent, as a JumpReLU has them.

    Args:
        sae: over ReLU, JumpReLU or BatchTopK.
        folder: made if needed.
        model_name: of the hub, such as `google/gemma-2-2b`.
        feature_input_hook: where x is read in every block, such as `hook_resid_mid`.
        feature_output_hook: where y is, such as `hook_mlp_out`.

    Raises:
        ValueError: it selects in a way that circuit-tracer does not, has no threshold yet, or the
            folder holds files of other layers.
        RuntimeError: a file cannot be written.
    """
    folder = Path(folder)
    kind = circuit_tracer_clt.KIND
    config = _config(kind, model_name, feature_input_hook, feature_output_hook)
    _write(folder, _cross_layer_files(sae, folder), {CONFIG: config})


def _cross_layer_files(sae: CrossLayerMixin, folder: Path) -> dict[str, dict[str, Tensor]]:
    if folder.is_file():
        raise ValueError(
            f"save: expected a folder for a cross-layer transcoder of circuit-tracer, got {folder}"
        )
    files = circuit_tracer_clt.contents(sae)
    held = circuit_tracer_clt.layers_of(folder) if folder.is_dir() else []
    others = [layer for layer in held if layer >= sae.n_layers]
    if others:
        raise ValueError(
            f"save: expected {folder} to hold no other layers, which would count as of the "
            f"transcoder, got W_enc_{others[0]} or W_dec_{others[0]}"
        )
    return files


def _config(kind: str, model_name: str, input_hook: str, output_hook: str) -> str:
    """Return the text of config.yaml. A JSON value is one of YAML, and needs no quoting."""
    config = {
        "model_name": model_name,
        "model_kind": kind,
        "feature_input_hook": input_hook,
        "feature_output_hook": output_hook,
        "scan": None,
    }
    return "".join(f"{k}: {json.dumps(value, ensure_ascii=False)}\n" for k, value in config.items())


def contents(sae: SAE) -> dict[str, Tensor]:
    """Return the tensors of the file of a transcoder.

    Raises:
        ValueError: it is no transcoder that circuit-tracer computes.
    """
    if not isinstance(sae, (ReLUTranscoder, JumpReLUTranscoder)):
        raise ValueError(
            "save: expected a ReLU or JumpReLU transcoder for circuit-tracer, got "
            f"{type(sae).__name__}; its files have no place for another selection, and would be "
            "read as ReLU"
        )
    if sae.d_out != sae.d_in:
        raise ValueError(
            f"save: expected an output as wide as the input for circuit-tracer, got {sae.d_in} and "
            f"{sae.d_out}"
        )
    tensors = {"W_enc": sae.W_enc_rows, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    if sae.skip:
        tensors["W_skip"] = sae.W_skip
    if isinstance(sae, JumpReLUTranscoder):
        tensors[THRESHOLD] = sae.threshold
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _check_set(saes: Mapping[int, SAE], folder: Path, files: Iterable[dict[str, Tensor]]) -> None:
    """Raise ValueError where circuit-tracer would not take transcoders as one set."""
    if not saes or sorted(saes) != list(range(len(saes))):
        raise ValueError(
            f"save: expected transcoders of layers 0, 1, ... without a gap, got {sorted(saes)}"
        )
    kinds = {(*tensors["W_dec"].shape, "W_skip" in tensors) for tensors in files}
    if len(kinds) > 1:
        raise ValueError(
            "save: expected transcoders of one size, all with a skip or none, got [d_sae, d, skip] "
            f"= {', '.join(str([*kind]) for kind in sorted(kinds))}"
        )
    others = [n for n in (_layers(folder) if folder.is_dir() else []) if n not in saes]
    if others:
        raise ValueError(
            f"save: expected {folder} to hold no other layers, which would count as of the set, "
            f"got layer_{others[0]}.safetensors"
        )


def _write(folder: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, str]) -> None:
    """Write tensor files and then text files into a folder, which is made if needed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staging(folder) as stage:
            for name, held in tensors.items():
                write_tensors(stage / name, held)
            for name, text in texts.items():
                write_file(stage / name, text)
            publish(stage, folder, [*tensors, *texts])
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"save: could not write into {folder} ({reason(error)})") from error
