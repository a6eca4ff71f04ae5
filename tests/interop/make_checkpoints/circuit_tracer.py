"""circuit-tracer: sets of transcoders, one file per layer, and a cross-layer transcoder."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import D_IN, D_SAE, Case, Cases, Compute

LAYERS = 2
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
CPU = torch.device("cpu")


def make(out: Path) -> None:
    """Make every case."""
    cases = Cases(out, "circuit_tracer", "circuit-tracer")
    for name, jumprelu, skip in (
        ("relu", False, False),
        ("relu_skip", False, True),
        ("jumprelu", True, False),
        ("jumprelu_skip", True, True),
    ):
        case = cases(name)
        save_set(case, jumprelu, skip)
        expect_set(case, f"transcoder set of {name}, float32")

    case = cases("relu_bfloat16")
    save_set(case, False, True, torch.bfloat16)
    expect_set(case, "transcoder set of relu with skips, bfloat16 (the classes' default), upcast")

    case = cases("jumprelu_negative_thresholds")
    save_set(case, True, False, change=-0.5)
    reason = "a threshold below 0: its JumpReLU has no relu and passes negative values"
    case.refuse(case.x(), "transcoder set of jumprelu, some thresholds below 0", reason)
    make_cross_layer(cases)


def write_config(case: Case, kind: str) -> None:
    """Write config.yaml."""
    import yaml

    config = {"model_name": "google/gemma-2-2b", "model_kind": kind, "scan": "owner/name", **HOOKS}
    (case.folder / "config.yaml").write_text(yaml.dump(config))


def save_set(
    case: Case,
    jumprelu: bool,
    skip: bool,
    dtype: torch.dtype = torch.float32,
    change: float = 0.0,
) -> None:
    """Save a set with generic weights."""
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import (
        SingleLayerTranscoder,
        TranscoderSet,
    )

    def transcoder(layer: int) -> nn.Module:
        act = JumpReLU((case.thresholds() + change).to(dtype), 0.1) if jumprelu else F.relu
        one = SingleLayerTranscoder(D_IN, D_SAE, act, layer, skip, device=CPU, dtype=dtype)
        one.W_enc.data = case.encoder().to(dtype)
        one.W_dec.data = case.rows().to(dtype)
        one.b_enc.data = (case.randn(D_SAE) + 0.3).to(dtype)
        one.b_dec.data = case.randn(D_IN).to(dtype)
        if skip:
            one.W_skip.data = (case.randn(D_IN, D_IN) / D_IN**0.5).to(dtype)
        return one

    layers = {layer: transcoder(layer) for layer in range(LAYERS)}
    TranscoderSet(layers, **HOOKS).to_safetensors(str(case.folder))
    write_config(case, "transcoder_set")


def expect_set(case: Case, what: str) -> None:
    """Write what the set computes of activations of every layer, x [layers, n, d]."""
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    paths = {layer: str(case.folder / f"layer_{layer}.safetensors") for layer in range(LAYERS)}

    def at(dtype: torch.dtype) -> Compute:
        transcoders = load_transcoder_set(paths, "", **HOOKS, device=CPU, dtype=dtype)

        def compute(x: Tensor) -> tuple[Tensor, Tensor]:
            code = transcoders.encode(x)
            return code, transcoders.decode(code, x)

        return compute

    x = torch.stack([case.x() for _ in range(LAYERS)])
    what += "; x, code and out have a dimension of layers in front"
    case.expect(x, at(torch.float32), at(torch.float64), what, layers=str(LAYERS))


def make_cross_layer(cases: Cases) -> None:
    """Cross-layer transcoders."""
    for name, jumprelu in (("clt_relu", False), ("clt_jumprelu", True)):
        case = cases(name)
        save_cross_layer(case, jumprelu)
        expect_cross_layer(case, f"cross-layer transcoder, {name.removeprefix('clt_')}, float32")
    case = cases("clt")
    save_cross_layer(case, True, change=-0.5)
    reason = "a threshold below 0: its JumpReLU has no relu and passes negative values"
    case.refuse(case.x(), "cross-layer transcoder, some thresholds below 0", reason)


def save_cross_layer(case: Case, jumprelu: bool, change: float = 0.0) -> None:
    """Save a cross-layer transcoder with generic weights."""
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder

    act = "jump_relu" if jumprelu else "relu"
    clt = CrossLayerTranscoder(
        LAYERS, D_SAE, D_IN, act, lazy_decoder=False, device=CPU, dtype=torch.float32
    )
    for name, parameter in clt.named_parameters():
        parameter.data = case.randn(*parameter.shape)
        if name == "W_enc":
            parameter.data /= D_IN**0.5
        if name.endswith("threshold"):
            rows = [case.thresholds() for _ in range(LAYERS)]
            parameter.data = torch.stack(rows).view(parameter.shape) + change
    clt.to_safetensors(str(case.folder))
    write_config(case, "cross_layer_transcoder")


def expect_cross_layer(case: Case, what: str) -> None:
    """Write what it computes of activations of every layer side by side, x [n, layers * d]."""
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt

    def at(dtype: torch.dtype) -> Compute:
        clt = load_clt(str(case.folder), device=CPU, dtype=dtype, lazy_decoder=False)

        def compute(x: Tensor) -> tuple[Tensor, Tensor]:
            code = clt.encode(x.unflatten(1, (LAYERS, D_IN)).transpose(0, 1))
            out = clt.decode(code)
            return code.transpose(0, 1).flatten(1), out.transpose(0, 1).flatten(1)

        return compute

    what += "; x, code and out have the layers side by side"
    x = torch.cat([case.x() for _ in range(LAYERS)], 1)
    case.expect(x, at(torch.float32), at(torch.float64), what)
