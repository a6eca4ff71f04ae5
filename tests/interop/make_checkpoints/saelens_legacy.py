"""SAELens < 6: flat cfg.json without a version, written by hand as `SAE.save_model` of 5.10.7 did.

What is expected comes from SAELens 6 where it still reads these folders rightly, and otherwise from
the formula of 5.10.7 (`sae_lens/sae.py` there), spelled out below.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .common import D_IN, D_SAE, Case, Cases, Compute, K, write_json

CONFIG = {
    "architecture": "standard",
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "torch.float32",
    "device": "cpu",
    "model_name": "gpt2-small",
    "hook_name": "blocks.8.hook_resid_pre",
    "hook_layer": 8,
    "hook_head_index": None,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": "5.10.7",
    "prepend_bos": True,
    "dataset_path": "Skylion007/openwebtext",
    "dataset_trust_remote_code": True,
    "context_size": 128,
    "normalize_activations": "none",
    "neuronpedia_id": None,
    "model_from_pretrained_kwargs": {},
    "seqpos_slice": [None],
}
BY_HAND = "cfg.json as SAELens 5.10.7 wrote it"


def make(out: Path) -> None:
    """Make every case."""
    warnings.filterwarnings("ignore", module="sae_lens")
    cases = Cases(out, "saelens_legacy", "sae-lens")
    make_read_by_6(cases)
    make_hook_z(cases)
    make_scaled(cases)
    make_refused(cases)


def weights(case: Case, d_in: int = D_IN, architecture: str = "standard") -> dict[str, Tensor]:
    """The tensors of an architecture."""
    tensors = {
        "W_enc": case.encoder(D_SAE, d_in).t().contiguous(),
        "W_dec": case.rows(D_SAE, d_in),
        "b_enc": case.randn(D_SAE) + 0.5,
        "b_dec": case.randn(d_in),
    }
    if architecture == "jumprelu":
        tensors["threshold"] = case.thresholds()
    if architecture == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
        tensors["b_mag"] = case.randn(D_SAE) + 0.3
        tensors["r_mag"] = 0.3 * case.randn(D_SAE)
    return tensors


def write(case: Case, tensors: dict[str, Tensor], cfg: dict, without: tuple[str, ...] = ()) -> None:
    """Write a folder of 5.10.7."""
    save_file(tensors, case.folder / "sae_weights.safetensors")
    cfg = {name: value for name, value in {**CONFIG, **cfg}.items() if name not in without}
    write_json(case.folder / "cfg.json", cfg)


def expect_loaded(case: Case, x: Tensor, what: str) -> None:
    """Write what SAELens 6 computes of the folder."""
    from sae_lens import SAE

    case.expect_module(x, SAE.load_from_disk(case.folder), f"{what}; {BY_HAND}")


OLD_NAMES = ("architecture", "activation_fn_str", "hook_name", "apply_b_dec_to_input", "dtype")


def make_read_by_6(cases: Cases) -> None:
    """Folders that SAELens 6 reads as 5.10.7 did."""
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    for name, cfg in (
        ("standard", {}),
        ("gated", {"architecture": "gated"}),
        ("jumprelu", {"architecture": "jumprelu", "apply_b_dec_to_input": False}),
        ("topk", {"architecture": "topk", **topk}),
        ("topk_by_activation", topk),
        ("normalize_true", {"normalize_activations": True}),
        ("normalize_null", {"normalize_activations": None}),
        ("layer_norm", {"normalize_activations": "layer_norm"}),
    ):
        case = cases(name)
        architecture = cfg.get("architecture", "standard")
        write(case, weights(case, architecture=architecture), cfg)
        expect_loaded(case, case.x(), f"{name} {cfg}" if cfg else name)

    case = cases("oldest_names")
    old = {"hook_point": "blocks.8.hook_resid_pre", "activation_fn": "relu", "dtype": "float32"}
    write(case, weights(case), old, without=tuple(set(OLD_NAMES) - {"dtype"}))
    expect_loaded(case, case.x(), "standard, hook_point and activation_fn, no architecture")

    case = cases("scaling_factor_of_ones")
    tensors = {**weights(case), "scaling_factor": torch.ones(D_SAE)}
    write(case, tensors, {})
    expect_loaded(case, case.x(), "standard with a scaling_factor of ones")


def make_hook_z(cases: Cases) -> None:
    """The name of the hook says that heads are merged."""
    case = cases("hook_z")
    write(case, weights(case, 16), {"d_in": 16, "hook_name": "blocks.8.attn.hook_z"})
    expect_loaded(case, case.x(16).reshape(-1, 4, 4), "standard at hook_z, x [n, 4, 4]")


def make_scaled(cases: Cases) -> None:
    """A factor for each latent that `decode` of 5.10.7 multiplies the code by."""
    for key in ("scaling_factor", "finetuning_scaling_factor"):
        case = cases(key)
        tensors = {**weights(case), key: 0.5 + case.rand(D_SAE)}
        write(case, tensors, {"finetuning_scaling_factor": True})

        def compute(x: Tensor, tensors: dict[str, Tensor] = tensors, key: str = key):
            w = {name: tensor.to(x.dtype) for name, tensor in tensors.items()}
            code = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
            return code, (code * w[key]) @ w["W_dec"] + w["b_dec"]

        at: Compute = compute
        what = f"standard with {key}; formula of 5.10.7, decode multiplies the code by it"
        case.expect(case.x(), at, at, f"{what}; {BY_HAND}")


def make_refused(cases: Cases) -> None:
    """What no module computes."""
    case = cases("tanh_relu")
    write(case, weights(case), {"activation_fn_str": "tanh-relu"})
    case.refuse(case.x(), f"standard with tanh-relu; {BY_HAND}", "the activation is tanh(relu)")

    case = cases("scaling_factor_not_declared")
    write(case, {**weights(case), "scaling_factor": 0.5 + case.rand(D_SAE)}, {})
    reason = "finetuning_scaling_factor is false, but there is one: 5.10.7 raises ValueError"
    case.refuse(case.x(), f"standard with a scaling_factor; {BY_HAND}", reason)
