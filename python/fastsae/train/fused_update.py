"""The update without gradients of matrices: everything inside `ops.sparse_adam_step_`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn import SAE, SAEOutput, StepContext
from fastsae.nn.objective import dead_rows, total_loss
from fastsae.train.adam_mini import squares_like
from fastsae.types import LatentGradients, SparseActs, StepTensors

if TYPE_CHECKING:
    from fastsae.train.config import TrainConfig

PARAMETERS = ("W_enc_rows", "W_dec", "b_enc", "b_dec")


class FusedUpdate:
    """Adam or Adam-mini, latent by latent; see `train.update.why_not_fused` for where it applies.

    Args:
        sae: moved in place.
        config: optimizer, betas, eps and clip_grad_norm.
    """

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        self.sae, self.config = sae, config
        self.count = 0
        self.exp_avg = {name: torch.zeros_like(getattr(sae, name)) for name in PARAMETERS}
        zeros = squares_like if config.optimizer == "adam_mini" else torch.zeros_like
        self.exp_avg_sq = {name: zeros(getattr(sae, name)) for name in PARAMETERS}

    def step(self, batch: Tensor, context: StepContext, lr: float) -> SAEOutput:
        """See `Update.step`."""
        sae, cfg = self.sae, self.config
        with torch.no_grad():
            code = sae.encode_for_training(batch, context)
            x_hat = sae.decode(code)
            dead = dead_rows(sae, context.dead)
        values, x_hat = code.values.requires_grad_(), x_hat.requires_grad_()
        acts = SparseActs(values, code.indices, code.offsets, code.d_sae)
        leaves: list[Tensor] = []
        if dead is not None:
            dead = dead.as_leaves()
            leaves = [dead.W_enc, dead.W_dec, dead.b_enc]
        penalty = sae.sparsity_loss(acts, context)
        out = total_loss(sae, batch, batch, acts, x_hat, penalty, dead)
        inputs = [x_hat, *leaves] if penalty is None else [x_hat, *leaves, values]
        grads = torch.autograd.grad(out.loss, inputs)
        out.acts, out.reconstruction = acts.detach(), x_hat.detach()
        grad_values = ops.sparse_decode_values_grad(grads[0], out.acts, sae.W_dec.detach())
        if penalty is not None:
            grad_values = grad_values + grads[-1]
        self.count += 1
        ops.sparse_adam_step_(
            StepTensors(*(getattr(sae, name).detach() for name in PARAMETERS)),
            StepTensors(**_named(self.exp_avg)),
            StepTensors(**_named(self.exp_avg_sq)),
            out.acts,
            grad_values,
            batch,
            grads[0],
            lr=lr,
            step=self.count,
            betas=cfg.betas,
            eps=cfg.eps,
            clip_grad_norm=cfg.clip_grad_norm,
            extra_grads=_extra(dead.latents, grads[1:4]) if dead is not None else None,
            compute_dtype=context.compute_dtype,
        )
        return out

    def state_dict(self) -> dict[str, Any]:
        """See `Update.state_dict`."""
        return {"count": self.count, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Update.load_state_dict`."""
        self.count = state["count"]
        for own, saved in ((self.exp_avg, "exp_avg"), (self.exp_avg_sq, "exp_avg_sq")):
            for name, tensor in own.items():
                tensor.copy_(state[saved][name])


def _named(averages: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removesuffix("_rows"): t for name, t in averages.items()}


def _extra(latents: Tensor | None, grads: tuple[Tensor, ...]) -> LatentGradients:
    assert latents is not None
    return LatentGradients(latents.int(), *grads)
