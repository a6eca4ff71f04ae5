"""SAELens >= 6: folders of `save_model`, `save_inference_model`, and of training checkpoints."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .common import D_IN, D_SAE, Case, Cases, Compute, K

METADATA = {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre", "context_size": 128}
HOOK_Z = {"reshape_activations": "hook_z", "hook_name": "blocks.8.attn.hook_z"}
HEADS = (4, 4)
D_OUT = 10
WIDTHS = [8, 16, 32]


def make(out: Path) -> None:
    """Make every case."""
    os.environ.setdefault("WANDB_MODE", "disabled")
    warnings.filterwarnings("ignore", module="sae_lens")
    cases = Cases(out, "saelens", "sae-lens")
    make_inference(cases)
    make_normalized(cases)
    make_reshaped(cases)
    make_dtypes(cases)
    make_folded(cases)
    make_pursuit(cases)
    make_temporal(cases)
    make_training(cases)
    make_mid_training(cases)


def metadata(**changes: object):
    """SAELens' metadata of a layer of GPT-2."""
    from sae_lens.saes.sae import SAEMetadata

    return SAEMetadata(**{**METADATA, **changes})


def build(architecture: str, *, training: bool = False, **cfg: object) -> nn.Module:
    """An SAE of SAELens."""
    from sae_lens.registry import get_sae_class, get_sae_training_class

    cls, config = (get_sae_training_class if training else get_sae_class)(architecture)
    hook_name = cfg.pop("hook_name", METADATA["hook_name"])
    cfg = {"d_in": D_IN, "d_sae": D_SAE, "metadata": metadata(hook_name=hook_name), **cfg}
    return cls(config(**cfg))


def fill(case: Case, sae: nn.Module) -> nn.Module:
    """Give every parameter generic values."""
    n, d_out = sae.W_dec.shape
    values = {
        "W_dec": lambda p: case.rows(n, d_out),
        "W_enc": lambda p: case.encoder(n, p.shape[0]).t(),
        "W_skip": lambda p: case.randn(*p.shape) / p.shape[1] ** 0.5,
        "threshold": lambda p: case.thresholds(n),
        "b_enc": lambda p: case.randn(n) + 0.5,
        "b_gate": lambda p: case.randn(n) + 0.3,
        "b_mag": lambda p: case.randn(n) + 0.3,
        "r_mag": lambda p: 0.3 * case.randn(n),
        "b_dec": lambda p: case.randn(d_out),
    }
    for name, parameter in sae.named_parameters():
        if name in values:
            parameter.data = values[name](parameter).to(parameter.dtype).contiguous()
    if "matching_pursuit" in sae.cfg.architecture():  # longer rows would not converge
        sae.W_dec.data *= (0.7 + 0.5 * case.rand(n, 1)) / sae.W_dec.data.norm(dim=1, keepdim=True)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold = torch.tensor(0.8123, dtype=torch.float64)
    return sae


def load(folder: Path, dtype: str | None = None) -> nn.Module:
    """Load as SAELens does."""
    from sae_lens import SAE

    return SAE.load_from_disk(folder, dtype=dtype).eval()


def expect_loaded(case: Case, x: Tensor, what: str, **notes: str) -> None:
    """Write what SAELens computes of its folder."""
    case.expect_module(x, load(case.folder), what, **notes)


def save_and_expect(case: Case, sae: nn.Module, what: str, x: Tensor | None = None) -> None:
    """Save with SAELens, load with SAELens, and write what it computes."""
    sae.save_model(case.folder)
    expect_loaded(case, case.x(sae.cfg.d_in) if x is None else x, what)


def make_inference(cases: Cases) -> None:
    """Every inference architecture, with the options that change its formula."""
    topk = {"k": K, "rescale_acts_by_decoder_norm": False}
    rescaled = {"k": K, "rescale_acts_by_decoder_norm": True}
    free = {"apply_b_dec_to_input": False}
    transcoder = {**free, "d_out": D_OUT}
    for name, architecture, cfg in (
        ("standard", "standard", {}),
        ("standard_no_b_dec", "standard", free),
        ("gated", "gated", {}),
        ("gated_no_b_dec", "gated", free),
        ("jumprelu", "jumprelu", {}),
        ("jumprelu_no_b_dec", "jumprelu", free),
        ("topk", "topk", topk),
        ("topk_rescaled", "topk", rescaled),
        ("topk_no_b_dec", "topk", {**rescaled, **free}),
        ("abstopk", "abstopk", topk),
        ("abstopk_rescaled", "abstopk", rescaled),
        ("transcoder", "transcoder", transcoder),
        ("skip_transcoder", "skip_transcoder", transcoder),
        ("jumprelu_transcoder", "jumprelu_transcoder", transcoder),
        ("jumprelu_skip_transcoder", "jumprelu_skip_transcoder", transcoder),
    ):
        case = cases(name)
        save_and_expect(case, fill(case, build(architecture, **cfg)), describe(architecture, cfg))

    case = cases("jumprelu_negative_thresholds")
    sae = fill(case, build("jumprelu"))
    sae.threshold.data[1::2] -= 0.7
    save_and_expect(case, sae, "jumprelu, some thresholds 0 and some below 0 (there it is a relu)")

    case = cases("jumprelu_one_threshold")
    sae = fill(case, build("jumprelu"))
    sae.threshold.data.fill_(0.7)
    save_and_expect(case, sae, "jumprelu, the same threshold for all latents")

    case = cases("topk_few_positive")
    sae = fill(case, build("topk", **topk))
    sae.b_enc.data -= 3
    save_and_expect(case, sae, "topk, rows with fewer than k positive pre-activations")

    case = cases("standard_sparsity_file")
    sae = fill(case, build("standard"))
    sparsity = torch.log10(case.rand(D_SAE) + 1e-10)
    save_file({"sparsity": sparsity}, case.folder / "sparsity.safetensors")
    save_and_expect(case, sae, "standard, with sparsity.safetensors (log10) beside it")


def describe(architecture: str, cfg: dict) -> str:
    """The architecture and the settings that are off default."""
    return ", ".join([architecture, *(f"{name} {value}" for name, value in cfg.items())])


def make_normalized(cases: Cases) -> None:
    """Every `normalize_activations`: two are a scale per token, two do nothing here."""
    rescaled = {"k": K, "rescale_acts_by_decoder_norm": True}
    for architecture, mode, cfg in (
        ("standard", "layer_norm", {}),
        ("topk", "layer_norm", rescaled),
        ("standard", "layer_norm", {"apply_b_dec_to_input": False}),
        ("jumprelu", "constant_norm_rescale", {}),
        ("topk", "constant_norm_rescale", rescaled),
        ("standard", "expected_average_only_in", {}),
        ("standard", "covariance_whitening", {}),
        ("transcoder", "layer_norm", {"apply_b_dec_to_input": False, "d_out": D_IN}),
    ):
        free = "_no_b_dec" if architecture == "standard" and cfg else ""
        case = cases(f"{architecture}_{mode}{free}")
        cfg = {**cfg, "normalize_activations": mode}
        what = describe(architecture, cfg)
        if mode in ("expected_average_only_in", "covariance_whitening"):
            what += " (the identity at inference)"
        if architecture == "transcoder":
            what += " (its output is not scaled back)"
        save_and_expect(case, fill(case, build(architecture, **cfg)), what)


def make_reshaped(cases: Cases) -> None:
    """Heads are merged before, and split behind."""
    for architecture, cfg in (("standard", {}), ("jumprelu", {}), ("topk", {"k": K})):
        case = cases(f"{architecture}_hook_z")
        d_in = HEADS[0] * HEADS[1]
        sae = fill(case, build(architecture, d_in=d_in, **HOOK_Z, **cfg))
        x = case.x(d_in).reshape(-1, *HEADS)
        save_and_expect(case, sae, f"{architecture}, reshape_activations hook_z, x [n, 4, 4]", x)


def make_dtypes(cases: Cases) -> None:
    """Weights in half precision; what is expected comes from the same weights, upcast."""
    for dtype in ("bfloat16", "float16"):
        for architecture in ("standard", "jumprelu"):
            case = cases(f"{architecture}_{dtype}")
            fill(case, build(architecture, dtype=dtype)).save_model(case.folder)
            what = f"{architecture}, dtype {dtype}; expected from the stored weights upcast"
            case.expect_module(case.x(), load(case.folder, "float32"), what)

    case = cases("training_jumprelu_bfloat16")
    fill(case, build("jumprelu", training=True, dtype="bfloat16")).save_model(case.folder)
    what = "training folder of jumprelu, dtype bfloat16, its threshold float32; upcast as stored"
    case.expect_module(case.x(), load(case.folder, "float32"), what)


def make_folded(cases: Cases) -> None:
    """Folders that were loaded, folded by `fold_W_dec_norm` and saved again."""
    for architecture, cfg in (
        ("jumprelu", {}),
        ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("gated", {}),
        ("batchtopk", {"k": K}),
    ):
        case = cases(f"{architecture}_folded")
        training = architecture == "batchtopk"
        sae = fill(case, build(architecture, training=training, **cfg))
        with tempfile.TemporaryDirectory() as scratch:
            (sae.save_inference_model if training else sae.save_model)(scratch)
            sae = load(Path(scratch))
        sae.fold_W_dec_norm()
        save_and_expect(case, sae, f"{describe(architecture, cfg)}, fold_W_dec_norm, saved again")


def make_pursuit(cases: Cases) -> None:
    """Matching pursuit, and each of the settings that stop it."""
    for name, cfg in (
        ("", {}),
        ("_iterations", {"max_iterations": 5}),
        ("_residual", {"residual_threshold": 3.0, "stop_on_duplicate_support": False}),
        ("_no_stop", {"residual_threshold": 0.0, "stop_on_duplicate_support": False}),
        ("_no_b_dec", {"apply_b_dec_to_input": False}),
    ):
        case = cases(f"matching_pursuit{name}")
        sae = fill(case, build("matching_pursuit", **cfg))
        save_and_expect(case, sae, describe("matching_pursuit", cfg))


def make_temporal(cases: Cases) -> None:
    """An SAE with attention over the sequence."""
    case = cases("temporal")
    cfg = {"n_heads": 2, "bottleneck_factor": 8, "kval_topk": K}
    torch.manual_seed(0)
    fill(case, build("temporal", **cfg)).save_model(case.folder)
    case.refuse(case.x(), describe("temporal", cfg), "attends to earlier positions")


def exported(folder: Path, dtype: str) -> nn.Module:
    """The inference SAE of a training folder, in SAELens' own way: scaled back, then exported."""
    from sae_lens import TrainingSAE
    from sae_lens.training.activation_scaler import ActivationScaler

    sae = TrainingSAE.load_from_disk(folder, dtype=dtype)
    file = folder / "activation_scaler.json"
    if file.exists():
        scaler = ActivationScaler()
        scaler.load(file)
        if scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        if (white := scaler.whitening) is not None:
            sae.fold_activation_whitening(white.mean, white.matrix, white.inverse_matrix)
    with tempfile.TemporaryDirectory() as scratch:
        sae.save_inference_model(scratch)
        return load(Path(scratch), dtype)


def expect_exported(case: Case, x: Tensor, what: str) -> None:
    """Write what the export of a training folder computes, each precision folded by itself."""

    def compute(dtype: str) -> Compute:
        sae = exported(case.folder, dtype)
        return lambda x: (sae.encode(x), sae(x))

    case.expect(x, compute("float32"), compute("float64"), what)


TRAINING = {
    "standard": {},
    "gated": {},
    "jumprelu": {},
    "topk": {"k": K},
    "batchtopk": {"k": K},
    "matryoshka_batchtopk": {"k": K, "matryoshka_widths": WIDTHS},
}


def make_training(cases: Cases) -> None:
    """Folders of `TrainingSAE.save_model`, and the exports of the kinds that change."""
    kinds = {name: (name, cfg) for name, cfg in TRAINING.items()}
    for name in ("topk", "batchtopk"):
        plain = {**TRAINING[name], "rescale_acts_by_decoder_norm": False}
        kinds[f"{name}_not_rescaled"] = (name, plain)
    for name, (architecture, cfg) in kinds.items():
        case = cases(f"training_{name}")
        fill(case, build(architecture, training=True, **cfg)).save_model(case.folder)
        expect_exported(case, case.x(), f"training folder of {describe(architecture, cfg)}")

    for name in ("batchtopk", "matryoshka_batchtopk"):
        case = cases(f"{name}_exported")
        sae = fill(case, build(name, training=True, **TRAINING[name]))
        sae.save_inference_model(case.folder)
        expect_loaded(case, case.x(), f"save_inference_model of {describe(name, TRAINING[name])}")

    case = cases("training_jumprelu_log_threshold")
    fill(case, build("jumprelu", training=True)).save_model(case.folder)
    with_log_threshold(case.folder)
    what = "training folder of jumprelu as before the reparametrization: log_threshold"
    expect_exported(case, case.x(), f"{what} (renamed by hand)")


def with_log_threshold(folder: Path) -> None:
    """Store the threshold as its logarithm, as SAELens once did."""
    file = folder / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, file)


def make_mid_training(cases: Cases) -> None:
    """Checkpoints whose weights are for scaled or whitened activations."""
    kinds = (*TRAINING, "matching_pursuit")
    for name in kinds:
        case = cases(f"training_{name}_scaled")
        cfg = {**TRAINING.get(name, {}), "normalize_activations": "expected_average_only_in"}
        x = mid_training(case, name, cfg, scale=0.4375)
        expect_exported(case, x, f"training folder of {name} with activation_scaler.json")

    for name in ("standard", "topk", "gated", "jumprelu"):
        case = cases(f"training_{name}_whitened")
        cfg = {**TRAINING[name], "normalize_activations": "covariance_whitening"}
        x = mid_training(case, name, cfg, scale=None)
        what = f"training folder of {name} with activation_whitening.safetensors"
        expect_exported(case, x, what)

    case = cases("training_standard_whitened_no_b_dec")
    cfg = {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": False}
    x = mid_training(case, "standard", cfg, scale=None)
    what = "training folder of standard with activation_whitening.safetensors"
    expect_exported(case, x, f"{what}, apply_b_dec_to_input False")

    case = cases("training_standard_scaled_by_nothing")
    cfg = {"normalize_activations": "expected_average_only_in"}
    x = mid_training(case, "standard", cfg, scale=None, white=False)
    expect_exported(case, x, "training folder of standard, scaling_factor null (already folded)")


def mid_training(
    case: Case, architecture: str, cfg: dict, scale: float | None, white: bool = True
) -> Tensor:
    """Save a checkpoint with its scaler or whitening, and return activations for it."""
    from sae_lens.training.activation_scaler import ActivationScaler

    x = case.x()
    fill(case, build(architecture, training=True, **cfg)).save_model(case.folder)
    scaler = ActivationScaler(scaling_factor=scale)
    if scale is None and white:
        data = case.x(n=200) - case.randn(D_IN)
        scaler.estimate_whitening(D_IN, iter([data]), n_batches_for_norm_estimate=1)
    scaler.save(str(case.folder / "activation_scaler.json"))
    return x
