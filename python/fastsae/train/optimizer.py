"""What the project's own optimizers share: a step over all parameters, and state on demand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class TensorwiseOptimizer(torch.optim.Optimizer):
    """An optimizer that updates one parameter after the other; a subclass says how."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return what `closure` returns, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def prepare(self) -> None:
        """Give every parameter that has no state the one from before its first gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                self._state(p)

    @abstractmethod
    def _state(self, p: Tensor) -> dict[str, Tensor]:
        """Return the state of `p`, made here when there is none."""

    @abstractmethod
    def _update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        """Move `p` by its gradient `g`, with the options of its group."""
