"""Llama Scope and its R1-Distill files, by the formulas of lm_saes, which is not on PyPI.

Llama Scope: what `SparseAutoEncoder.from_pretrained` of the release made of a folder (1e710367,
October 2024). It folds the average norms of the data set into the biases and the decoder, then the
decoder's norms into the encoder, and only then compares with the threshold.

R1-Distill: the class of 9c97b678 (February 2025) scales its input and folds nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .common import Case, Cases, Compute, K, write_json

D_IN, FACTOR = 16, 2
D_SAE = D_IN * FACTOR
SCOPE = "formula of lm_saes 1e710367"
DISTILL = "formula of lm_saes 9c97b678"
HOOK = "blocks.15.hook_resid_post"
OUT = "blocks.15.hook_mlp_out"

HYPERPARAMS = {
    "device": "cuda",
    "seed": 42,
    "dtype": "torch.bfloat16",
    "hook_point_in": HOOK,
    "hook_point_out": HOOK,
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "expansion_factor": FACTOR,
    "d_model": D_IN,
    "d_sae": D_SAE,
    "bias_init_method": "all_zero",
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.52734375,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 7.5, "out": 5.25},
    "decoder_exactly_fixed_norm": False,
    "sparsity_include_decoder_norm": True,
    "use_glu_encoder": False,
    "init_decoder_norm": 0.5,
    "init_encoder_norm": None,
    "init_encoder_with_decoder_transpose": True,
    "lp": 1,
    "l1_coefficient": 8e-05,
    "top_k": K,
    "use_batch_norm_mse": True,
    "use_ghost_grads": False,
    "tp_size": 1,
    "ddp_size": 1,
}
DISTILL_CONFIG = {
    "sae_type": "sae",
    "hook_point_in": HOOK,
    "hook_point_out": HOOK,
    "d_model": D_IN,
    "expansion_factor": FACTOR,
    "use_decoder_bias": True,
    "use_glu_encoder": False,
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.0,
    "apply_decoder_bias_to_pre_encoder": False,
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "top_k": 50,
    "jumprelu_threshold_grad_scale": 2.0,
}


def make(out: Path) -> None:
    """Make every case."""
    cases = Cases(out, "llama_scope", None)
    same = {"dataset_average_activation_norm": {"in": 6.5, "out": 6.5}}
    for name, cfg, unit in (
        ("as_published", same, True),
        ("jumprelu", {}, False),
        ("transcoder", {"hook_point_out": OUT}, False),
        ("decoder_norm_not_included", {"sparsity_include_decoder_norm": False}, False),
        ("topk", {"act_fn": "topk", "jump_relu_threshold": 0.0}, False),
        ("b_dec_subtracted", {"apply_decoder_bias_to_pre_encoder": True}, False),
    ):
        case = cases(name, peer=SCOPE)
        cfg = {**HYPERPARAMS, **cfg}
        tensors = weights(case, torch.bfloat16, unit)
        write_scope(case, tensors, cfg)
        compute = scope(tensors, cfg)
        what = f"Llama Scope {name}, bfloat16 (upcast before it is folded)"
        case.expect(case.x(D_IN), compute, compute, what)

    case = cases("glu", peer=SCOPE)
    tensors = weights(case, torch.bfloat16)
    tensors["encoder_glu.weight"] = case.encoder(D_SAE, D_IN).bfloat16()
    tensors["encoder_glu.bias"] = case.randn(D_SAE).bfloat16()
    write_scope(case, tensors, {**HYPERPARAMS, "use_glu_encoder": True})
    reason = "a second encoder multiplies the pre-activations (GLU)"
    case.refuse(case.x(D_IN), "Llama Scope with use_glu_encoder", reason)
    make_distilled(cases)


def weights(case: Case, dtype: torch.dtype, unit: bool = False) -> dict[str, Tensor]:
    """The tensors of `torch.nn.Linear` encoders and decoders."""
    rows = case.rows(D_SAE, D_IN)
    if unit:
        rows = rows / rows.norm(dim=1, keepdim=True)
    tensors = {
        "encoder.weight": case.encoder(D_SAE, D_IN),
        "encoder.bias": case.randn(D_SAE) + 0.3,
        "decoder.weight": rows.t(),
        "decoder.bias": case.randn(D_IN),
    }
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def write_scope(case: Case, tensors: dict[str, Tensor], cfg: dict) -> None:
    """Write hyperparams.json and checkpoints/final.safetensors."""
    write_json(case.folder / "hyperparams.json", cfg)
    (case.folder / "checkpoints").mkdir()
    save_file(tensors, case.folder / "checkpoints" / "final.safetensors", {"version": "0.1.0"})


def scope(tensors: dict[str, Tensor], cfg: dict) -> Compute:
    """Fold and compute as the loader of the release did."""
    norms = cfg["dataset_average_activation_norm"]
    scale_in, scale_out = D_IN**0.5 / norms["in"], D_IN**0.5 / norms["out"]

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        w = {name: tensor.to(x.dtype) for name, tensor in tensors.items()}
        enc, b_enc = w["encoder.weight"], w["encoder.bias"] / scale_in
        dec, b_dec = w["decoder.weight"] * scale_in / scale_out, w["decoder.bias"] / scale_out
        if cfg["sparsity_include_decoder_norm"]:
            norm = dec.norm(dim=0)
            enc, b_enc, dec = enc * norm[:, None], b_enc * norm, dec / norm
        if cfg["apply_decoder_bias_to_pre_encoder"]:
            x = x - b_dec
        pre = x @ enc.T + b_enc
        if cfg["act_fn"] == "topk":
            kept = pre.relu().topk(K, dim=1).indices
            code = torch.zeros_like(pre).scatter(1, kept, pre.relu().gather(1, kept))
        else:
            code = torch.where(pre > cfg["jump_relu_threshold"], pre, 0)
        return code, code @ dec.T + b_dec

    return compute


def make_distilled(cases: Cases) -> None:
    """config.json and sae_weights.safetensors with log_jumprelu_threshold."""
    norms = {HOOK: 7.5, OUT: 5.25}
    for name, cfg in (
        ("r1_distill", {}),
        ("r1_distill_decoder_norm_not_included", {"sparsity_include_decoder_norm": False}),
        ("r1_distill_transcoder", {"hook_point_out": OUT}),
        ("r1_distill_inference", {"norm_activation": "inference"}),
    ):
        case = cases(name, peer=DISTILL)
        cfg = {**DISTILL_CONFIG, **cfg}
        tensors = weights(case, torch.float32)
        tensors["log_jumprelu_threshold"] = (0.05 + 0.9 * case.rand(D_SAE)).log()
        file = case.folder / "sae_weights.safetensors"
        write_json(case.folder / "config.json", cfg)
        stored = {
            f"dataset_average_activation_norm.{hook}": torch.tensor(norms[hook])
            for hook in {cfg["hook_point_in"], cfg["hook_point_out"]}
        }
        save_file({**tensors, **stored}, file, {"version": "0.1.0"})
        compute = distilled(tensors, cfg, norms)
        what = f"Llama Scope {name}, code in scaled units"
        case.expect(case.x(D_IN), compute, compute, what)


def distilled(tensors: dict[str, Tensor], cfg: dict, norms: dict[str, float]) -> Compute:
    """Scale the input, gate by pre-activation times decoder norm, scale the output back."""
    scaled = cfg["norm_activation"] == "dataset-wise"
    scale_in = D_IN**0.5 / norms[cfg["hook_point_in"]] if scaled else 1.0
    scale_out = D_IN**0.5 / norms[cfg["hook_point_out"]] if scaled else 1.0

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        w = {name: tensor.to(x.dtype) for name, tensor in tensors.items()}
        pre = (x * scale_in) @ w["encoder.weight"].T + w["encoder.bias"]
        gate = pre
        if cfg["sparsity_include_decoder_norm"]:
            gate = pre * w["decoder.weight"].norm(dim=0)
        code = pre * (gate > w["log_jumprelu_threshold"].exp())
        return code, (code @ w["decoder.weight"].T + w["decoder.bias"]) / scale_out

    return compute
