"""The update of any module: backward, and a torch optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsae.nn import SAE, SAEOutput, StepContext
from fastsae.train.adam_mini import AdamMini
from fastsae.train.optimizer import TensorwiseOptimizer
from fastsae.train.sgd_sai import SGDSaI

if TYPE_CHECKING:
    from fastsae.train.config import TrainConfig


class AutogradUpdate:
    """backward, no gradient along decoder rows, clipping, the optimizer, unit decoder rows.

    Args:
        sae: moved in place; frozen parameters stay.
        config: the optimizer and its settings, and clip_grad_norm.
    """

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        self.sae, self.config = sae, config
        self.parameters = {name: p for name, p in sae.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(list(self.parameters.values()), config)

    def step(self, batch: Tensor, context: StepContext, lr: float) -> SAEOutput:
        """See `Update.step`."""
        sae, optimizer = self.sae, self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()  # whatever somebody else's backward has left
        out = sae.training_loss(batch, context)
        out.loss.backward()
        moves_decoder = sae.trains_decoder
        if moves_decoder:
            sae.remove_parallel_grad_()
        if self.config.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), self.config.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if moves_decoder:
            sae.normalize_decoder_()
        out.acts, out.reconstruction = out.acts.detach(), out.reconstruction.detach()
        return out

    def state_dict(self) -> dict[str, Any]:
        """See `Update.state_dict`."""
        return {name: dict(self.optimizer.state[p]) for name, p in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Update.load_state_dict`."""
        for name, p in self.parameters.items():
            for key, tensor in self.optimizer.state[p].items():
                tensor.copy_(state[name][key])


def make_optimizer(
    parameters: list[torch.nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """Return the optimizer of a run, with its state before the first step: a checkpoint can be
    loaded into it."""
    optimizer = _optimizer(parameters, config)
    _make_state(optimizer)
    return optimizer


def _optimizer(parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd_sai":
        return SGDSaI(parameters)
    if config.optimizer == "adam_mini":
        return AdamMini(parameters, betas=config.betas, eps=config.eps)
    return torch.optim.Adam(
        parameters,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.device.type in ("cpu", "cuda") for p in parameters),
    )


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, TensorwiseOptimizer):
        optimizer.prepare()
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            device = p.device if group["fused"] else "cpu"
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
