"""sae-lens: how it is called, and fastsae's classes compared with its classes."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastsae import BatchTopKSAE, GatedSAE, MatryoshkaSAE, ReLUSAE, TopKSAE
from parity.compare import GRADIENT, Comparison, Differs, Tensors
from parity.problem import (
    AUX,
    COEFFICIENT,
    D_IN,
    D_SAE,
    FEW_DEAD,
    GROUPS,
    MANY_DEAD,
    NAMES,
    K,
    Problem,
    across,
    fill,
    gradients,
    inference,
    jumprelu,
    make,
    mode_of,
    nested,
    trained,
)

# --- How it is called ----------------------------------------------------------------------------


def module(name: str, d_in: int, d_sae: int, dtype: torch.dtype, **options: Any) -> Any:
    """Return one of its SAEs, by the name of the class."""
    saes = importlib.import_module("sae_lens")
    of_dtype = str(dtype).removeprefix("torch.")
    config = getattr(saes, f"{name}Config")(d_in=d_in, d_sae=d_sae, dtype=of_dtype, **options)
    return getattr(saes, name)(config)


def step_input(x: Tensor, dead: Tensor | None = None, **coefficients: float) -> Any:
    """Return what its `training_forward_pass` takes."""
    made = importlib.import_module("sae_lens.saes.sae").TrainStepInput
    return made(x, coefficients, dead, 0, False)


def make_trainer(sae: Any, batch_size: int, steps: int, lr: float, **options: Any) -> Any:
    """Return its trainer of an SAE, for calls of `step(batch)`; the rate is constant by default."""
    config = importlib.import_module("sae_lens.config").SAETrainerConfig
    run = config(batch_size * steps, batch_size, lr=lr, lr_end=lr, **options)
    return importlib.import_module("sae_lens").SAETrainer(run, sae, data_provider=iter(()))


# --- Comparisons ---------------------------------------------------------------------------------


def _made(name: str, p: Problem, **options: Any) -> Any:
    return module(name, D_IN, D_SAE, p.x.dtype, **options)


def _step(sae: Any, p: Problem, dead: Tensor | None = None, **coefficients: float) -> Any:
    return sae.training_forward_pass(step_input(p.x, dead, **coefficients))


def _found(out: Any, sae: Any, names: dict[str, str], p: Problem, like: Tensors) -> Tensors:
    loss = out.loss * (len(p.x) / p.V)
    found = {"code": out.feature_acts, "reconstruction": out.sae_out, "loss": loss}
    found["fvu"] = out.losses["mse_loss"] * (len(p.x) / p.V)
    return found | gradients(sae, names, loss, like)


FEW_DEAD_AUX = Differs(
    f"times dead / (d_in / 2) = {2 * FEW_DEAD / D_IN:g}, and negative pre-activations of dead "
    "latents decode as well: no ReLU"
)


def _topk(ours: Any, name: str, p: Problem, **options: Any) -> Iterator[Comparison]:
    """Yield training without dead latents, with many, with few."""
    for dead in (0, MANY_DEAD, FEW_DEAD):
        mask = p.dead(dead) if dead else None
        mine = trained(ours, p, mask)
        weight = ours.auxk_alpha * p.V / float(mine["V_res"])
        options |= {"rescale_acts_by_decoder_norm": False, "aux_loss_coefficient": weight}
        theirs = fill(_made(name, p, **options), NAMES, p.weights)
        out = _step(theirs, p, mask)
        if dead != FEW_DEAD:
            yield Comparison(mode_of(dead), mine, _found(out, theirs, NAMES, p, mine))
            continue
        aux = out.losses["auxiliary_reconstruction_loss"] / weight * len(p.x) / mine["V_res"]
        w, rule = p.weights, "aux loss by that rule"
        assert mask is not None
        z = ((p.x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * mask
        left = (z @ w["W_dec"] - (p.x - mine["reconstruction"])).square().sum() / mine["V_res"]
        mine[rule] = 2 * FEW_DEAD / D_IN * left
        yield Comparison(
            mode_of(dead), mine, {"aux loss": aux, rule: aux}, {"aux loss": FEW_DEAD_AUX}
        )


def compare_topk(p: Problem) -> Iterator[Comparison]:
    """TopK: their auxiliary loss has no denominator, and another weight for few dead latents."""
    sae = make(TopKSAE, p, K, **AUX)
    options = {"k": K, "rescale_acts_by_decoder_norm": False}
    yield inference(sae, p, fill(_made("TopKSAE", p, **options), NAMES, p.weights))
    yield from _topk(sae.train(), "TopKTrainingSAE", p, k=K)


def compare_batch_topk(p: Problem) -> Iterator[Comparison]:
    """BatchTopK with a fractional k: their threshold's average starts from 0."""
    k = K - 1.5
    yield from _topk(make(BatchTopKSAE, p, k, **AUX), "BatchTopKTrainingSAE", p, k=k)
    sae = make(BatchTopKSAE, p, k)
    options = {"k": k, "rescale_acts_by_decoder_norm": False}
    theirs = fill(_made("BatchTopKTrainingSAE", p, **options), NAMES, p.weights)
    for x in (p.x, p.more):
        sae.loss(x)
        _step(theirs, Problem(x, x, p.weights, p.never_fire))
    yield Comparison(
        "threshold after 2 batches",
        {"threshold": sae.threshold},
        {"threshold": theirs.topk_threshold},
        {"threshold": Differs("their average starts from 0, ours from the first value")},
    )
    theirs.topk_threshold.copy_(sae.threshold)
    state = theirs.state_dict()
    theirs.process_state_dict_for_saving_inference(state)
    saved = _made("JumpReLUSAE", p)
    saved.load_state_dict(state)
    yield inference(sae, p, saved, "inference, threshold (their export)")


def compare_relu(p: Problem) -> Iterator[Comparison]:
    """L1: theirs is weighted by decoder norms, which have a gradient even though they are 1."""
    sae = make(ReLUSAE, p, coefficient=COEFFICIENT)
    mine, W_dec = trained(sae, p), p.weights["W_dec"]
    theirs = fill(_made("StandardTrainingSAE", p), NAMES, p.weights)
    out = _step(theirs, p, l1=COEFFICIENT * float(sae.unit))
    found, key = _found(out, theirs, NAMES, p, mine), GRADIENT + "W_dec"
    for side in (mine, found):
        side[key + " across rows"] = across(side[key], W_dec)
    reason = "L1 is weighted by decoder norms, which adds a part along the rows"
    yield Comparison("training", mine, found, {key: Differs(reason)})
    yield inference(sae, p, fill(_made("StandardSAE", p), NAMES, p.weights))


GATED = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_gate", "b_dec": "b_dec"}
GATED |= {"r_mag": "r_mag", "b_mag": "b_mag"}


def compare_gated(p: Problem) -> Iterator[Comparison]:
    """Gated: they do not detach the decoder in the gate's reconstruction."""
    sae = make(GatedSAE, p, coefficient=COEFFICIENT)
    mine, w = trained(sae, p), p.weights
    theirs = fill(_made("GatedTrainingSAE", p), GATED, w)
    out = _step(theirs, p, l1=COEFFICIENT * float(sae.unit))
    found = _found(out, theirs, GATED, p, mine)
    # The decoder's gradient from the term if it is not stopped.
    decoder = [w[name].clone().requires_grad_() for name in ("W_dec", "b_dec")]
    gate = ((p.x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    term = (p.x - gate @ decoder[0] - decoder[1]).square().sum() / p.V
    extra = torch.autograd.grad(term, decoder)
    names = [GRADIENT + "W_dec across rows with that term", GRADIENT + "b_dec with that term"]
    keys = [GRADIENT + "W_dec", GRADIENT + "b_dec"]
    for name, key, more in zip(names, keys, extra, strict=True):
        mine[name], found[name] = mine[key] + more, found[key]
    for side in (mine, found):
        side[names[0]] = across(side[names[0]], w["W_dec"])
    reason = "the gate's reconstruction trains the decoder too; the paper stops that gradient"
    also = reason + "; L1 is weighted by decoder norms"
    yield Comparison("training", mine, found, {keys[0]: Differs(also), keys[1]: Differs(reason)})
    yield inference(sae, p, fill(_made("GatedSAE", p), GATED, w))


def compare_jumprelu(p: Problem) -> Iterator[Comparison]:
    """JumpReLU: the paper's loss, with a bandwidth and a coefficient in the unit of x."""
    sae, mine, weights = jumprelu(p)
    names, unit = {**NAMES, "threshold": "threshold"}, float(sae.unit)
    theirs = _made("JumpReLUTrainingSAE", p, jumprelu_bandwidth=sae.bandwidth * unit)
    out = _step(fill(theirs, names, weights), p, l0=COEFFICIENT * unit**2)
    yield Comparison("training", mine, _found(out, theirs, names, p, mine))
    yield inference(sae, p, fill(_made("JumpReLUSAE", p), names, weights))


def compare_matryoshka(p: Problem) -> Iterator[Comparison]:
    """Matryoshka: they sum over prefixes and leave out the empty one."""
    sae = make(MatryoshkaSAE, p, K, groups=GROUPS, **AUX)
    options = {"k": K, "matryoshka_widths": [*itertools.accumulate(GROUPS)]}
    options |= {"rescale_acts_by_decoder_norm": False}
    for dead in (0, MANY_DEAD):
        mask = p.dead(dead) if dead else None
        mine = nested(sae, p, mask)
        weight = (len(GROUPS) + 1) * sae.auxk_alpha * p.V / float(mine["V_res"])
        options["aux_loss_coefficient"] = weight
        theirs = fill(_made("MatryoshkaBatchTopKTrainingSAE", p, **options), NAMES, p.weights)
        out = _step(theirs, p, mask)
        yield Comparison(mode_of(dead), mine, _found(out, theirs, NAMES, p, mine))
