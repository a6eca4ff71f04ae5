"""One problem for both sides: weights, batches, and what fastsae computes from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsae import SAE, JumpReLUSAE, StepContext
from fastsae.nn.parallel import ALONE
from parity.compare import GRADIENT, Comparison, Tensors

D_IN, D_SAE, N, K = 32, 256, 64, 8
MANY_DEAD, FEW_DEAD = 100, 8  # more and fewer than the d_in / 2 that AuxK selects
GROUPS = [16, 48, 64, 128]
COEFFICIENT = 3.0
AUX = {"auxk_alpha": 1.0}  # instead of 1 / 32, so that nothing hides in a small term

# fastsae's name of a parameter -> the other library's.
NAMES = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


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
        return float(ALONE.total_variance(self.x))

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
    # In units of `unit`, and more than half of any bandwidth.
    weights |= {"log_threshold": (0.5 + 0.1 * normal(D_SAE).abs()).log()}
    mean, x = normal(D_IN), 1.7 * normal(2 * N, D_IN)
    x = (x + mean).to(dtype)
    return Problem(x[:N], x[N:], {key: w.to(dtype) for key, w in weights.items()}, never_fire)


def make(cls: type[SAE], p: Problem, *args: Any, **kwargs: Any) -> Any:
    """Return one of fastsae's modules with the weights of `p`, in training mode."""
    sae = cls(D_IN, D_SAE, *args, dtype=p.x.dtype, **kwargs)
    for name, _ in list(sae.named_parameters()):
        name = name.removesuffix("_rows")  # W_enc, as in all other libraries
        setattr(sae, name, p.weights[name])
    return sae.train()


def fill(module: nn.Module, names: dict[str, str], weights: Tensors) -> Any:
    """Copy weights into a module of another library, transposed where it stores them that way."""
    for ours, theirs in names.items():
        held, value = module.get_parameter(theirs), weights[ours].detach()
        with torch.no_grad():
            held.copy_(value if value.shape == held.shape else value.t())
    return module


def trained(
    sae: Any, p: Problem, dead: Tensor | None = None, *, sparsity_scale: float = 1.0
) -> Tensors:
    """Return what a training step of fastsae computes."""
    sae.zero_grad()
    out = sae.loss(p.x, context=StepContext(dead=dead, sparsity_scale=sparsity_scale))
    out.loss.backward()
    found = {"code": out.acts.to_dense(), "reconstruction": out.reconstruction}
    found |= {"loss": out.loss, "fvu": out.fvu, "aux loss": out.aux_loss}
    found["V_res"] = ALONE.total_variance(p.x - out.reconstruction)
    gradients = {GRADIENT + name: w.grad.clone() for name, w in sae.named_parameters()}
    gradients[GRADIENT + "W_enc"] = gradients.pop(GRADIENT + "W_enc_rows").t()
    return {**found, **gradients}


def gradients(module: nn.Module, names: dict[str, str], loss: Tensor, like: Tensors) -> Tensors:
    """Return the gradients of their loss, transposed to match `like`."""
    module.zero_grad()
    loss.backward()
    found = {}
    for ours, theirs in names.items():
        held, key = module.get_parameter(theirs), GRADIENT + ours
        grad = torch.zeros_like(held) if held.grad is None else held.grad.clone()
        found[key] = grad if grad.shape == like[key].shape else grad.t()
    return found


def inferred(sae: Any, p: Problem) -> Tensors:
    """Return fastsae's code and reconstruction in eval mode."""
    sae.eval()
    with torch.no_grad():
        return {"code": sae.encode(p.x), "reconstruction": sae(p.x)}


def inference(sae: Any, p: Problem, module: Any, mode: str = "inference") -> Comparison:
    """Compare code and reconstruction with a module that has encode and decode."""
    with torch.no_grad():
        code = module.encode(p.x)
        theirs = {"code": code, "reconstruction": module.decode(code)}
    return Comparison(mode, inferred(sae, p), theirs)


def across(gradient: Tensor, W_dec: Tensor) -> Tensor:
    """Return the gradient minus its component along each row of W_dec, which have norm 1."""
    return gradient - (gradient * W_dec).sum(1, keepdim=True) * W_dec


def double(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)


def mode_of(dead: int) -> str:
    return f"training, {dead} dead" if dead else "training"


def jumprelu(p: Problem) -> tuple[Any, Tensors, Tensors]:
    """Return fastsae's module, what a step gave (gradients of theta itself), and their weights."""
    sae = make(JumpReLUSAE, p, coefficient=COEFFICIENT)
    mine, key = trained(sae, p), GRADIENT + "log_threshold"
    theta = sae.threshold.detach()
    mine[GRADIENT + "threshold"] = mine.pop(key) / theta
    return sae, mine, p.weights | {"threshold": theta}


def nested(sae: Any, p: Problem, dead: Tensor | None) -> Tensors:
    """Return (g + 1) times what a step of fastsae gives, minus the term |x - b_dec|^2."""
    mine, e = trained(sae, p, dead), p.x - p.weights["b_dec"]
    for name in ("loss", *(key for key in mine if key.startswith(GRADIENT))):
        mine[name] = mine[name] * (len(GROUPS) + 1)
    mine["loss"] = mine["loss"] - e.square().sum() / p.V
    mine[GRADIENT + "b_dec"] += 2 * e.sum(0) / p.V
    return mine
