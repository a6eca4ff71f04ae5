"""One training step of an SAE in plain torch: gradients as tensors, then Adam or Adam-mini."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsae.reference.decode import group_by_latent, sparse_weight_grad
from fastsae.types import LatentGradients, SparseActs, StepTensors


def sparse_adam_step_(
    parameters: StepTensors,
    exp_avg: StepTensors,
    exp_avg_sq: StepTensors,
    acts: SparseActs,
    grad_values: Tensor,
    x: Tensor,
    grad_output: Tensor,
    *,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    clip_grad_norm: float | None = None,
    unit_norm: bool = True,
    extra_grads: LatentGradients | None = None,
) -> None:
    """See `fastsae.ops.sparse_adam_step_`."""
    W_enc, W_dec, _, b_dec = parameters
    lists = group_by_latent(acts)
    active = torch.where(acts.values != 0, grad_values, 0)
    g_dec, _ = sparse_weight_grad(acts.values, lists, grad_output)
    g_enc, g_b = sparse_weight_grad(active, lists, x - b_dec)
    if extra_grads is not None:
        latents = extra_grads.latents.long()
        g_enc = g_enc.index_add(0, latents, extra_grads.W_enc)
        g_dec = g_dec.index_add(0, latents, extra_grads.W_dec)
        g_b = g_b.index_add(0, latents, extra_grads.b_enc)
    g_b_dec = grad_output.sum(0) - g_b @ W_enc
    squared = W_dec.square().sum(1, keepdim=True)
    along = (g_dec * W_dec).sum(1, keepdim=True)
    g_dec = g_dec - torch.where(squared > 0, along / squared, 0) * W_dec
    gradients = StepTensors(g_enc, g_dec, g_b, g_b_dec)
    if clip_grad_norm is not None:
        norm = torch.stack([g.norm() for g in gradients]).norm()
        factor = (clip_grad_norm / (norm + 1e-6)).clamp(max=1)
        gradients = StepTensors(*(g * factor for g in gradients))
    step_size = lr / (1 - betas[0] ** step)
    correction = math.sqrt(1 - betas[1] ** step)
    for p, m, v, g in zip(parameters, exp_avg, exp_avg_sq, gradients, strict=True):
        m.lerp_(g, 1 - betas[0])
        squares = g.square()
        if v.ndim < p.ndim:
            squares = squares.sum(1) / max(p.shape[1], 1)
        v.mul_(betas[1]).add_(squares, alpha=1 - betas[1])
        root = v.sqrt() / correction + eps
        p.sub_(step_size * m / (root.unsqueeze(1) if v.ndim < p.ndim else root))
    if unit_norm:
        norm = W_dec.norm(dim=1, keepdim=True)
        W_dec.div_(torch.where(norm > 0, norm, 1))
