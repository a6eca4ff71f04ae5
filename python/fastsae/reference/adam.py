"""One training step of an SAE in plain torch: gradients as tensors, then Adam or Adam-mini."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsae.reference.decode import group_by_latent, sparse_weight_grad
from fastsae.reference.dither import dither, round_stochastically
from fastsae.types import LatentGradients, MoreGradients, SparseActs, StepTensors


def sparse_adam_step_(
    parameters: StepTensors,
    exp_avg: StepTensors,
    exp_avg_sq: StepTensors,
    acts: SparseActs,
    grad_values: Tensor | SparseActs,
    x: Tensor,
    grad_output: Tensor,
    *,
    lr: float | Tensor,
    step: int | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    clip_grad_norm: float | None = None,
    unit_norm: bool = True,
    extra_grads: LatentGradients | None = None,
    more_grads: MoreGradients | None = None,
    apply_b_dec_to_input: bool = True,
    other_squared: Tensor | None = None,
    copies: tuple[Tensor | None, Tensor | None] = (None, None),
    rounding_seed: int = 0,
) -> Tensor | None:
    """See `fastsae.ops.sparse_adam_step_`."""
    lr, step = float(lr), int(step)
    if step < 1:
        return None if other_squared is None else torch.ones_like(other_squared)
    W_enc, W_dec, _, b_dec = parameters
    lists = group_by_latent(acts)
    g_dec, _ = sparse_weight_grad(acts.values, lists, grad_output)
    centered = x - b_dec if apply_b_dec_to_input else x
    if isinstance(grad_values, SparseActs):
        g_enc, g_b = sparse_weight_grad(grad_values.values, group_by_latent(grad_values), centered)
    else:
        active = torch.where(acts.values != 0, grad_values, 0)
        g_enc, g_b = sparse_weight_grad(active, lists, centered)
    if extra_grads is not None:
        latents = extra_grads.latents.long()
        g_enc = g_enc.index_add(0, latents, extra_grads.W_enc)
        g_dec = g_dec.index_add(0, latents, extra_grads.W_dec)
        g_b = g_b.index_add(0, latents, extra_grads.b_enc)
    more = more_grads or MoreGradients()
    g_b_dec = grad_output.sum(0) if more.b_dec is None else more.b_dec
    if apply_b_dec_to_input:
        g_b_dec = g_b_dec - g_b @ W_enc
    g_enc = g_enc if more.W_enc is None else g_enc + more.W_enc
    g_dec = g_dec if more.W_dec is None else g_dec + more.W_dec
    g_b = g_b if more.b_enc is None else g_b + more.b_enc
    squared = W_dec.square().sum(1, keepdim=True)
    along = (g_dec * W_dec).sum(1, keepdim=True)
    g_dec = g_dec - torch.where(squared > 0, along / squared, 0) * W_dec
    gradients = StepTensors(g_enc, g_dec, g_b, g_b_dec)
    factor = torch.ones((), dtype=torch.float64, device=W_enc.device)
    if clip_grad_norm is not None:
        squares = torch.stack([g.double().square().sum() for g in gradients]).sum()
        norm = (squares if other_squared is None else squares + other_squared).sqrt()
        factor = (clip_grad_norm / (norm + 1e-6)).clamp(max=1)
        gradients = StepTensors(*(g * factor for g in gradients))
    step_size = lr / (1 - betas[0] ** step)
    correction = math.sqrt(1 - betas[1] ** step)
    states = zip(parameters, exp_avg, exp_avg_sq, gradients, strict=True)
    for place, (p, stored_m, stored_v, g) in enumerate(states):
        m, v = stored_m.to(p.dtype), stored_v.to(p.dtype)
        m.lerp_(g, 1 - betas[0])
        squares = g.square()
        if v.ndim < p.ndim:
            squares = squares.sum(1) / max(p.shape[1], 1)
        v.mul_(betas[1]).add_(squares, alpha=1 - betas[1])
        root = v.sqrt() / correction + eps
        p.sub_(step_size * m / (root.unsqueeze(1) if v.ndim < p.ndim else root))
        if m is not stored_m:
            noise = dither(p.shape[0], p.shape[1], rounding_seed, step, place).to(p.device)
            stored_m.copy_(round_stochastically(m, noise & 0xFFFF))
            stored_v.copy_(round_stochastically(v, noise >> 16))
    if unit_norm:
        norm = W_dec.norm(dim=1, keepdim=True)
        W_dec.div_(torch.where(norm > 0, norm, 1))
    for copy, W in zip(copies, parameters, strict=False):
        if copy is not None:
            copy.copy_(W)
    return None if other_squared is None else factor
