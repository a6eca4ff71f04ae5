"""What one step does to the parameters, by one of two ways that agree.

fused:     gradients of the code, the reconstruction and dead rows; everything else inside
           `ops.sparse_adam_step_`, which forms no gradient of a matrix
autograd:  backward, remove the parallel decoder gradient, clip, optimizer, unit decoder rows;
           any loss, any optimizer, any device
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae import _library, ops
from fastsae.nn import SAE, SAEOutput
from fastsae.nn.auxk import LatentRows
from fastsae.train.config import TrainConfig
from fastsae.train.sgd_sai import SGDSaI
from fastsae.types import LatentGradients, SparseActs, StepTensors


def make_optimizer(sae: SAE, config: TrainConfig, lr: float) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names, over all parameters of `sae`."""
    if config.optimizer == "sgd_sai":
        return SGDSaI(sae.parameters(), lr)
    return torch.optim.Adam(
        sae.parameters(),
        lr=lr,
        betas=config.betas,
        eps=config.eps,
        fused=sae.W_enc.device.type in ("cpu", "cuda"),
    )


def is_fused(sae: SAE, optimizer: torch.optim.Optimizer, config: TrainConfig) -> bool:
    """Return whether this run takes the fused update.

    It needs a module that supports it, in float32 or float64 on a device that has the kernel,
    feature-major and with nothing frozen, and plain Adam.
    """
    return (
        config.update == "fused"
        and sae.feature_major_update
        and _library.has_kernel("sparse_adam_step_", sae.W_enc.device.type)
        and sae.W_enc.dtype in (torch.float32, torch.float64)
        and type(optimizer) is torch.optim.Adam
        and all(p.requires_grad for p in sae.parameters())
        and sae.W_enc.t().is_contiguous()
        and sae.W_dec.is_contiguous()
    )


def compute_dtype(sae: SAE, config: TrainConfig) -> torch.dtype | None:
    """Return what the encoder's product rounds its factors to; None: nothing is rounded."""
    if config.compute_dtype == "float32" or sae.W_enc.dtype != torch.float32:
        return None
    wanted = config.compute_dtype == "bfloat16" or _multiplies_bf16(sae.W_enc.device)
    return torch.bfloat16 if wanted else None


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _library.has_bf16()


def autograd_update(
    sae: SAE,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    dead: Tensor | None,
    config: TrainConfig,
) -> SAEOutput:
    """Do one update with the batch `x: [n, columns]`; the learning rate is the optimizer's."""
    out = sae.batch_loss(x, dead)
    out.loss.backward()
    sae.remove_parallel_grad_()
    if config.clip_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), config.clip_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    sae.normalize_decoder_()
    return out


def fused_update(
    sae: SAE,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    dead: Tensor | None,
    config: TrainConfig,
    step: int,
) -> SAEOutput:
    """Do the same without a gradient of a matrix; averages are kept in the optimizer's state.

    `step` is the number of this update, from 1: on a GPU, asking the optimizer would wait for it.
    """
    sae.requires_grad_(False)
    try:
        code = sae.encode_for_loss(x)
        values = code.values.requires_grad_()
        acts = SparseActs(values, code.indices, code.offsets, code.d_sae)
        rows = sae.dead_rows(dead)
        leaves = [] if rows is None else [t.requires_grad_() for t in rows[1:]]
        out = sae.loss_of(x, x, acts, rows)
        grads = torch.autograd.grad(out.loss, [values, out.reconstruction, *leaves])
    finally:
        sae.requires_grad_(True)
    out.acts = acts.detach()
    group = optimizer.param_groups[0]
    states = [optimizer.state[p] for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)]
    torch._foreach_add_([state["step"] for state in states], 1)
    ops.sparse_adam_step_(
        _tensors([sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec]),
        _tensors([state["exp_avg"] for state in states]),
        _tensors([state["exp_avg_sq"] for state in states]),
        out.acts,
        grads[0],
        x,
        grads[1],
        lr=group["lr"],
        step=step,
        betas=group["betas"],
        eps=group["eps"],
        clip_grad_norm=config.clip_grad_norm,
        extra_grads=None if rows is None else _added(rows, grads[2:]),
        compute_dtype=sae.compute_dtype,
    )
    return out


def _tensors(four: list[Tensor]) -> StepTensors:
    """Return W_enc, W_dec, b_enc, b_dec as the ops take them: W_enc feature-major."""
    W_enc, *rest = (t.detach() for t in four)
    return StepTensors(W_enc.t(), *rest)


def _added(rows: LatentRows, grads: tuple[Tensor, ...]) -> LatentGradients:
    return LatentGradients(rows.latents.int(), *grads)
