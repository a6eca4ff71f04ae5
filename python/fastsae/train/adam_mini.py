"""Adam-mini: Adam whose second average is one number for each row of a matrix.

Source: Zhang et al. 2024, "Adam-mini: use fewer learning rates to gain more" (arXiv 2406.16793).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastsae.train.optimizer import TensorwiseOptimizer


class AdamMini(TensorwiseOptimizer):
    """Adam with one step size for each row of a matrix: a block of Adam-mini per latent.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) mean over the row of g^2      (g^2 for vectors)
        p <- p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    Half of Adam's state, and 16 instead of 24 bytes read and written for each float32 parameter.
    Tensors of more than two dimensions are matrices with their first one as rows.

    Args:
        params: tensors, or groups of them with options of their own.
        lr: learning rate.
        betas: decay rates of the averages.
        eps: added to the denominator, outside the root.

    Raises:
        ValueError: lr or eps is not positive and finite, or a beta is not in [0, 1).

    Numerics: state in the dtype of the parameter. `ops.sparse_adam_step_` does the same step.
    Source: Zhang et al. 2024, algorithm 1, with rows as blocks.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps)):
            if not 0 < value < math.inf:
                raise ValueError(f"AdamMini: expected 0 < {name} < inf, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdamMini: expected two betas in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = squares_like(p)
        return state

    def _update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self._state(p), group["betas"]
        state["step"] += 1
        step = int(state["step"])
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(g, 1 - beta1)
        squares = g.square() if p.ndim < 2 else g.flatten(1).square().mean(1)
        v.mul_(beta2).add_(squares, alpha=1 - beta2)
        root = v.sqrt() / math.sqrt(1 - beta2**step) + group["eps"]
        rows = root if p.ndim < 2 else root.reshape(-1, *[1] * (p.ndim - 1))
        p.addcdiv_(m, rows, value=-group["lr"] / (1 - beta1**step))


def squares_like(p: Tensor) -> Tensor:
    """Return zeros for the average of squares of `p`: one number for each row of a matrix."""
    return torch.zeros_like(p if p.ndim < 2 else p.detach().flatten(1)[:, 0])
