"""sparsify of EleutherAI: a folder with `sae.safetensors` and `cfg.json`, both ways.

Formulas are those of eai-sparsify 1.3.3. Its module returns the reconstruction from 4 k latents
where `multi_topk` is set; ours is that of the code, k latents.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsae._files.read import TensorFile, field, read_json
from fastsae._files.write import as_json, write_file, write_tensors
from fastsae.interop.weights import Options, Weights, refuse, take
from fastsae.nn import (
    SAE,
    GroupMaxSAE,
    GroupMaxTranscoder,
    NormalizedSAE,
    TopKSAE,
    Transcoder,
)
from fastsae.nn.transcoder import TranscoderMixin

NAME = "sparsify"
WEIGHTS = "sae.safetensors"
CONFIG = "cfg.json"
TENSORS = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def matches(path: Path) -> bool:
    """Return whether `path` is the folder of a hookpoint of sparsify."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def read(path: Path, options: Options) -> SAE | NormalizedSAE:
    """Return the sparse coder in a folder of sparsify."""
    file = path / CONFIG
    cfg = read_json(file, "load")
    if cfg.get("signed"):
        raise refuse(file, "signed latents, which are selected by magnitude")
    tensors = TensorFile(path / WEIGHTS, "load").tensors()
    found = take(tensors, TENSORS, path / WEIGHTS)
    if found["W_enc"].ndim == 2:
        found["W_enc"] = found["W_enc"].t()
    transcode, skip = bool(cfg.get("transcode")), bool(cfg.get("skip_connection"))
    if skip:
        found |= take(tensors, {"W_skip": "W_skip"}, path / WEIGHTS)
    held = Weights(path / WEIGHTS, **found, apply_b_dec_to_input=not transcode)
    kind = cfg.get("activation", "topk")
    arguments: dict[str, Any] = {"k": field(cfg, "k", int, file, "load", least=1)}
    if kind == "topk":
        arguments["multi_topk"] = bool(cfg.get("multi_topk"))
        return held.build(TopKSAE, options, transcoder=transcode, **arguments)
    if kind == "groupmax":
        return held.build(GroupMaxSAE, options, transcoder=transcode, **arguments)
    raise refuse(file, f"activation {kind!r}")


def writer_of(sae: SAE) -> Callable[[Path], object]:
    """Return what writes the files of `sae` into a folder.

    Raises:
        ValueError: sparsify has nothing that computes it.
    """
    transcode, groupmax = isinstance(sae, TranscoderMixin), isinstance(sae, GroupMaxSAE)
    _check(sae, transcode)
    tensors: dict[str, Any] = {
        "encoder.weight": sae.W_enc_rows,
        "encoder.bias": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    skip = isinstance(sae, TranscoderMixin) and sae.skip
    if skip:
        tensors["W_skip"] = sae.W_skip
    cfg = {
        "activation": "groupmax" if groupmax else "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": bool(getattr(sae, "multi_topk", False)),
        "skip_connection": skip,
        "transcode": transcode,
        "d_in": sae.d_in,
    }

    def write(stage: Path) -> None:
        write_tensors(stage / WEIGHTS, tensors)
        write_file(stage / CONFIG, as_json(cfg))

    return write


def _check(sae: SAE, transcode: bool) -> None:
    """Raise ValueError for what sparsify does not compute."""
    exactly = (TopKSAE, Transcoder, GroupMaxSAE, GroupMaxTranscoder)
    if type(sae) not in exactly or getattr(sae, "absolute", False):
        raise ValueError(
            "save: expected TopK or GroupMax, SAE or transcoder, for sparsify, got "
            f"{type(sae).__name__}{' of magnitudes' if getattr(sae, 'absolute', False) else ''}"
        )
    if getattr(sae, "select_by_decoder_norm", False):
        raise ValueError("save: expected select_by_decoder_norm=False for sparsify, got True")
    if sae.W_dec.shape[1] != sae.d_in:
        raise ValueError(
            f"save: expected an output as wide as the input for sparsify, got {sae.d_in} and "
            f"{sae.W_dec.shape[1]}"
        )
    if not transcode and not sae.apply_b_dec_to_input:
        raise ValueError("save: expected apply_b_dec_to_input=True for sparsify, got False")
