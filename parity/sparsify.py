"""eai-sparsify: how it is called, and fastsae's class compared with its class."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from fastsae import TopKSAE
from parity.compare import GRADIENT, Comparison, Differs
from parity.problem import (
    AUX,
    D_IN,
    D_SAE,
    FEW_DEAD,
    MANY_DEAD,
    K,
    Problem,
    fill,
    gradients,
    inferred,
    make,
    mode_of,
    trained,
)

NAMES = {"W_enc": "encoder.weight", "W_dec": "W_dec", "b_enc": "encoder.bias", "b_dec": "b_dec"}
INFERRED = ("code", "reconstruction")

# --- How it is called ----------------------------------------------------------------------------


def coder(d_in: int, d_sae: int, k: int, *, dtype: torch.dtype, device: Any, **options: Any) -> Any:
    """Return its SAE."""
    library = importlib.import_module("sparsify")
    config = library.SparseCoderConfig(num_latents=d_sae, k=k, **options)
    return library.SparseCoder(d_in, config, dtype=dtype, device=device)


# --- Comparisons ---------------------------------------------------------------------------------


def compare_topk(p: Problem) -> Iterator[Comparison]:
    """TopK: the same fvu; everything its encoder returns except the k values has no gradient."""
    no_gradient = "their encoder's backward returns nothing for pre-activations"
    for dead, multi in ((0, False), (MANY_DEAD, False), (FEW_DEAD, False), (0, True)):
        made = coder(D_IN, D_SAE, K, dtype=p.x.dtype, device="cpu", multi_topk=multi)
        theirs = fill(made, NAMES, p.weights)
        sae, mask = make(TopKSAE, p, K, multi_topk=multi, **AUX), p.dead(dead) if dead else None
        mine, out = trained(sae, p, mask), theirs(p.x, dead_mask=mask)
        weight = sae.auxk_alpha * p.V / float(mine["V_res"])
        loss = out.fvu + weight * out.auxk_loss + out.multi_topk_fvu / 8
        found = {"reconstruction": out.sae_out, "fvu": out.fvu, "loss": loss}
        found |= gradients(theirs, NAMES, loss, mine)
        code = torch.zeros_like(mine["code"]).scatter(1, out.latent_indices, out.latent_acts)
        differs, encoder = {}, [GRADIENT + name for name in ("W_enc", "b_enc")]
        if multi:
            reason = f"{no_gradient}, so the 4k term trains the decoder alone"
            differs = {key: Differs(reason) for key in (*encoder, GRADIENT + "b_dec")}
            reason = "with multi_topk the output holds those of 4k latents"
            differs |= {"reconstruction": Differs(reason), "code": Differs(reason)}
        elif mask is not None:
            reason = f"{no_gradient}, so AuxK does not train the encoder"
            for key in encoder:
                own, other, rows = mine[key], found.pop(key), f"{key}, dead latents"
                found[f"{key}, others"] = other[..., ~mask]
                mine[f"{key}, others"] = own[..., ~mask]
                mine[rows], found[rows] = own[..., mask], other[..., mask]
                differs[rows] = Differs(reason, 0.0)
            differs[GRADIENT + "b_dec"] = Differs(f"{reason}, nor b_dec through it")
            found["aux loss"] = out.auxk_loss * (p.V / mine["V_res"])
        if dead == FEW_DEAD:
            scale = 2 * FEW_DEAD / D_IN
            found = {"aux loss": found["aux loss"]}
            differs = {"aux loss": Differs(f"times dead / (d_in / 2) = {scale:g}", scale)}
        else:
            found["code"] = code
        yield Comparison("multi_topk" if multi else mode_of(dead), mine, found, differs)
        if not dead and not multi:
            yield Comparison("inference", inferred(sae, p), {k: found[k] for k in INFERRED})
