"""Overcomplete: state dicts and whole modules, both written by `torch.save`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .common import D_IN, D_SAE, Case, Cases, Compute, K, without_init

POINTS = 40


def make(out: Path) -> None:
    """Make every case."""
    without_init("overcomplete")
    from overcomplete import sae as oc

    cases = Cases(out, "overcomplete", "overcomplete")
    multiplier = {"dictionary_params": {"use_multiplier": True}}
    for name, build, what, notes in (
        ("sae", lambda case: oc.SAE(D_IN, D_SAE), "SAE", {}),
        (
            "sae_multiplier",
            lambda case: oc.SAE(D_IN, D_SAE, **multiplier),
            "SAE, use_multiplier True",
            {},
        ),
        (
            "sae_batch_norm",
            lambda case: oc.SAE(D_IN, D_SAE, encoder_module="mlp_bn_1"),
            "SAE, encoder mlp_bn_1 (batch norm behind its linear layer)",
            {},
        ),
        ("topk", lambda case: oc.TopKSAE(D_IN, D_SAE, top_k=K), "TopKSAE", {"k": str(K)}),
        (
            "batch_topk",
            lambda case: oc.BatchTopKSAE(D_IN, D_SAE, top_k=K * 12),
            "BatchTopKSAE (keeps what is >= running_threshold)",
            {"threshold": "0.8125"},
        ),
        ("jump", lambda case: oc.JumpSAE(D_IN, D_SAE), "JumpSAE", {}),
        (
            "ra_topk",
            lambda case: oc.RATopKSAE(D_IN, D_SAE, points(case), top_k=K),
            "RATopKSAE (archetypal dictionary, projected onto its constraints when read)",
            {"k": str(K), "delta": "1.0"},
        ),
        (
            "ra_jump",
            lambda case: oc.RAJumpSAE(D_IN, D_SAE, points(case), delta=1.5),
            "RAJumpSAE (archetypal dictionary, already projected by eval)",
            {"project": "True"},
        ),
    ):
        make_pair(cases, name, build, what, notes)
    make_refused(cases)


def points(case: Case) -> Tensor:
    """Candidates that archetypes are made of."""
    return case.randn(POINTS, D_IN)


def fill(case: Case, sae: nn.Module) -> nn.Module:
    """Give every parameter and buffer generic values."""
    values: dict[str, Callable[[Tensor], Tensor]] = {
        "encoder.final_block.0.weight": lambda p: case.encoder(),
        "encoder.final_block.0.bias": lambda p: case.randn(D_SAE) + 0.3,
        "encoder.final_block.1.weight": lambda p: 0.5 + case.rand(D_SAE),
        "encoder.final_block.1.bias": lambda p: case.randn(D_SAE) + 0.3,
        "encoder.final_block.1.running_mean": lambda p: case.randn(D_SAE),
        "encoder.final_block.1.running_var": lambda p: 0.5 + case.rand(D_SAE),
        "dictionary._weights": lambda p: case.rows(),
        "dictionary.W": lambda p: case.rand(D_SAE, POINTS) - 0.3,
        "dictionary.Relax": lambda p: 0.35 * case.randn(D_SAE, D_IN),
        "thresholds": lambda p: (0.05 + 0.9 * case.rand(D_SAE)).log(),
    }
    tensors = dict(sae.named_parameters()) | dict(sae.named_buffers())
    for name, tensor in tensors.items():
        if name in values:
            tensor.data = values[name](tensor)
    if isinstance(sae.dictionary.multiplier, nn.Parameter):
        sae.dictionary.multiplier.data.fill_(0.4)
    return sae


def make_pair(
    cases: Cases, name: str, build: Callable[[Case], nn.Module], what: str, notes: dict[str, str]
) -> None:
    """A state dict, and the same module pickled whole."""
    project = notes.pop("project", None)
    case = cases(name)
    sae = fill(case, build(case))
    if project:
        sae.eval()
    torch.save(sae.state_dict(), case.folder / "sae.pt")

    def rebuilt() -> nn.Module:
        fresh = build(case)
        fresh.load_state_dict(torch.load(case.folder / "sae.pt", weights_only=True))
        if "threshold" in notes:
            fresh.running_threshold = torch.tensor(float(notes["threshold"]))
        return fresh

    expect(case, rebuilt, f"state dict of {what}", notes)

    case = cases(f"{name}_module")
    sae = fill(case, build(case))
    if "threshold" in notes:
        sae.running_threshold = torch.tensor(float(notes["threshold"]))
    if project:
        sae.eval()
    file = case.folder / "sae.pt"
    torch.save(sae, file)
    what = f"pickled module of {what}"
    expect(case, lambda: torch.load(file, weights_only=False), what, {"pickle": "module"})


def expect(case: Case, fresh: Callable[[], nn.Module], what: str, notes: dict[str, str]) -> None:
    """Write what a fresh module computes in eval mode.

    `eval` fuses the dictionary, which `to` does not convert: each precision starts afresh, in
    training mode.
    """

    def at(dtype: torch.dtype) -> Compute:
        sae = fresh().train().to(dtype).eval()
        return lambda x: (sae.encode(x)[1], sae(x)[2])

    case.expect(case.x(), at(torch.float32), at(torch.float64), what, **notes)


def make_refused(cases: Cases) -> None:
    """Kinds that are no linear encoder with an activation function."""
    from overcomplete import sae as oc

    deep = "mlp_bn_3"
    for name, sae, reason in (
        ("matching_pursuit", oc.MpSAE(D_IN, D_SAE, k=K), "no encoder: it is matching pursuit"),
        ("quantized", oc.QSAE(D_IN, D_SAE), "its codes are quantized to the levels Q"),
        ("deep_encoder", oc.SAE(D_IN, D_SAE, encoder_module=deep), "its encoder has hidden layers"),
    ):
        case = cases(name)
        torch.manual_seed(0)
        torch.save(fill(case, sae).state_dict(), case.folder / "sae.pt")
        case.refuse(case.x(), f"state dict of {type(sae).__name__}, {name}", reason)
