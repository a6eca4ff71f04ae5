"""Gemma Scope 1 and 2: files as DeepMind wrote them, read by circuit-tracer's loaders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from .common import D_IN, D_SAE, Case, Cases, Compute, write_json

CONFIG = {
    "architecture": "jump_relu",
    "model_name": "google/gemma-3-270m",
    "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
    "width": D_SAE,
    "l0": 15,
    "affine_connection": False,
    "type": "transcoder",
}


def make(out: Path) -> None:
    """Make every case."""
    cases = Cases(out, "gemma_scope", "circuit-tracer")
    make_first(cases)
    make_second(cases)
    make_cross_layer(cases)


def weights(case: Case) -> dict[str, Tensor]:
    """The tensors of version 1."""
    return {
        "W_enc": case.encoder().t().contiguous(),
        "W_dec": case.rows(),
        "b_enc": case.randn(D_SAE) + 0.5,
        "b_dec": case.randn(D_IN),
        "threshold": case.thresholds(),
    }


def make_first(cases: Cases) -> None:
    """params.npz."""
    from circuit_tracer.transcoder.single_layer_transcoder import load_gemma_scope_transcoder

    case = cases("v1")
    file = case.folder / "params.npz"
    np.savez(file, **{name: tensor.numpy() for name, tensor in weights(case).items()})
    transcoder = load_gemma_scope_transcoder(str(file), 5, device=torch.device("cpu"))
    case.expect_module(case.x(), transcoder, "Gemma Scope params.npz")

    case = cases("v1_lower_case", peer="formula")
    tensors = weights(case)
    lower = {name.lower(): tensor.numpy() for name, tensor in tensors.items()}
    np.savez(case.folder / "params.npz", **lower)
    compute = formula(tensors)
    what = "Gemma Scope params.npz with w_enc and w_dec (circuit-tracer does not read it)"
    case.expect(case.x(), compute, compute, what)


def formula(tensors: dict[str, Tensor]) -> Compute:
    """JumpReLU without a subtracted bias."""

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        w = {name: tensor.to(x.dtype) for name, tensor in tensors.items()}
        pre = x @ w["W_enc"] + w["b_enc"]
        code = pre.relu() * (pre > w["threshold"])
        return code, code @ w["W_dec"] + w["b_dec"]

    return compute


def make_second(cases: Cases) -> None:
    """params.safetensors with config.json or without, with an affine skip or without."""
    from circuit_tracer.transcoder.single_layer_transcoder import load_gemma_scope_2_transcoder

    for name, skip, config in (
        ("v2", False, True),
        ("v2_skip", True, True),
        ("v2_no_config", False, False),
        ("v2_skip_no_config", True, False),
    ):
        case = cases(name)
        tensors = {name.lower(): tensor for name, tensor in weights(case).items()}
        if skip:
            tensors["affine_skip_connection"] = case.randn(D_IN, D_IN) / D_IN**0.5
        file = case.folder / "params.safetensors"
        save_file(tensors, file)
        if config:
            write_json(case.folder / "config.json", {**CONFIG, "affine_connection": skip})
        transcoder = load_gemma_scope_2_transcoder(str(file), 5, device=torch.device("cpu"))
        what = "Gemma Scope 2 params.safetensors"
        what += ", affine_skip_connection [d_in, d_out]" if skip else ""
        case.expect_module(case.x(), transcoder, what + ("" if config else ", no config.json"))


def make_cross_layer(cases: Cases) -> None:
    """A layer of a cross-layer transcoder: its decoder writes to every layer."""
    case = cases("v2_clt", peer="formula")
    tensors = {name.lower(): tensor for name, tensor in weights(case).items()}
    tensors["w_dec"] = case.randn(D_SAE, 3, D_IN)
    save_file(tensors, case.folder / "params.safetensors")
    write_json(case.folder / "config.json", {**CONFIG, "type": "clt"})
    reason = "w_dec has three dimensions: it is a layer of a cross-layer transcoder"
    case.refuse(case.x(), "Gemma Scope 2, CLT, w_dec [d_sae, layers, d]", reason)
