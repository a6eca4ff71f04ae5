"""sparsify: folders of `SparseCoder.save_to_disk`."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from .common import D_IN, D_SAE, Case, Cases, Compute, K, read_json, write_json


def make(out: Path) -> None:
    """Make every case."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    cases = Cases(out, "sparsify", "eai-sparsify")
    for name, cfg in (
        ("topk", {}),
        ("topk_norms", {"normalize_decoder": False}),
        ("groupmax", {"activation": "groupmax"}),
        ("multi_topk", {"multi_topk": True}),
        ("transcode", {"transcode": True}),
        ("transcode_skip", {"transcode": True, "skip_connection": True}),
        ("transcode_groupmax", {"transcode": True, "activation": "groupmax"}),
        ("skip", {"skip_connection": True}),
        ("groupmax_skip", {"activation": "groupmax", "skip_connection": True}),
        ("expansion_factor", {"num_latents": 0, "expansion_factor": 4}),
    ):
        case = cases(name)
        save(case, cfg)
        what = ", ".join(["sparsify", *(f"{key} {value}" for key, value in cfg.items())])
        if cfg.get("multi_topk"):
            what += " (out is decode(encode(x)): the peer's forward returns that of 4 k latents)"
        expect_loaded(case, what)
    make_bfloat16(cases)
    make_old(cases)


def save(case: Case, cfg: dict, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A sparse coder with generic weights, saved."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(D_IN, SparseCoderConfig(**{"num_latents": D_SAE, "k": K, **cfg}))
    n = coder.num_latents
    coder.encoder.weight.data = case.encoder(n)
    coder.encoder.bias.data = case.randn(n) - 0.5
    coder.W_dec.data = case.rows(n)
    if cfg.get("normalize_decoder", True) and not cfg.get("transcode"):
        coder.set_decoder_norm_to_unit_norm()
    coder.b_dec.data = case.randn(D_IN)
    if coder.W_skip is not None:
        coder.W_skip.data = case.randn(D_IN, D_IN) / D_IN**0.5
    coder.to(dtype).save_to_disk(case.folder)
    return coder


def expect_loaded(case: Case, what: str, upcast: bool = False) -> None:
    """Write what sparsify computes of its folder."""
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(case.folder)

    def at(dtype: torch.dtype) -> Compute:
        def compute(x: Tensor) -> tuple[Tensor, Tensor]:
            coder.to(dtype)
            values, indices, _ = coder.encode(x)
            code = x.new_zeros(len(x), coder.num_latents).scatter_(1, indices, values)
            if coder.cfg.multi_topk:
                return code, coder.decode(values, indices)
            return code, coder(x).sae_out

        return compute

    assert upcast or coder.dtype == torch.float32
    case.expect(case.x(), at(torch.float32), at(torch.float64), what)


def make_bfloat16(cases: Cases) -> None:
    """Weights in half precision."""
    case = cases("bfloat16")
    save(case, {}, torch.bfloat16)
    expect_loaded(
        case, "sparsify in bfloat16; expected from the stored weights upcast", upcast=True
    )


def make_old(cases: Cases) -> None:
    """cfg.json of older versions, whose keys are changed by hand."""
    new = ("activation", "transcode", "skip_connection")
    case = cases("old_keys")
    save(case, {})
    cfg = read_json(case.folder / "cfg.json")
    cfg = {name: value for name, value in cfg.items() if name not in new}
    write_json(case.folder / "cfg.json", {**cfg, "signed": False})
    expect_loaded(case, f"cfg.json without {', '.join(new)}, and with signed false (by hand)")

    case = cases("signed")
    save(case, {})
    cfg = read_json(case.folder / "cfg.json")
    write_json(case.folder / "cfg.json", {**cfg, "signed": True})
    reason = "signed true: the latents are selected by magnitude and keep their sign"
    case.refuse(case.x(), "cfg.json with signed true (by hand)", reason)
