"""The same weights in fastsae and in other libraries: code, reconstruction, loss, gradients.

    python -m bench.equality                # prints a table; exits 1 where equal ones differ

With V = sum |x - mean x|^2 of the batch and unit^2 = V / (n d_in), a loss of theirs becomes ours as

    sum_d e^2, mean over tokens     times n / V       is  fvu
    lambda of an L1 penalty         coefficient unit      (values are in units of `unit`)
    lambda of an L0 penalty         coefficient unit^2
    weight of an auxiliary loss     auxk_alpha V / n       where theirs has our denominator, else
                                    auxk_alpha V / V_res,  V_res = sum |e - mean e|^2

so every comparison is of one number with another, at TOLERANCE. What another library defines
otherwise is a row of its own, with theirs / ours as measured; where the reason says what that ratio
has to be, it is checked as well.

The other libraries are optional: pip install eai-sparsify dictionary-learning sae-lens
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsae
from fastsae import BatchTopKSAE, GatedSAE, JumpReLUSAE, ReLUSAE, TopKSAE
from fastsae.nn.loss import variation

TOLERANCE = 1e-5
D_IN, D_SAE, N, K = 32, 256, 64, 8
MANY_DEAD, FEW_DEAD = 100, 8  # more and fewer than the d_in / 2 that an auxiliary loss selects
GROUPS = [16, 48, 64, 128]
COEFFICIENT = 3.0
AUX = {"auxk_alpha": 1.0}  # instead of 1 / 32, so that nothing hides in a small term
INFERRED = ("code", "reconstruction")

Tensors = dict[str, Tensor]
GRADIENT = "gradient of "
NAMES = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}


# --- Comparing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Differs:
    """Why something is not expected equal, and theirs / ours where the reason determines it."""

    reason: str
    ratio: float | None = None


@dataclass
class Comparison:
    """Quantities by name from both sides, and which of them are known to differ."""

    mode: str
    ours: Tensors
    theirs: Tensors
    differs: dict[str, Differs] = field(default_factory=dict)


@dataclass
class Row:
    """One line of the table."""

    ours: str
    peer: str
    what: str
    difference: float
    verdict: str
    ok: bool = True


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return max |ours - theirs| / max |ours|; inf for another shape, NaN, or nothing but zeros."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if ours.shape != theirs.shape or not bool((ours != 0).any()):
        return math.inf
    found = float((ours - theirs).abs().max() / ours.abs().max())
    return math.inf if math.isnan(found) else found


def compare(ours: str, peer: str, found: Comparison) -> list[Row]:
    """Return a row for all that has to be equal, and one for each known difference."""
    equal = {
        name: difference(found.ours[name], theirs)
        for name, theirs in found.theirs.items()
        if name not in found.differs
    }
    rows = []
    if equal:
        worst = max(equal.values())
        wrong = [name for name, size in equal.items() if not size <= TOLERANCE]
        verdict = f"DIFFERS: {', '.join(wrong)}" if wrong else "equal"
        what = f"{found.mode}: {_list(equal)}"
        rows.append(Row(ours, peer, what, worst, verdict, not wrong))
    for name, known in found.differs.items():
        a, b = found.ours[name].detach().double(), found.theirs[name].detach().double()
        size, ratio = difference(a, b), float(b.norm() / a.norm())
        says, ok = f"theirs / ours {ratio:.4g}: {known.reason}", True
        if known.ratio is not None:
            ok = float((b - known.ratio * a).abs().max()) <= TOLERANCE * float(a.abs().max())
            says = says if ok else f"DIFFERS from the ratio {known.ratio:.4g}, {says}"
        elif size <= TOLERANCE:
            says = f"equal in this version; was known for: {known.reason}"
        rows.append(Row(ours, peer, f"{found.mode}: {name}", size, says, ok))
    return rows


def _list(names: Iterable[str]) -> str:
    """Join names, with the gradients in one bracket."""
    names = list(names)
    gradients = [name.removeprefix(GRADIENT) for name in names if name.startswith(GRADIENT)]
    listed = [name for name in names if not name.startswith(GRADIENT)]
    if gradients:
        listed.append(f"gradients ({', '.join(gradients)})")
    return ", ".join(listed)


def report(rows: list[Row]) -> str:
    """Return the table."""
    lines = [
        "| ours | peer | compared | max relative difference | verdict |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        size = "" if math.isnan(row.difference) else f"{row.difference:.1e}"
        cells = (row.ours, row.peer, row.what, size, row.verdict)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- Both sides ----------------------------------------------------------------------------------


@dataclass
class Problem:
    """Two batches, weights with nonzero biases, and latents that never fire."""

    x: Tensor
    more: Tensor
    weights: Tensors
    never_fire: Tensor

    @property
    def V(self) -> float:
        """sum |x - mean x|^2."""
        return float(variation(self.x))

    def dead(self, count: int) -> Tensor:
        """Return the mask [d_sae] of `count` of the latents that never fire."""
        mask = torch.zeros(D_SAE, dtype=torch.bool)
        mask[self.never_fire[:count]] = True
        return mask


def problem(dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """Draw weights and batches; short encoder rows are never among the largest k."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, never_fire = normal(D_SAE, D_IN), torch.randperm(D_SAE, generator=generator)[:MANY_DEAD]
    W_enc, b_enc = F.normalize(rows, dim=1), 0.1 * normal(D_SAE)
    W_enc[never_fire] *= 0.2
    b_enc[never_fire] *= 0.2
    weights = {"W_enc": W_enc.t(), "b_enc": b_enc, "b_dec": 0.3 * normal(D_IN)}
    weights |= {"W_dec": F.normalize(normal(D_SAE, D_IN), dim=1)}
    weights |= {"r_mag": 0.3 * normal(D_SAE), "b_mag": 0.2 * normal(D_SAE)}
    # As a share of `unit`, and more than half of any bandwidth.
    weights |= {"log_threshold": (0.5 + 0.1 * normal(D_SAE).abs()).log()}
    mean, x = normal(D_IN), 1.7 * normal(2 * N, D_IN)
    x = (x + mean).to(dtype)
    return Problem(x[:N], x[N:], {key: w.to(dtype) for key, w in weights.items()}, never_fire)


def make(cls: type[fastsae.SAE], p: Problem, *args: Any, **kwargs: Any) -> Any:
    """Return one of our modules with the weights of `p`, in training mode."""
    sae = cls(D_IN, D_SAE, *args, dtype=p.x.dtype, **kwargs)
    for name, _ in list(sae.named_parameters()):
        setattr(sae, name, p.weights[name])
    return sae.train()


def fill(module: nn.Module, names: dict[str, str], weights: Tensors) -> Any:
    """Copy weights into a module of another library, transposed where it stores them so."""
    for ours, theirs in names.items():
        held, value = module.get_parameter(theirs), weights[ours].detach()
        value = value if value.shape == held.shape else value.t()
        held.data = value.clone().to(held.dtype)
    return module


def trained(sae: Any, p: Problem, dead: Tensor | None = None) -> Tensors:
    """Return what a training step of ours computes."""
    sae.zero_grad()
    out = sae.loss(p.x, dead=dead)
    out.loss.backward()
    found = {"code": out.acts.to_dense(), "reconstruction": out.reconstruction}
    found |= {"loss": out.loss, "fvu": out.fvu, "aux loss": out.aux_loss}
    found["V_res"] = variation(p.x - out.reconstruction)
    gradients = {GRADIENT + name: w.grad.clone() for name, w in sae.named_parameters()}
    return {**found, **gradients}


def gradients(module: nn.Module, names: dict[str, str], loss: Tensor, like: Tensors) -> Tensors:
    """Return the gradients of their loss, transposed as `like` has them."""
    module.zero_grad()
    loss.backward()
    found = {}
    for ours, theirs in names.items():
        held, key = module.get_parameter(theirs), GRADIENT + ours
        grad = torch.zeros_like(held) if held.grad is None else held.grad.clone()
        found[key] = grad if grad.shape == like[key].shape else grad.t()
    return found


def inferred(sae: Any, p: Problem) -> Tensors:
    """Return code and reconstruction of ours in eval mode."""
    sae.eval()
    with torch.no_grad():
        return {"code": sae.encode(p.x), "reconstruction": sae(p.x)}


def inference(sae: Any, p: Problem, module: Any, mode: str = "inference") -> Comparison:
    """Compare code and reconstruction with those of a module that has encode and decode."""
    with torch.no_grad():
        code = module.encode(p.x)
        theirs = {"code": code, "reconstruction": module.decode(code)}
    return Comparison(mode, inferred(sae, p), theirs)


def across(gradient: Tensor, W_dec: Tensor) -> Tensor:
    """Return the gradient less its part along each row of W_dec, which have norm 1."""
    return gradient - (gradient * W_dec).sum(1, keepdim=True) * W_dec


def _double(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)


def _mode(dead: int) -> str:
    return f"training, {dead} dead" if dead else "training"


# --- sae-lens ------------------------------------------------------------------------------------


def _lens(name: str, p: Problem, **options: Any) -> Any:
    saes = importlib.import_module("sae_lens")
    dtype = str(p.x.dtype).removeprefix("torch.")
    config = getattr(saes, f"{name}Config")(d_in=D_IN, d_sae=D_SAE, dtype=dtype, **options)
    return getattr(saes, name)(config)


def _lens_step(sae: Any, p: Problem, dead: Tensor | None = None, **coefficients: float) -> Any:
    step = importlib.import_module("sae_lens.saes.sae").TrainStepInput
    return sae.training_forward_pass(step(p.x, coefficients, dead, 0, False))


def _lens_found(out: Any, sae: Any, names: dict[str, str], p: Problem, like: Tensors) -> Tensors:
    loss = out.loss * (len(p.x) / p.V)
    found = {"code": out.feature_acts, "reconstruction": out.sae_out, "loss": loss}
    found["fvu"] = out.losses["mse_loss"] * (len(p.x) / p.V)
    return found | gradients(sae, names, loss, like)


LENS_AUX = Differs(
    f"times dead / (d_in / 2) = {2 * FEW_DEAD / D_IN:g}, and negative pre-activations of dead "
    "latents decode as well: no ReLU"
)


def _lens_topk(ours: Any, name: str, p: Problem, **options: Any) -> Iterator[Comparison]:
    """Yield training without dead latents, with many, with few."""
    for dead in (0, MANY_DEAD, FEW_DEAD):
        mask = p.dead(dead) if dead else None
        mine = trained(ours, p, mask)
        weight = ours.auxk_alpha * p.V / float(mine["V_res"])
        options |= {"rescale_acts_by_decoder_norm": False, "aux_loss_coefficient": weight}
        theirs = fill(_lens(name, p, **options), NAMES, p.weights)
        out = _lens_step(theirs, p, mask)
        if dead != FEW_DEAD:
            yield Comparison(_mode(dead), mine, _lens_found(out, theirs, NAMES, p, mine))
            continue
        aux = out.losses["auxiliary_reconstruction_loss"] / weight * len(p.x) / mine["V_res"]
        w, rule = p.weights, "aux loss by that rule"
        z = ((p.x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * mask
        left = (z @ w["W_dec"] - (p.x - mine["reconstruction"])).square().sum() / mine["V_res"]
        mine[rule] = 2 * FEW_DEAD / D_IN * left
        yield Comparison(_mode(dead), mine, {"aux loss": aux, rule: aux}, {"aux loss": LENS_AUX})


def topk_lens(p: Problem) -> Iterator[Comparison]:
    """TopK: their auxiliary loss has no denominator, and another weight for few dead latents."""
    sae = make(TopKSAE, p, K, **AUX)
    options = {"k": K, "rescale_acts_by_decoder_norm": False}
    yield inference(sae, p, fill(_lens("TopKSAE", p, **options), NAMES, p.weights))
    yield from _lens_topk(sae.train(), "TopKTrainingSAE", p, k=K)


def batch_topk_lens(p: Problem) -> Iterator[Comparison]:
    """BatchTopK with a fractional k: their threshold's average starts from 0."""
    k = K - 1.5
    yield from _lens_topk(make(BatchTopKSAE, p, k, **AUX), "BatchTopKTrainingSAE", p, k=k)
    sae = make(BatchTopKSAE, p, k)
    options = {"k": k, "rescale_acts_by_decoder_norm": False}
    theirs = fill(_lens("BatchTopKTrainingSAE", p, **options), NAMES, p.weights)
    for x in (p.x, p.more):
        sae.loss(x)
        _lens_step(theirs, Problem(x, x, p.weights, p.never_fire))
    yield Comparison(
        "threshold after 2 batches",
        {"threshold": sae.threshold},
        {"threshold": theirs.topk_threshold},
        {"threshold": Differs("their average starts from 0, ours from the first value")},
    )
    theirs.topk_threshold.copy_(sae.threshold)
    state = theirs.state_dict()
    theirs.process_state_dict_for_saving_inference(state)
    saved = _lens("JumpReLUSAE", p)
    saved.load_state_dict(state)
    yield inference(sae, p, saved, "inference, threshold (their export)")


def relu_lens(p: Problem) -> Iterator[Comparison]:
    """L1: theirs is weighted by decoder norms, which have a gradient although they are 1."""
    sae = make(ReLUSAE, p, coefficient=COEFFICIENT)
    mine, W_dec = trained(sae, p), p.weights["W_dec"]
    theirs = fill(_lens("StandardTrainingSAE", p), NAMES, p.weights)
    out = _lens_step(theirs, p, l1=COEFFICIENT * float(sae.unit))
    found, key = _lens_found(out, theirs, NAMES, p, mine), GRADIENT + "W_dec"
    for side in (mine, found):
        side[key + " across rows"] = across(side[key], W_dec)
    reason = "L1 is weighted by decoder norms, which adds a part along the rows"
    yield Comparison("training", mine, found, {key: Differs(reason)})
    yield inference(sae, p, fill(_lens("StandardSAE", p), NAMES, p.weights))


GATED = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_gate", "b_dec": "b_dec"}
GATED |= {"r_mag": "r_mag", "b_mag": "b_mag"}


def gated_lens(p: Problem) -> Iterator[Comparison]:
    """Gated: they do not detach the decoder in the gate's reconstruction."""
    sae = make(GatedSAE, p, coefficient=COEFFICIENT)
    mine, w = trained(sae, p), p.weights
    theirs = fill(_lens("GatedTrainingSAE", p), GATED, w)
    out = _lens_step(theirs, p, l1=COEFFICIENT * float(sae.unit))
    found = _lens_found(out, theirs, GATED, p, mine)
    # What the decoder gets from the term without stopping its gradient.
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
    yield inference(sae, p, fill(_lens("GatedSAE", p), GATED, w))


def _jumprelu(p: Problem) -> tuple[Any, Tensors, Tensors]:
    """Return our module, what a step gave (gradients for theta itself), and theirs to copy."""
    sae = make(JumpReLUSAE, p, coefficient=COEFFICIENT)
    mine, key = trained(sae, p), GRADIENT + "log_threshold"
    theta = sae.threshold.detach()
    mine[GRADIENT + "threshold"] = mine.pop(key) / theta
    return sae, mine, p.weights | {"threshold": theta}


def jumprelu_lens(p: Problem) -> Iterator[Comparison]:
    """JumpReLU: the paper's loss, with a bandwidth and a coefficient in the unit of x."""
    sae, mine, weights = _jumprelu(p)
    names, unit = {**NAMES, "threshold": "threshold"}, float(sae.unit)
    theirs = _lens("JumpReLUTrainingSAE", p, jumprelu_bandwidth=sae.bandwidth * unit)
    out = _lens_step(fill(theirs, names, weights), p, l0=COEFFICIENT * unit**2)
    yield Comparison("training", mine, _lens_found(out, theirs, names, p, mine))
    yield inference(sae, p, fill(_lens("JumpReLUSAE", p), names, weights))


def _nested(sae: Any, p: Problem, dead: Tensor | None) -> Tensors:
    """Return (g + 1) times what a step of ours gives, less the term |x - b_dec|^2."""
    mine, e = trained(sae, p, dead), p.x - p.weights["b_dec"]
    for name in ("loss", *(key for key in mine if key.startswith(GRADIENT))):
        mine[name] = mine[name] * (len(GROUPS) + 1)
    mine["loss"] = mine["loss"] - e.square().sum() / p.V
    mine[GRADIENT + "b_dec"] += 2 * e.sum(0) / p.V
    return mine


def matryoshka_lens(p: Problem) -> Iterator[Comparison]:
    """Matryoshka: they sum over prefixes and leave out the empty one."""
    sae = make(fastsae.MatryoshkaSAE, p, K, groups=GROUPS, **AUX)
    options = {"k": K, "matryoshka_widths": [*itertools.upcast(GROUPS)]}
    options |= {"rescale_acts_by_decoder_norm": False}
    for dead in (0, MANY_DEAD):
        mask = p.dead(dead) if dead else None
        mine = _nested(sae, p, mask)
        weight = (len(GROUPS) + 1) * sae.auxk_alpha * p.V / float(mine["V_res"])
        options["aux_loss_coefficient"] = weight
        theirs = fill(_lens("MatryoshkaBatchTopKTrainingSAE", p, **options), NAMES, p.weights)
        out = _lens_step(theirs, p, mask)
        yield Comparison(_mode(dead), mine, _lens_found(out, theirs, NAMES, p, mine))


# --- dictionary-learning -------------------------------------------------------------------------


def _dl_trainer(name: str, p: Problem, names: dict[str, str], weights: Tensors, **kw: Any) -> Any:
    nested = ".matryoshka_batch_top_k" if name.startswith("Matryoshka") else ""  # not exported
    trainers = importlib.import_module(f"dictionary_learning.trainers{nested}")
    run = {"steps": 10**6, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 0}
    run |= {"lm_name": "none", "device": "cpu"}
    if name in ("StandardTrainer", "GatedSAETrainer", "JumpReluTrainer"):
        run["sparsity_warmup_steps"] = None
    trainer = getattr(trainers, name)(**run, **kw)
    fill(trainer.ae.to(p.x.dtype), names, weights)
    return trainer


def _dl_step(trainer: Any, p: Problem, dead: int = 0) -> Any:
    """Return the graph's loss and the log of the same step; few steps are before its threshold."""
    if dead:
        trainer.num_tokens_since_fired[p.dead(dead)] = trainer.dead_feature_threshold
    log = trainer.loss(p.x, step=1, logging=True)
    if dead:
        trainer.num_tokens_since_fired[p.dead(dead)] = trainer.dead_feature_threshold
    return trainer.loss(p.x, step=1), log


def _dl_topk(ours: Any, name: str, names: dict[str, str], p: Problem) -> Iterator[Comparison]:
    """Yield training without dead latents, with many, with few."""
    for dead in (0, MANY_DEAD, FEW_DEAD):
        mine = trained(ours, p, p.dead(dead) if dead else None)
        alpha = ours.auxk_alpha * p.V / len(p.x)
        trainer = _dl_trainer(name, p, names, p.weights, k=K, auxk_alpha=alpha)
        loss, log = _dl_step(trainer, p, dead)
        loss = loss * (len(p.x) / p.V)
        theirs = {"code": log.f, "reconstruction": log.x_hat, "loss": loss}
        theirs["fvu"] = _double(log.losses["l2_loss"] * len(p.x) / p.V)
        if dead:
            theirs["aux loss"] = _double(log.losses["auxk_loss"])
        yield Comparison(_mode(dead), mine, theirs | gradients(trainer.ae, names, loss, mine))


LINEAR_TOPK = {**LINEAR, "b_dec": "b_dec"}


def topk_dl(p: Problem) -> Iterator[Comparison]:
    """TopK: the same loss, the reconstruction in the unit of x."""
    sae = make(TopKSAE, p, K, **AUX)
    yield from _dl_topk(sae, "TopKTrainer", LINEAR_TOPK, p)
    yield inference(sae, p, _dl_trainer("TopKTrainer", p, LINEAR_TOPK, p.weights, k=K).ae)


def _dl_threshold(sae: Any, trainer: Any, p: Problem) -> Iterator[Comparison]:
    """Yield the threshold of two batches and the inference that it leads to."""
    for x in (p.x, p.more):
        sae.loss(x)
        trainer.loss(x, step=trainer.threshold_start_step + 1)
    names = {"threshold": trainer.ae.threshold.double()}
    yield Comparison("threshold after 2 batches", {"threshold": sae.threshold}, names)
    yield inference(sae, p, trainer.ae, "inference, threshold")


def batch_topk_dl(p: Problem) -> Iterator[Comparison]:
    """BatchTopK: the same loss and, at the same rate, the same threshold."""
    yield from _dl_topk(make(BatchTopKSAE, p, K, **AUX), "BatchTopKTrainer", LINEAR_TOPK, p)
    sae = make(BatchTopKSAE, p, K)
    beta = {"k": K, "threshold_beta": 1 - sae.threshold_lr}
    trainer = _dl_trainer("BatchTopKTrainer", p, LINEAR_TOPK, p.weights, **beta)
    yield from _dl_threshold(sae, trainer, p)


def _dl_penalized(sae: Any, name: str, names: dict[str, str], p: Problem) -> Iterator[Comparison]:
    mine = trained(sae, p)
    penalty = COEFFICIENT * float(sae.unit)
    trainer = _dl_trainer(name, p, names, p.weights, l1_penalty=penalty)
    loss, log = _dl_step(trainer, p)
    loss = loss * (len(p.x) / p.V)
    theirs = {"code": log.f, "reconstruction": log.x_hat, "loss": loss}
    theirs["fvu"] = _double(log.losses["mse_loss"] * len(p.x) / p.V)
    yield Comparison("training", mine, theirs | gradients(trainer.ae, names, loss, mine))
    yield inference(sae, p, trainer.ae)


def relu_dl(p: Problem) -> Iterator[Comparison]:
    """L1: the same loss."""
    names = {**LINEAR, "b_dec": "bias"}
    sae = make(ReLUSAE, p, coefficient=COEFFICIENT)
    yield from _dl_penalized(sae, "StandardTrainer", names, p)


def gated_dl(p: Problem) -> Iterator[Comparison]:
    """Gated: the same loss."""
    names = {**LINEAR, "b_enc": "gate_bias", "b_dec": "decoder_bias"}
    names |= {"r_mag": "r_mag", "b_mag": "mag_bias"}
    sae = make(GatedSAE, p, coefficient=COEFFICIENT)
    yield from _dl_penalized(sae, "GatedSAETrainer", names, p)


def jumprelu_dl(p: Problem) -> Iterator[Comparison]:
    """JumpReLU: x is not centred, the penalty is quadratic in L0, and its step sees f, not z."""
    sae, mine, weights = _jumprelu(p)
    names, unit = {**NAMES, "threshold": "threshold"}, float(sae.unit)
    b_dec, W_enc, theta = p.weights["b_dec"], p.weights["W_enc"], weights["threshold"]
    shifted = weights | {"b_enc": p.weights["b_enc"] - b_dec @ W_enc}
    # With this weight, d (l0 / target - 1)^2 is d l0 times our coefficient.
    target, l0 = 20.0, float((mine["code"] > 0).sum() / len(p.x))
    quadratic = COEFFICIENT * unit**2 * target / (2 * (l0 / target - 1))
    found = {}
    for weight in (quadratic, 0.0):
        run = {"bandwidth": sae.bandwidth * unit, "target_l0": target, "sparsity_penalty": weight}
        trainer = _dl_trainer("JumpReluTrainer", p, names, shifted, **run)
        loss, log = _dl_step(trainer, p)
        found[weight] = gradients(trainer.ae, names, loss * (len(p.x) / p.V), mine)
    theirs, W, b = found[quadratic], GRADIENT + "W_enc", GRADIENT + "b_enc"
    theirs[W] = theirs[W] - torch.outer(b_dec, theirs[b])
    theirs[GRADIENT + "b_dec"] = theirs[GRADIENT + "b_dec"] - W_enc @ theirs[b]
    theirs |= {"code": log.f, "reconstruction": log.recon}
    theirs["fvu"] = _double(log.losses["l2_loss"] * len(p.x) / p.V)
    key, part, half = (
        GRADIENT + "threshold",
        "threshold gradient of L0",
        "that from z > theta alone",
    )
    sae.sparsity_scale, without = 0.0, "threshold gradient without L0"
    mine[without] = trained(sae, p)[GRADIENT + "log_threshold"] / theta
    sae.sparsity_scale = 1.0
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


def matryoshka_dl(p: Problem) -> Iterator[Comparison]:
    """Matryoshka: they leave out the empty prefix and divide by g twice."""
    g = len(GROUPS)
    sae = make(fastsae.MatryoshkaSAE, p, K, groups=GROUPS, **AUX)
    options = {"k": K, "group_fractions": [size / D_SAE for size in GROUPS]}
    for dead in (0, MANY_DEAD):
        mine = _nested(sae, p, p.dead(dead) if dead else None)
        alpha = (g + 1) / g**2 * sae.auxk_alpha * p.V / len(p.x)
        run = options | {"auxk_alpha": alpha}
        trainer = _dl_trainer("MatryoshkaBatchTopKTrainer", p, NAMES, p.weights, **run)
        loss, log = _dl_step(trainer, p, dead)
        loss = loss * (g**2 * len(p.x) / p.V)
        theirs = {"code": log.f, "reconstruction": log.x_hat, "loss": loss}
        if dead:
            theirs["aux loss"] = _double(log.losses["auxk_loss"])
        else:
            name, reason = "mean over prefixes", "divided by g twice, so aux weighs g times as much"
            mine[name] = mine["loss"] / g
            theirs[name] = _double(log.losses["l2_loss"] * len(p.x) / p.V)
        differs = {} if dead else {name: Differs(reason, 1 / g)}
        theirs |= gradients(trainer.ae, NAMES, loss, mine)
        yield Comparison(_mode(dead), mine, theirs, differs)
    sae = make(fastsae.MatryoshkaSAE, p, K, groups=GROUPS, **AUX)
    options["threshold_beta"] = 1 - sae.threshold_lr
    trainer = _dl_trainer("MatryoshkaBatchTopKTrainer", p, NAMES, p.weights, **options)
    yield from _dl_threshold(sae, trainer, p)
    sae.active_groups = trainer.ae.active_groups = 2
    yield inference(sae, p, trainer.ae, "inference, threshold, 2 groups")


# --- eai-sparsify --------------------------------------------------------------------------------


def topk_sparsify(p: Problem) -> Iterator[Comparison]:
    """TopK: the same fvu; what its encoder returns besides the k values has no gradient."""
    library = importlib.import_module("sparsify")
    names = {"W_enc": "encoder.weight", "W_dec": "W_dec", "b_enc": "encoder.bias", "b_dec": "b_dec"}
    no_gradient = "their encoder's backward returns nothing for pre-activations"
    for dead, multi in ((0, False), (MANY_DEAD, False), (FEW_DEAD, False), (0, True)):
        config = library.SparseCoderConfig(num_latents=D_SAE, k=K, multi_topk=multi)
        theirs = fill(library.SparseCoder(D_IN, config, dtype=p.x.dtype), names, p.weights)
        sae, mask = make(TopKSAE, p, K, multi_topk=multi, **AUX), p.dead(dead) if dead else None
        mine, out = trained(sae, p, mask), theirs(p.x, dead_mask=mask)
        weight = sae.auxk_alpha * p.V / float(mine["V_res"])
        loss = out.fvu + weight * out.auxk_loss + out.multi_topk_fvu / 8
        found = {"reconstruction": out.sae_out, "fvu": out.fvu, "loss": loss}
        found |= gradients(theirs, names, loss, mine)
        code = torch.zeros_like(mine["code"]).scatter(1, out.latent_indices, out.latent_acts)
        differs, encoder = {}, [GRADIENT + name for name in ("W_enc", "b_enc")]
        if multi:
            reason = f"{no_gradient}, so the 4k term trains the decoder alone"
            differs = {key: Differs(reason) for key in (*encoder, GRADIENT + "b_dec")}
            reason = "with multi_topk the output holds those of 4k latents"
            differs |= {"reconstruction": Differs(reason), "code": Differs(reason)}
        elif dead:
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
        yield Comparison("multi_topk" if multi else _mode(dead), mine, found, differs)
        if not dead and not multi:
            yield Comparison("inference", inferred(sae, p), {k: found[k] for k in INFERRED})


# --- The table -----------------------------------------------------------------------------------

Case = Callable[[Problem], Iterable[Comparison]]
LENS, DL, SPARSIFY = (
    ("sae-lens", "sae_lens"),
    ("dictionary-learning", "dictionary_learning.trainers"),
    ("eai-sparsify", "sparsify"),
)
CASES: list[tuple[str, str, tuple[str, str], Case]] = [
    ("TopKSAE", "TopKSAE, TopKTrainingSAE", LENS, topk_lens),
    ("TopKSAE", "AutoEncoderTopK, TopKTrainer", DL, topk_dl),
    ("TopKSAE", "SparseCoder", SPARSIFY, topk_sparsify),
    ("BatchTopKSAE", "BatchTopKTrainingSAE", LENS, batch_topk_lens),
    ("BatchTopKSAE", "BatchTopKSAE, BatchTopKTrainer", DL, batch_topk_dl),
    ("MatryoshkaSAE", "MatryoshkaBatchTopKTrainingSAE", LENS, matryoshka_lens),
    ("MatryoshkaSAE", "MatryoshkaBatchTopKSAE, its trainer", DL, matryoshka_dl),
    ("ReLUSAE", "StandardSAE, StandardTrainingSAE", LENS, relu_lens),
    ("ReLUSAE", "AutoEncoder, StandardTrainer", DL, relu_dl),
    ("GatedSAE", "GatedSAE, GatedTrainingSAE", LENS, gated_lens),
    ("GatedSAE", "GatedAutoEncoder, GatedSAETrainer", DL, gated_dl),
    ("JumpReLUSAE", "JumpReLUSAE, JumpReLUTrainingSAE", LENS, jumprelu_lens),
    ("JumpReLUSAE", "JumpReluAutoEncoder, JumpReluTrainer", DL, jumprelu_dl),
]


def run(p: Problem, only: str = "") -> list[Row]:
    """Return the rows of all cases whose classes have `only` in their names."""
    rows = []
    for ours, theirs, (package, module), case in CASES:
        if only.lower() not in f"{ours} {theirs} {package}".lower():
            continue
        if not hasattr(fastsae, ours):
            rows.append(Row(ours, theirs, "", math.nan, "fastsae has no such class"))
            continue
        try:
            importlib.import_module(module)
        except ImportError as error:
            absent = module.startswith(str(error.name))
            says = "not installed" if absent else f"not imported: {error}"
            rows.append(Row(ours, f"{theirs} ({package})", "", math.nan, says))
            continue
        peer = f"{theirs} ({package} {version(package)})"
        for found in case(p):
            rows += compare(ours, peer, found)
    return rows


def main() -> int:
    """Print the table; return 1 if something that has to be equal is not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a class's or a library's name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float64", choices=("float32", "float64"))
    arguments = parser.parse_args()
    rows = run(problem(getattr(torch, arguments.dtype), arguments.seed), arguments.only)
    print(report(rows))
    return int(not all(row.ok for row in rows))


if __name__ == "__main__":
    sys.exit(main())
