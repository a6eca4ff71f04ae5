"""SGD-SaI: momentum SGD whose learning rate is scaled once per tensor, at its first gradient.

Source: Xu et al. 2024, "No more Adam: learning rate scaling at initialization is all you need"
(arXiv 2412.11768).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastsae.nn.loss import upcast
from fastsae.train.optimizer import TensorwiseOptimizer


class SGDSaI(TensorwiseOptimizer):
    """SGD with momentum, decoupled weight decay and one constant scale per tensor.

        gsnr = |g| / (std(g) + eps)            once, at the first gradient that is not 0
        m    = g at that gradient,  then  m <- momentum m + (1 - momentum) g
        p   <- (1 - lr weight_decay) p - lr gsnr m

    What it saves is memory: one number per weight, half of Adam's state, in the process and in
    checkpoints. Besides the gradients that autograd holds, the peak of a `Trainer` is that of
    Adam's fused update, which forms none, and below that of Adam with autograd. What it lacks is
    Adam's second moment. A gradient g with mean near 0 has gsnr = sqrt(numel), whatever its scale
    and however few of its entries are not 0, so W_enc and W_dec get the same scale, and within each
    a latent that fires rarely moves as little as in plain SGD. Expect a worse fvu than Adam's after
    the same number of steps; take it where Adam's state does not fit.

    A gradient with a dominant mean, such as that of b_dec before the data are centered, has a small
    std for its size and gets a hundredfold rate: 2,770 instead of 28 with mean 1, std 0.01 and 768
    entries. Tensors of one dimension therefore use gsnr = 1, unless `scale_biases`. So does a
    tensor of one number, which has no std.

    Each tensor is measured when its own first gradient comes, so parameters may get theirs late,
    such as those that only an auxiliary loss reaches. `state_dict` holds `momentum`, a tensor like
    the parameter, and `gsnr`, a float64 number on the CPU that is 0 until it is measured.

    Args:
        params: tensors, or groups of them with options of their own.
        lr: learning rate before the scale.
        momentum: rate at which m forgets, in [0, 1).
        weight_decay: share of a weight, times lr, that a step takes away.
        eps: added to the std.
        scale_biases: whether tensors of one dimension are scaled like matrices.

    Raises:
        ValueError: lr or eps is not positive and finite, momentum not in [0, 1), or weight_decay
            negative or not finite.

    Numerics: gsnr in float32 (float64 for float64), with the unbiased std; loading does not round
    it to the dtype of the parameter, which is that of m.
    Cost: 4 bytes of state per float32 weight. The first step waits for the device once per tensor.
    Source: Xu et al. 2024. The exclusion of biases and of gradients of zeros is our addition.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        scale_biases: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps)):
            if not 0 < value < math.inf:
                raise ValueError(f"SGDSaI: expected 0 < {name} < inf, got {value}")
        if not 0 <= momentum < 1:
            raise ValueError(f"SGDSaI: expected 0 <= momentum < 1, got {momentum}")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"SGDSaI: expected 0 <= weight_decay < inf, got {weight_decay}")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "eps": eps,
                "scale_biases": scale_biases,
            },
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        # torch casts tensors to the dtype and device of the parameter, and leaves numbers alone.
        exact = {i: {**s, "gsnr": float(s["gsnr"])} for i, s in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": exact})
        for state in self.state.values():
            state["gsnr"] = torch.tensor(state["gsnr"], dtype=torch.float64)

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        """Return the state of `p`, made here when there is none."""
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
            state["gsnr"] = torch.zeros((), dtype=torch.float64)
        return state

    def _update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self._state(p)
        m, scale = state["momentum"], state["gsnr"]
        if scale == 0:  # a gradient of zeros measures nothing
            m.copy_(g)
            scaled = p.numel() > 1 and (p.ndim > 1 or group["scale_biases"])
            scale.fill_(gsnr(g, group["eps"]) if scaled else float(g.any()))
        else:
            m.lerp_(g, 1 - group["momentum"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(m, alpha=-group["lr"] * scale.item())


def gsnr(g: Tensor, eps: float = 1e-8) -> float:
    """Return |g| / (std(g) + eps) over all entries of `g`, at least two."""
    g = upcast(g)
    return float(torch.linalg.vector_norm(g) / (g.std() + eps))
