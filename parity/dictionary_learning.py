"""dictionary-learning: how it is called, and fastsae's classes compared with its classes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch

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
    double,
    fill,
    gradients,
    inference,
    jumprelu,
    make,
    mode_of,
    nested,
    trained,
)

LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}
LINEAR_TOPK = {**LINEAR, "b_dec": "b_dec"}

# --- How it is called ----------------------------------------------------------------------------


def make_trainer(name: str, d_in: int, d_sae: int, steps: int = 10**6, **options: Any) -> Any:
    """Return one of its trainers, by the name of the class; its SAE is `trainer.ae`."""
    folder = ".matryoshka_batch_top_k" if name.startswith("Matryoshka") else ""  # not exported
    trainers = importlib.import_module(f"dictionary_learning.trainers{folder}")
    run: dict[str, Any] = {"steps": steps, "activation_dim": d_in, "dict_size": d_sae, "layer": 0}
    run |= {"lm_name": "none", "device": "cpu", **options}
    if name in ("StandardTrainer", "GatedSAETrainer", "JumpReluTrainer"):
        run["sparsity_warmup_steps"] = None
    return getattr(trainers, name)(**run)


# --- Comparisons ---------------------------------------------------------------------------------


def _made(name: str, p: Problem, names: dict[str, str], weights: Tensors, **kw: Any) -> Any:
    made = make_trainer(name, D_IN, D_SAE, **kw)
    fill(made.ae.to(p.x.dtype), names, weights)
    return made


def _step(trainer: Any, p: Problem, dead: int = 0) -> Any:
    """Return the graph's loss and the log of the same step; few steps are before its threshold."""
    if dead:
        trainer.num_tokens_since_fired[p.dead(dead)] = trainer.dead_feature_threshold
    log = trainer.loss(p.x, step=1, logging=True)
    if dead:
        trainer.num_tokens_since_fired[p.dead(dead)] = trainer.dead_feature_threshold
    return trainer.loss(p.x, step=1), log


def _topk(ours: Any, name: str, names: dict[str, str], p: Problem) -> Iterator[Comparison]:
    """Yield training without dead latents, with many, with few."""
    for dead in (0, MANY_DEAD, FEW_DEAD):
        mine = trained(ours, p, p.dead(dead) if dead else None)
        alpha = ours.auxk_alpha * p.V / len(p.x)
        trainer = _made(name, p, names, p.weights, k=K, auxk_alpha=alpha)
        loss, log = _step(trainer, p, dead)
        loss = loss * (len(p.x) / p.V)
        theirs = {"code": log.f, "reconstruction": log.x_hat, "loss": loss}
        theirs["fvu"] = double(log.losses["l2_loss"] * len(p.x) / p.V)
        if dead:
            theirs["aux loss"] = double(log.losses["auxk_loss"])
        yield Comparison(mode_of(dead), mine, theirs | gradients(trainer.ae, names, loss, mine))


def compare_topk(p: Problem) -> Iterator[Comparison]:
    """TopK: the same loss, the reconstruction in the unit of x."""
    sae = make(TopKSAE, p, K, **AUX)
    yield from _topk(sae, "TopKTrainer", LINEAR_TOPK, p)
    yield inference(sae, p, _made("TopKTrainer", p, LINEAR_TOPK, p.weights, k=K).ae)


def _threshold(sae: Any, trainer: Any, p: Problem) -> Iterator[Comparison]:
    """Yield the threshold of two batches and the inference that it leads to."""
    for x in (p.x, p.more):
        sae.loss(x)
        trainer.loss(x, step=trainer.threshold_start_step + 1)
    names = {"threshold": trainer.ae.threshold.double()}
    yield Comparison("threshold after 2 batches", {"threshold": sae.threshold}, names)
    yield inference(sae, p, trainer.ae, "inference, threshold")


def compare_batch_topk(p: Problem) -> Iterator[Comparison]:
    """BatchTopK: the same loss and, at the same rate, the same threshold."""
    yield from _topk(make(BatchTopKSAE, p, K, **AUX), "BatchTopKTrainer", LINEAR_TOPK, p)
    sae = make(BatchTopKSAE, p, K)
    beta = {"k": K, "threshold_beta": 1 - sae.threshold_lr}
    trainer = _made("BatchTopKTrainer", p, LINEAR_TOPK, p.weights, **beta)
    yield from _threshold(sae, trainer, p)


def _penalized(sae: Any, name: str, names: dict[str, str], p: Problem) -> Iterator[Comparison]:
    mine = trained(sae, p)
    penalty = COEFFICIENT * float(sae.unit)
    trainer = _made(name, p, names, p.weights, l1_penalty=penalty)
    loss, log = _step(trainer, p)
    loss = loss * (len(p.x) / p.V)
    theirs = {"code": log.f, "reconstruction": log.x_hat, "loss": loss}
    theirs["fvu"] = double(log.losses["mse_loss"] * len(p.x) / p.V)
    yield Comparison("training", mine, theirs | gradients(trainer.ae, names, loss, mine))
    yield inference(sae, p, trainer.ae)


def compare_relu(p: Problem) -> Iterator[Comparison]:
    """L1: the same loss."""
    names = {**LINEAR, "b_dec": "bias"}
    sae = make(ReLUSAE, p, coefficient=COEFFICIENT)
    yield from _penalized(sae, "StandardTrainer", names, p)


def compare_gated(p: Problem) -> Iterator[Comparison]:
    """Gated: the same loss."""
    names = {**LINEAR, "b_enc": "gate_bias", "b_dec": "decoder_bias"}
    names |= {"r_mag": "r_mag", "b_mag": "mag_bias"}
    sae = make(GatedSAE, p, coefficient=COEFFICIENT)
    yield from _penalized(sae, "GatedSAETrainer", names, p)


def compare_jumprelu(p: Problem) -> Iterator[Comparison]:
    """JumpReLU: x is not centered, the penalty is quadratic in L0, and its step sees f, not z."""
    sae, mine, weights = jumprelu(p)
    names, unit = {**NAMES, "threshold": "threshold"}, float(sae.unit)
    b_dec, W_enc, theta = p.weights["b_dec"], p.weights["W_enc"], weights["threshold"]
    shifted = weights | {"b_enc": p.weights["b_enc"] - b_dec @ W_enc}
    # With this weight, d (l0 / target - 1)^2 is d l0 times fastsae's coefficient.
    target, l0 = 20.0, float((mine["code"] > 0).sum() / len(p.x))
    quadratic = COEFFICIENT * unit**2 * target / (2 * (l0 / target - 1))
    found = {}
    for weight in (quadratic, 0.0):
        run = {"bandwidth": sae.bandwidth * unit, "target_l0": target, "sparsity_penalty": weight}
        trainer = _made("JumpReluTrainer", p, names, shifted, **run)
        loss, log = _step(trainer, p)
        found[weight] = gradients(trainer.ae, names, loss * (len(p.x) / p.V), mine)
    theirs, W, b = found[quadratic], GRADIENT + "W_enc", GRADIENT + "b_enc"
    theirs[W] = theirs[W] - torch.outer(b_dec, theirs[b])
    theirs[GRADIENT + "b_dec"] = theirs[GRADIENT + "b_dec"] - W_enc @ theirs[b]
    theirs |= {"code": log.f, "reconstruction": log.recon}
    theirs["fvu"] = double(log.losses["l2_loss"] * len(p.x) / p.V)
    key, part, half = (
        GRADIENT + "threshold",
        "threshold gradient of L0",
        "that from z > theta alone",
    )
    without = "threshold gradient without L0"
    mine[without] = trained(sae, p, sparsity_scale=0.0)[GRADIENT + "log_threshold"] / theta
    theirs[without], theirs[part] = found[0.0][key], theirs.pop(key) - found[0.0][key]
    mine[part] = mine[key] - mine[without]
    z, eps = (p.x - b_dec) @ W_enc + p.weights["b_enc"], sae.bandwidth * unit
    upper = ((z > theta) & (z < theta + eps / 2)).sum(0)
    mine[half], theirs[half] = -COEFFICIENT / (D_IN * eps * len(p.x)) * upper, theirs[part]
    reason = "their step sees f, which is 0 below theta: half of the window is lost"
    yield Comparison("training", mine, theirs, {part: Differs(reason)})
    ae = fill(trainer.ae, names, weights)
    ae.apply_b_dec_to_input = True
    yield inference(sae, p, ae)


def compare_matryoshka(p: Problem) -> Iterator[Comparison]:
    """Matryoshka: they leave out the empty prefix and divide by g twice."""
    g = len(GROUPS)
    sae = make(MatryoshkaSAE, p, K, groups=GROUPS, **AUX)
    options = {"k": K, "group_fractions": [size / D_SAE for size in GROUPS]}
    for dead in (0, MANY_DEAD):
        mine = nested(sae, p, p.dead(dead) if dead else None)
        alpha = (g + 1) / g**2 * sae.auxk_alpha * p.V / len(p.x)
        run = options | {"auxk_alpha": alpha}
        trainer = _made("MatryoshkaBatchTopKTrainer", p, NAMES, p.weights, **run)
        loss, log = _step(trainer, p, dead)
        loss = loss * (g**2 * len(p.x) / p.V)
        theirs = {"code": log.f, "reconstruction": log.x_hat, "loss": loss}
        if dead:
            theirs["aux loss"] = double(log.losses["auxk_loss"])
        else:
            name, reason = "mean over prefixes", "divided by g twice, so aux weighs g times as much"
            mine[name] = mine["loss"] / g
            theirs[name] = double(log.losses["l2_loss"] * len(p.x) / p.V)
        differs = {} if dead else {name: Differs(reason, 1 / g)}
        theirs |= gradients(trainer.ae, NAMES, loss, mine)
        yield Comparison(mode_of(dead), mine, theirs, differs)
    sae = make(MatryoshkaSAE, p, K, groups=GROUPS, **AUX)
    options["threshold_beta"] = 1 - sae.threshold_lr
    trainer = _made("MatryoshkaBatchTopKTrainer", p, NAMES, p.weights, **options)
    yield from _threshold(sae, trainer, p)
    sae.active_groups = trainer.ae.active_groups = 2
    yield inference(sae, p, trainer.ae, "inference, threshold, 2 groups")
