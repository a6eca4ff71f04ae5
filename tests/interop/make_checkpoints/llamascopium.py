"""llamascopium (the successor of lm_saes), by the formula of 95281ac7; it is not on PyPI.

The code is that of `normalize_activations` followed by `encode`, the output that of `decode`
followed by `denormalize_activations`; the folder is that of `save_pretrained` and
`save_hyperparameters`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .common import Case, Cases, Compute, K, write_json

D_IN, FACTOR = 16, 2.0
D_SAE = int(D_IN * FACTOR)
PEER = "formula of llamascopium 95281ac7"
VERSION = {"version": "2.0.0b34"}
HOOK = "blocks.5.hook_resid_post"
OUT = "blocks.5.hook_mlp_out"
NORMS = {HOOK: 7.5, OUT: 5.25}
CONFIG = {
    "sae_type": "sae",
    "d_model": D_IN,
    "expansion_factor": FACTOR,
    "use_decoder_bias": True,
    "act_fn": "relu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "top_k": K,
    "use_triton_kernel": False,
    "sparsity_threshold_for_triton_spmm_kernel": 0.996,
    "jumprelu_threshold_window": 2.0,
    "hook_point_in": HOOK,
    "hook_point_out": HOOK,
    "use_glu_encoder": False,
}


def make(out: Path) -> None:
    """Make every case."""
    cases = Cases(out, "llamascopium", None)
    plain = {"sparsity_include_decoder_norm": False}
    jumprelu, topk = {"act_fn": "jumprelu"}, {"act_fn": "topk"}
    for name, cfg in (
        ("relu", {}),
        ("relu_decoder_norm_not_included", plain),
        ("jumprelu", jumprelu),
        ("jumprelu_decoder_norm_not_included", {**jumprelu, **plain}),
        ("topk", topk),
        ("topk_decoder_norm_not_included", {**topk, **plain}),
        ("jumprelu_transcoder", {**jumprelu, "hook_point_out": OUT}),
        ("jumprelu_inference", {**jumprelu, "norm_activation": "inference"}),
        ("topk_inference", {**topk, "norm_activation": "inference"}),
        ("relu_no_decoder_bias", {"use_decoder_bias": False}),
        ("relu_token_wise", {"norm_activation": "token-wise"}),
        ("jumprelu_pt", jumprelu),
    ):
        case = cases(name, peer=PEER)
        cfg = {**CONFIG, **cfg}
        tensors = write(case, cfg, pt=name.endswith("_pt"))
        compute = formula(tensors, cfg)
        what = f"llamascopium {name}, code in the units of the normalized input"
        case.expect(case.x(D_IN), compute, compute, what)
    make_refused(cases)


def write(case: Case, cfg: dict, pt: bool = False) -> dict[str, Tensor]:
    """Write a folder and return its tensors."""
    tensors = {
        "W_E": case.encoder(D_SAE, D_IN).t().contiguous(),
        "b_E": case.randn(D_SAE) + 0.3,
        "W_D": case.rows(D_SAE, D_IN),
    }
    if cfg["use_decoder_bias"]:
        tensors["b_D"] = case.randn(D_IN)
    if cfg["act_fn"] == "jumprelu":
        thresholds = 0.05 + 0.9 * case.rand(D_SAE)
        tensors["activation_function.log_jumprelu_threshold"] = thresholds.log()
    if cfg["use_glu_encoder"]:
        tensors["W_E_glu"] = case.encoder(D_SAE, D_IN).t().contiguous()
        tensors["b_E_glu"] = case.randn(D_SAE)
    stored = dict(tensors)
    for hook in {cfg["hook_point_in"], cfg["hook_point_out"]}:
        # Written whatever the mode is, as uninitialized memory where there is no norm.
        stored[f"dataset_average_activation_norm.{hook}"] = torch.tensor(NORMS[hook])
    write_json(case.folder / "config.json", cfg)
    if pt:
        torch.save({"sae": stored, **VERSION}, case.folder / "sae_weights.pt")
    else:
        save_file(stored, case.folder / "sae_weights.safetensors", VERSION)
    return tensors


def formula(tensors: dict[str, Tensor], cfg: dict) -> Compute:
    """Normalize, gate by the pre-activation times the decoder's norm, decode, scale back."""

    def scale(x: Tensor, hook: str) -> Tensor | float:
        if cfg["norm_activation"] == "token-wise":
            return D_IN**0.5 / x.norm(dim=-1, keepdim=True)
        return D_IN**0.5 / NORMS[hook] if cfg["norm_activation"] == "dataset-wise" else 1.0

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        w = {name: tensor.to(x.dtype) for name, tensor in tensors.items()}
        pre = (x * scale(x, cfg["hook_point_in"])) @ w["W_E"] + w["b_E"]
        included = cfg["sparsity_include_decoder_norm"]
        norm = w["W_D"].norm(dim=1) if included else torch.ones_like(w["b_E"])
        gate = pre * norm
        if cfg["act_fn"] == "jumprelu":
            kept = gate > w["activation_function.log_jumprelu_threshold"].exp()
        else:
            kept = gate > 0
        if cfg["act_fn"] == "topk":
            largest = gate.relu().topk(K, dim=1).indices
            kept &= torch.zeros_like(kept).scatter(1, largest, True)
        code = pre * kept
        out = code @ w["W_D"] + w.get("b_D", 0.0)
        return code, out / scale(x, cfg["hook_point_out"])

    return compute


def make_refused(cases: Cases) -> None:
    """What is not a scale and an SAE."""
    for name, cfg, reason in (
        (
            "glu",
            {"use_glu_encoder": True},
            "a second encoder multiplies the pre-activations (GLU)",
        ),
        (
            "batch_wise",
            {"norm_activation": "batch-wise"},
            "the input is scaled by the mean norm of its batch",
        ),
        (
            "batchtopk",
            {"act_fn": "batchtopk"},
            "the largest of a batch are kept, and there is no threshold",
        ),
        (
            "token_wise_transcoder",
            {"norm_activation": "token-wise", "hook_point_out": OUT},
            "the output is scaled by the norm of the target",
        ),
    ):
        case = cases(name, peer=PEER)
        write(case, {**CONFIG, **cfg})
        case.refuse(case.x(D_IN), f"llamascopium {name}", reason)
