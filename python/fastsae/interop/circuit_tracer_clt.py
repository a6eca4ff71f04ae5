"""The files of a cross-layer transcoder of circuit-tracer, both ways.

    W_enc_N.safetensors    W_enc_N [d_transcoder, d], b_enc_N, b_dec_N [d], and where it is a
                           JumpReLU threshold_N [d_transcoder]
    W_dec_N.safetensors    W_dec_N [d_transcoder, n_layers - N, d]

    f_l = act(x_l W_enc_l^T + b_enc_l),   y_m = sum_(l <= m) f_l W_dec_l[:, m - l] + b_dec_m

Formulas are those of circuit-tracer 0.5.0, which loads no skip connections from such files.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from fastsae._files.read import TensorFile
from fastsae._log import logger
from fastsae.interop.weights import (
    FLOATS,
    SMALLEST_THRESHOLD,
    Options,
    is_plain,
    listed,
    refuse,
)
from fastsae.nn import (
    SAE,
    BatchTopKCrossLayerTranscoder,
    JumpReLUCrossLayerTranscoder,
    ReLUCrossLayerTranscoder,
)
from fastsae.nn.cross_layer_base import CrossLayerMixin

KIND = "cross_layer_transcoder"
FILE = re.compile(r"W_(enc|dec)_([0-9]{1,6})\.safetensors")


def layers_of(folder: Path) -> list[int]:
    """Return the layers that a folder has a file of, an encoder's or a decoder's."""
    found = (FILE.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted({int(named[2]) for named in found if named})


def read(folder: Path, options: Options) -> CrossLayerMixin:
    """Return the transcoder of all layers, in eval mode.

    Raises:
        FileNotFoundError: a file of a layer is missing.
        ValueError: one layer is asked for, a tensor is not as said above, or a threshold below 0.
    """
    if options.layer is not None:
        raise ValueError(
            f"load: expected no layer= for {folder}, a cross-layer transcoder, whose layers belong "
            f"together, got {options.layer}"
        )
    n_layers = layers_of(folder)[-1] + 1
    sae: CrossLayerMixin | None = None
    for layer in range(n_layers):
        encoder, decoder = (_tensors(folder, kind, layer) for kind in ("enc", "dec"))
        if sae is None:
            sae = _fitting(encoder, n_layers, folder, options)
        _fill(sae, layer, encoder | decoder, folder)
    assert sae is not None
    if isinstance(sae, JumpReLUCrossLayerTranscoder):
        sae.thresholds_in_units = False
    return sae.to(options.device).eval()


def _tensors(folder: Path, kind: str, layer: int) -> dict[str, Tensor]:
    """Return the tensors of a file without the number of its layer in their names."""
    file = folder / f"W_{kind}_{layer}.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"load: expected {folder} to hold {file.name}, found none")
    wanted = ("W_enc", "b_enc", "b_dec", "threshold") if kind == "enc" else ("W_dec",)
    known = {f"{name}_{layer}": name for name in wanted}
    tensors = TensorFile(file, "load").tensors()
    if unknown := tensors.keys() - known.keys():
        raise refuse(file, f"tensors that are none of a transcoder's: {listed(unknown)}")
    missing = known.keys() - tensors.keys() - {f"threshold_{layer}"}
    if missing:
        raise ValueError(f"load: expected {file} to hold {listed(missing)}, got {listed(tensors)}")
    return {known[name]: tensor for name, tensor in tensors.items()}


def _fitting(
    encoder: dict[str, Tensor], n_layers: int, folder: Path, options: Options
) -> CrossLayerMixin:
    """Return a module of the sizes of the first encoder."""
    W_enc = encoder["W_enc"]
    if W_enc.ndim != 2 or 0 in W_enc.shape or not is_plain(W_enc):
        raise ValueError(
            f"load: expected W_enc_0 to be floating [d_transcoder, d] in {folder}, got "
            f"{W_enc.dtype} {[*W_enc.shape]}"
        )
    jumps = "threshold" in encoder
    cls = JumpReLUCrossLayerTranscoder if jumps else ReLUCrossLayerTranscoder
    dtype = options.dtype or (W_enc.dtype if W_enc.dtype in FLOATS else torch.float32)
    with torch.random.fork_rng(devices=[]):
        return cls(W_enc.shape[1], n_layers, W_enc.shape[0], dtype=dtype)


@torch.no_grad()
def _fill(sae: CrossLayerMixin, layer: int, tensors: dict[str, Tensor], folder: Path) -> None:
    width, latents = sae.d_model, sae.d_transcoder
    shapes = {
        "W_enc": (latents, width),
        "b_enc": (latents,),
        "b_dec": (width,),
        "W_dec": (latents, sae.n_layers - layer, width),
    }
    if isinstance(sae, JumpReLUCrossLayerTranscoder):
        shapes["threshold"] = (latents,)
    if tensors.keys() != shapes.keys():
        raise ValueError(
            f"load: expected layers of {folder} to have a threshold or none, all of them, got "
            f"another in layer {layer}"
        )
    for name, shape in shapes.items():
        if (got := tensors[name]).shape != shape or not is_plain(got):
            raise ValueError(
                f"load: expected {name}_{layer} to be floating {[*shape]} in {folder}, got "
                f"{got.dtype} {[*got.shape]}"
            )
    W_enc, b_enc, W_dec = sae.dictionaries[layer]
    W_enc.copy_(tensors["W_enc"])
    b_enc.copy_(tensors["b_enc"])
    W_dec.copy_(tensors["W_dec"].flatten(1))
    sae.layers(sae.b_dec)[layer].copy_(tensors["b_dec"])
    if isinstance(sae, JumpReLUCrossLayerTranscoder):
        threshold = tensors["threshold"].double()
        if bool((threshold < 0).any()):
            raise refuse(folder, "thresholds below 0, above which negative values are active")
        logs = threshold.clamp_min(SMALLEST_THRESHOLD).log()
        sae.log_threshold[layer * latents : (layer + 1) * latents].copy_(logs)


def contents(sae: CrossLayerMixin) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of all files, by their names.

    Decoders of another kind than `full` are written out in full, and the threshold of a BatchTopK
    as one for each latent, which is what it compares with in eval mode.

    Raises:
        ValueError: it selects in a way that circuit-tracer does not, or has no threshold yet.
    """
    _check(sae)
    if sae.decoders != "full":
        held = sum(W.numel() for W in sae.matrices[1:] if W is not None)
        later = sae.n_layers * (sae.n_layers + 1) // 2
        logger.warning(
            "save: circuit-tracer has no %s decoders; written out in full, %d numbers for %d",
            sae.decoders, sae.d_transcoder * later * sae.d_model, held,
        )  # fmt: skip
    thresholds = _thresholds(sae)
    b_dec = sae.layers(sae.b_dec)
    files = {}
    for layer, own in enumerate(sae.dictionaries):
        tensors = {"W_enc": own.W_enc, "b_enc": own.b_enc, "b_dec": b_dec[layer]}
        if thresholds is not None:
            tensors["threshold"] = thresholds[layer]
        parts = {"W_enc": tensors, "W_dec": {"W_dec": sae.written(layer)}}
        for name, held_there in parts.items():
            files[f"{name}_{layer}.safetensors"] = {
                f"{key}_{layer}": tensor.detach().contiguous() for key, tensor in held_there.items()
            }
    return files


def _check(sae: SAE) -> None:
    classes = (
        ReLUCrossLayerTranscoder,
        JumpReLUCrossLayerTranscoder,
        BatchTopKCrossLayerTranscoder,
    )
    if not isinstance(sae, classes):
        raise ValueError(
            "save: expected a ReLU, JumpReLU or BatchTopK cross-layer transcoder for "
            f"circuit-tracer, got {type(sae).__name__}; its files have no place for another "
            "selection, and would be read as ReLU"
        )
    if isinstance(sae, BatchTopKCrossLayerTranscoder) and not bool(sae.threshold.isfinite().all()):
        raise ValueError(
            "save: expected a threshold of the BatchTopKCrossLayerTranscoder for circuit-tracer, "
            "got none yet; train it or call calibrate_"
        )


def _thresholds(sae: CrossLayerMixin) -> Tensor | None:
    """Return what latents are compared with, [n_layers, d_transcoder]; None for a ReLU."""
    shape = (sae.n_layers, sae.d_transcoder)
    if isinstance(sae, JumpReLUCrossLayerTranscoder):
        return sae.threshold.view(shape)
    if isinstance(sae, BatchTopKCrossLayerTranscoder):
        return sae.threshold.clamp_min(0).reshape(-1, 1).expand(shape)
    return None
