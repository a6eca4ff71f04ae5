"""OpenAI's sparse_autoencoder: .pt dictionaries, written as `Autoencoder.state_dict` does.

The package is not on PyPI: the formula of its model.py (4965b94) is spelled out below.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from .common import D_IN, D_SAE, Case, Cases, K


def make(out: Path) -> None:
    """Make every case."""
    cases = Cases(out, "openai", None)
    topk = {"k": K, "postact_fn": "ReLU"}
    for name, keys, what in (
        ("relu", {"activation": "ReLU", "activation_state_dict": OrderedDict()}, "ReLU"),
        ("relu_v1", {}, "no activation key, which means ReLU"),
        (
            "topk",
            {"activation": "TopK", "activation_state_dict": topk},
            "TopK, which implies a layer norm",
        ),
    ):
        case = cases(name, peer="formula of openai/sparse_autoencoder 4965b94")
        state = write(case, keys)
        compute = formula(state, topk=name == "topk")
        case.expect(case.x(), compute, compute, f"OpenAI .pt, {what}")

    for name, keys, reason in (
        ("identity", {"activation": "Identity"}, "its latents have no activation function"),
        (
            "topk_identity",
            {"activation": "TopK", "activation_state_dict": {**topk, "postact_fn": "Identity"}},
            "the k largest pre-activations keep their sign",
        ),
    ):
        case = cases(name, peer="formula of openai/sparse_autoencoder 4965b94")
        write(case, keys)
        case.refuse(case.x(), f"OpenAI .pt, {name}", reason)


def write(case: Case, keys: dict) -> dict[str, Tensor]:
    """Write the file and return its tensors."""
    state = OrderedDict(
        pre_bias=case.randn(D_IN),
        latent_bias=case.randn(D_SAE) + 0.3,
        stats_last_nonzero=torch.arange(D_SAE),
        latents_activation_frequency=case.rand(D_SAE),
        latents_mean_square=case.rand(D_SAE),
    )
    state["encoder.weight"] = case.encoder()
    state["decoder.weight"] = case.rows().t().contiguous()
    torch.save(OrderedDict(**state, **keys), case.folder / "autoencoder.pt")
    return state


def formula(state: dict[str, Tensor], topk: bool):
    """Encode and decode; a layer norm (unbiased, its epsilon added to std) for TopK only."""

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        w = {name: tensor.to(x.dtype) for name, tensor in state.items()}
        mean, std = torch.zeros_like(x[:, :1]), torch.ones_like(x[:, :1])
        if topk:
            mean = x.mean(dim=1, keepdim=True)
            std = x.std(dim=1, keepdim=True)
            x = (x - mean) / (std + 1e-5)
        pre = (x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
        code = torch.relu(pre)
        if topk:
            values, indices = pre.topk(K, dim=1)
            code = torch.zeros_like(pre).scatter(1, indices, values.relu())
        out = code @ w["decoder.weight"].T + w["pre_bias"]
        return code, out * std + mean

    return compute
