"""sparsify's optimizers with a step in one pass; see `dropin.sparsify`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fastsae.interop.dropin import _updates as updates
from fastsae.interop.dropin._peers import Peer

PEER = Peer("eai-sparsify", "1.3.3")
training = PEER.module("sparsify.trainer", "Trainer", "ScheduleFreeWrapper", "SignSGD")


class _Signum(training.ScheduleFreeWrapper):  # type: ignore[misc,name-defined]
    """schedulefree's wrapper of sparsify's SignSGD, which makes its step in one pass."""

    def step(self, closure: Any = None) -> Any:
        tensors = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        plain = all(p.is_contiguous() and p.grad.is_contiguous() for p in tensors)
        if closure is not None or not self.train_mode or self.weight_decay_at_y or not plain:
            return super().step(closure)
        for group in self.param_groups:
            self._step_of(group)
        return None

    def _step_of(self, group: Any) -> None:
        count, lr = group.get("k", 0), group["lr"]
        group["lr_max"] = max(lr * group.get("d", 1.0), group.get("lr_max", 0))
        weight = (count + 1) ** self.r * group["lr_max"] ** self.weight_lr_power
        group["weight_sum"] = group.get("weight_sum", 0.0) + weight
        group["k"], average = count + 1, weight / group["weight_sum"]
        for p in group["params"]:
            if p.grad is not None:
                z = self.state[p].setdefault("z", None)
                if z is None:
                    z = self.state[p]["z"] = p.detach().clone()
                updates.signum_(
                    p.detach(), z, p.grad, lr=lr, momentum=self.momentum, average=average
                )


@contextlib.contextmanager
def optimizers_in_one_pass(optimizers: list[Any]) -> Iterator[None]:
    """Let the signum and Adam of a trainer step in one pass; `Trainer.fit` does it by itself.

    torch's Adam becomes fused, and schedulefree's wrapper of SignSGD is computed block by block.
    Others stay as they are.
    """
    changed: list[Callable[[], None]] = []
    for optimizer in optimizers:
        if type(optimizer) is torch.optim.Adam:
            for group in optimizer.param_groups:
                changed.append(partial(group.__setitem__, "fused", group["fused"]))
                group["fused"] = group["fused"] or group["foreach"] is None
        elif type(optimizer) is training.ScheduleFreeWrapper and _is_signum(optimizer):
            changed.append(partial(setattr, optimizer, "__class__", type(optimizer)))
            optimizer.__class__ = _Signum
    try:
        yield
    finally:
        for restore in changed:
            restore()


def _is_signum(wrapper: Any) -> bool:
    return type(wrapper.base) is training.SignSGD
