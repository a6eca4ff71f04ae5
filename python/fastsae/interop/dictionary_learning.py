"""dictionary_learning: a folder with `ae.pt` and `config.json`, both ways.

Formulas are those of dictionary-learning 0.1.0, as its `from_pretrained` makes the module: so rows
of an `AutoEncoder`'s decoder are scaled to norm 1, and its code by what they had.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae._files.read import field, read_json, read_torch
from fastsae._files.write import as_json, write_file
from fastsae.interop.weights import Options, Weights, is_held, refuse, take
from fastsae.nn import (
    SAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    NormalizedSAE,
    ReLUSAE,
    TopKSAE,
)

NAME = "dictionary-learning"
WEIGHTS = "ae.pt"
CONFIG = "config.json"
LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
"""Matrices of `nn.Linear`, `[out, in]`."""


def matches(path: Path) -> bool:
    """Return whether `path` is a folder of dictionary_learning."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def read(path: Path, options: Options) -> SAE | NormalizedSAE:
    """Return the dictionary in a folder of dictionary_learning."""
    file = path / WEIGHTS
    config = read_json(path / CONFIG, "load")
    trainer = field(config, "trainer", dict, path / CONFIG, "load")
    kind = field(trainer, "dict_class", str, path / CONFIG, "load")
    held = read_torch(file, "load", allow_pickle=options.allow_pickle)
    scale = None
    if isinstance(held.get("ae"), dict):  # the backup of an interrupted run, not scaled back yet
        held, scale = held["ae"], held.get("norm_factor")
    tensors = {str(name): t for name, t in held.items() if isinstance(t, Tensor)}
    if kind == "AutoEncoder" and "bias" not in tensors and "decoder.bias" in tensors:
        kind = "AutoEncoderNew"  # its trainer calls every dictionary AutoEncoder
    if kind not in READERS:
        raise refuse(path / CONFIG, f"dict_class {kind!r}")
    metadata = {"model_name": trainer.get("lm_name"), "hook_name": trainer.get("submodule_name")}
    about = {name: value for name, value in metadata.items() if isinstance(value, str)}
    cls, names, centered = READERS[kind]
    found = take(tensors, names, file)
    for name in LINEAR.keys() & names.keys():
        found[names[name]] = _transposed(found[names[name]], name, file)
    weights = Weights(file, **found, apply_b_dec_to_input=centered, metadata=about)
    if scale is not None:
        _unscale_biases(weights, float(_number(scale, "norm_factor", file)))
    if kind == "AutoEncoder":
        weights.fold_norms()
    arguments: dict[str, Any] = {}
    if cls in (TopKSAE, BatchTopKSAE, MatryoshkaSAE):
        take(tensors, {"k": "k"}, file)
    if cls is not ReLUSAE and "k" in tensors:
        arguments["k"] = int(_number(tensors["k"], "k", file))
    if cls is MatryoshkaSAE:
        groups = take(tensors, {"group_sizes": "groups"}, file)["groups"]
        whole = groups.dtype in (torch.int64, torch.int32) and is_held(groups)
        if groups.ndim != 1 or not whole:
            raise weights.wrong("group_sizes to be integers [groups]", groups)
        arguments["groups"] = groups.tolist()
    return weights.build(cls, options, **arguments)


def _number(value: Any, name: str, file: Path) -> float:
    """Return a finite number that a file holds as one, or as a tensor of one."""
    if isinstance(value, Tensor) and value.shape == () and is_held(value):
        value = value.item()
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"load: expected {name} in {file} to be one finite number, got another")
    return value


def _transposed(matrix: Tensor, name: str, file: Path) -> Tensor:
    if matrix.ndim != 2:
        raise ValueError(f"load: expected {name} to be a matrix in {file}, got {[*matrix.shape]}")
    return matrix.t()


def _unscale_biases(weights: Weights, factor: float) -> None:
    """Do what a run does in the end: trained on `x / factor`, biases and thresholds times it."""
    weights.b_enc = weights.b_enc.double() * factor
    weights.b_dec = weights.b_dec.double() * factor
    if weights.b_mag is not None:
        weights.b_mag = weights.b_mag.double() * factor
    if weights.threshold is not None:
        weights.threshold = weights.threshold.double() * factor


OWN = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
TOPK = {**LINEAR, "encoder.bias": "b_enc", "b_dec": "b_dec"}
READERS: dict[str, tuple[type[SAE], dict[str, str], bool]] = {
    "AutoEncoder": (ReLUSAE, {**LINEAR, "encoder.bias": "b_enc", "bias": "b_dec"}, True),
    "AutoEncoderNew": (
        ReLUSAE,
        {**LINEAR, "encoder.bias": "b_enc", "decoder.bias": "b_dec"},
        False,
    ),
    "GatedAutoEncoder": (
        GatedSAE,
        {**LINEAR, "gate_bias": "b_enc", "mag_bias": "b_mag", "r_mag": "r_mag",
         "decoder_bias": "b_dec"},
        True,
    ),
    "JumpReluAutoEncoder": (JumpReLUSAE, {**OWN, "threshold": "threshold"}, False),
    "AutoEncoderTopK": (TopKSAE, TOPK, True),
    "BatchTopKSAE": (BatchTopKSAE, {**TOPK, "threshold": "threshold"}, True),
    "MatryoshkaBatchTopKSAE": (MatryoshkaSAE, {**OWN, "threshold": "threshold"}, True),
}  # fmt: skip
"""By dict_class: the class here, names of tensors, and whether b_dec is subtracted from x."""


def writer_of(sae: SAE) -> Callable[[Path], object]:
    """Return what writes the files of `sae` into a folder.

    Raises:
        ValueError: dictionary_learning has nothing that computes it.
    """
    kind = {
        ReLUSAE: "AutoEncoder",
        GatedSAE: "GatedAutoEncoder",
        JumpReLUSAE: "JumpReluAutoEncoder",
        TopKSAE: "AutoEncoderTopK",
        BatchTopKSAE: "BatchTopKSAE",
        MatryoshkaSAE: "MatryoshkaBatchTopKSAE",
    }.get(type(sae))
    if kind is None or getattr(sae, "absolute", False):
        raise ValueError(
            "save: expected ReLU, Gated, JumpReLU, TopK, BatchTopK or Matryoshka for "
            f"dictionary-learning, got {type(sae).__name__}"
        )
    if kind == "AutoEncoder" and not sae.apply_b_dec_to_input:
        kind = "AutoEncoderNew"
    _check(sae, kind)
    held = _held(sae, kind)
    trainer = {
        "dict_class": kind,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "lm_name": sae.metadata.get("model_name"),
        "submodule_name": sae.metadata.get("hook_name"),
    }
    if "k" in held:
        trainer["k"] = int(held["k"])

    def write(stage: Path) -> None:
        buffer = io.BytesIO()
        torch.save(held, buffer)
        write_file(stage / WEIGHTS, buffer.getvalue())
        write_file(stage / CONFIG, as_json({"trainer": trainer}))

    return write


def _check(sae: SAE, kind: str) -> None:
    """Raise ValueError for what a class of dictionary_learning computes in another way."""
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        norms = torch.linalg.vector_norm(sae.W_dec.detach().double(), dim=1)
        if kind == "AutoEncoder" and bool(((norms - 1).abs() > 1e-6).any()):
            raise ValueError(
                "save: expected rows of W_dec of norm 1 for dictionary-learning, which scales the "
                f"code to them, got {float(norms.min()):.4g} to {float(norms.max()):.4g}"
            )
    elif kind == "JumpReluAutoEncoder":
        if sae.apply_b_dec_to_input and sae.b_enc.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "save: expected float32 or float64 for dictionary-learning, which has b_dec in the "
                f"bias of the encoder, got {sae.b_enc.dtype}; call sae.float() first"
            )
    elif not sae.apply_b_dec_to_input:
        raise ValueError(
            f"save: expected apply_b_dec_to_input=True for a {kind} of dictionary-learning, got "
            "False"
        )
    k = getattr(sae, "k", None)
    if isinstance(sae, TopKSAE | BatchTopKSAE) and k != int(k or 0):
        raise ValueError(f"save: expected a whole k for dictionary-learning, got {k}")
    if getattr(sae, "select_by_decoder_norm", False):
        raise ValueError("save: expected select_by_decoder_norm=False, got True")


def _held(sae: SAE, kind: str) -> dict[str, Tensor]:
    """Return the tensors of a class of dictionary_learning."""
    _, names, _ = READERS[kind]
    b_enc = sae.b_enc.detach()
    if kind == "JumpReluAutoEncoder" and sae.apply_b_dec_to_input:  # theirs never subtracts it
        shift = sae.b_dec.detach().double() @ sae.W_enc.detach().double()
        b_enc = (b_enc.double() - shift).to(b_enc.dtype)
    own: dict[str, Tensor] = {
        "W_enc": sae.W_enc,
        "W_dec": sae.W_dec,
        "b_enc": b_enc,
        "b_dec": sae.b_dec,
    }
    if isinstance(sae, GatedSAE):
        own |= {"b_mag": sae.b_mag, "r_mag": sae.r_mag}
    if isinstance(sae, JumpReLUSAE | BatchTopKSAE):
        own["threshold"] = sae.threshold
    held = {
        name: (own[mine].t() if name in LINEAR else own[mine]).detach().cpu().contiguous().clone()
        for name, mine in names.items()
    }
    if isinstance(sae, TopKSAE | BatchTopKSAE):
        held["k"] = torch.tensor(int(sae.k), dtype=torch.int32)
        held.setdefault("threshold", torch.tensor(-1.0))
    if isinstance(sae, MatryoshkaSAE):
        held["group_sizes"] = torch.tensor(sae.groups)
    return held
