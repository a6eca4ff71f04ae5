"""HypotheSAEs: .pt files of {config, state_dict}, written by `SparseAutoencoder.save`."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor

from .common import D_IN, D_SAE, Case, Cases, Compute, K, without_init

PREFIXES = [8, 16, 32]


def make(out: Path) -> None:
    """Make every case."""
    without_init("hypothesaes")
    cases = Cases(out, "hypothesaes", "hypothesaes")
    for name, cfg in (
        ("topk", {}),
        ("batch_topk", {"use_batch_topk": True}),
        ("matryoshka", {"prefix_lengths": PREFIXES}),
        ("matryoshka_batch_topk", {"prefix_lengths": PREFIXES, "use_batch_topk": True}),
        ("multi_k", {"multi_k": 8}),
    ):
        case = cases(name)
        file = save(case, cfg)
        expect_loaded(case, file, f"HypotheSAEs {name} {cfg}")


def save(case: Case, cfg: dict) -> Path:
    """Save an SAE with generic weights."""
    from hypothesaes.sae import SparseAutoencoder, get_sae_checkpoint_name

    sae = SparseAutoencoder(D_IN, D_SAE, K, device="cpu", **cfg)
    sae.encoder.weight.data = case.encoder()
    sae.decoder.weight.data = case.rows().t().contiguous()
    sae.input_bias.data = case.randn(D_IN)
    sae.neuron_bias.data = case.randn(D_SAE) - (0.5 if cfg.get("use_batch_topk") else 1.5)
    if cfg.get("use_batch_topk"):
        sae.threshold.fill_(0.4375)
    file = case.folder / get_sae_checkpoint_name(D_SAE, K, cfg.get("prefix_lengths"))
    with contextlib.redirect_stdout(io.StringIO()):
        sae.save(str(file))
    return file


def expect_loaded(case: Case, file: Path, what: str) -> None:
    """Write what the SAE computes in eval mode, as its `get_activations` does."""
    from hypothesaes.sae import load_model

    def at(dtype: torch.dtype) -> Compute:
        with contextlib.redirect_stdout(io.StringIO()):
            sae = load_model(str(file), device="cpu").to(dtype).eval()

        def compute(x: Tensor) -> tuple[Tensor, Tensor]:
            out, info = sae(x)
            return info["activations"], out

        return compute

    case.expect(case.x(), at(torch.float32), at(torch.float64), what)
