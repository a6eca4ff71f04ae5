"""The feature-major update: one training step of an SAE without a gradient tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _autograd, _check, _dense, _flops, _vmap
from fastsae.types import LatentGradients, SparseActs, StepTensors

_OP = "sparse_adam_step_"


@torch.no_grad()
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
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Do one Adam step on all four parameters of an SAE, in place, latent by latent.

        g_dec[f] = sum over the entries of f of value * grad_output[row]
        g_enc[f] = sum of g (x - b_dec)[row],   g_b_enc[f] = sum of g,   g = grad_values
        g_b_dec  = sum of grad_output's rows - W_enc^T g_b_enc
        g_dec[f] -= (g_dec[f] . d) d,   d = W_dec[f] / |W_dec[f]|

    then clipping, Adam with dense gradients (rows without entries take a step with gradient 0), and
    unit rows of W_dec.

    Args:
        parameters: `StepTensors(W_enc [d_sae, d_in], W_dec [d_sae, d_in], b_enc [d_sae], b_dec
            [d_in])`, float32 or float64, contiguous; changed in place, like the next two.
        exp_avg: Adam's average of the gradient, tensors like `parameters`.
        exp_avg_sq: Adam's average of its square. With `W_enc` and `W_dec` of shape [d_sae], one
            number for each row: the average of the mean square of the row's gradient, which makes
            it Adam-mini with a block per latent.
        acts: the sparse code of the n tokens of x, values in the dtype of the parameters.
        grad_values: the gradient of the loss in `acts.values`, same shape.
        x: [n, d_in], what was encoded (b_dec not subtracted).
        grad_output: [n, d_in], the gradient of the loss in the reconstruction.
        lr: learning rate.
        step: number of this step, from 1, for Adam's bias corrections.
        betas: decay rates of the averages.
        eps: added to the denominator, outside the root, as torch.optim.Adam does.
        clip_grad_norm: largest norm of the whole gradient; None does not clip. Costs a second pass
            over the entries, no memory.
        unit_norm: scale rows of W_dec to norm 1 at the end; rows of zeros stay.
        extra_grads: gradients of some latents from another loss, added to the above.
        compute_dtype: `torch.bfloat16` rounds the rows of grad_output and of x - b_dec, of which
            g_dec and g_enc are sums, where that is faster (CUDA, float32 parameters); sums and
            everything else keep their precision.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: a shape, `step` or `compute_dtype` is not as stated.
        RuntimeError: a tensor is not contiguous or has a forward-mode tangent; vmap; an index is
            out of range or a latent of `extra_grads` comes twice (CPU; on CUDA such an entry is
            ignored, and the last such row counts).

    Gradients:
        None: it runs without a graph, as an optimizer does.

    Numerics:
        Equal to `loss.backward(); remove parallel; clip_grad_norm_; torch.optim.Adam.step();
        normalize`: to 1e-12 in float64; in float32 the parameters agree to 2e-6 after one step of
        lr 1e-3. Bitwise the same for every number of threads, but where more than a quarter of all
        entries are active, whose gradients `torch.mm` adds up on a CPU. An entry whose value is
        exactly 0 is ignored. Autocast changes nothing.

    Cost:
        Reads and writes every parameter and both averages once, 24 bytes for each float32
        parameter (16 with one number for each row); two rows of width d_in per entry from cache.

    Source:
        Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1; Zhang et al. 2024, "Adam-mini"
        (arXiv 2406.16793), algorithm 1; the projection and the unit rows as in Bricken et al. 2023,
        "Towards monosemanticity", appendix.
    """
    W_enc = parameters.W_enc
    if W_enc.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{_OP}: expected W_enc to be float32 or float64, got {W_enc.dtype}")
    if W_enc.ndim != 2:
        raise ValueError(f"{_OP}: expected W_enc to be [d_sae, d_in], got {[*W_enc.shape]}")
    d_sae, d_in = W_enc.shape
    shapes = ((d_sae, d_in), (d_sae, d_in), (d_sae,), (d_in,))
    meanings = ("[d_sae, d_in]", "[d_sae, d_in]", "[d_sae]", "[d_in]")
    by_rows = exp_avg_sq.W_enc.ndim == 1
    for group, tensors in (("", parameters), ("exp_avg.", exp_avg), ("exp_avg_sq.", exp_avg_sq)):
        for name, tensor, size, meaning in zip(
            StepTensors._fields, tensors, shapes, meanings, strict=True
        ):
            if by_rows and tensors is exp_avg_sq and len(size) == 2:
                size, meaning = shapes[2], meanings[2]
            _check.shape(_OP, group + name, tensor, size, meaning)
            _check.same(_OP, group + name, tensor, "W_enc", W_enc)
    if acts.d_sae != d_sae:
        raise ValueError(f"{_OP}: expected acts over d_sae = {d_sae} latents, got {acts.d_sae}")
    _check.same(_OP, "acts.values", acts.values, "W_enc", W_enc)
    _check.shape(_OP, "grad_values", grad_values, tuple(acts.values.shape), "like acts.values")
    _check.same(_OP, "grad_values", grad_values, "W_enc", W_enc)
    for name, tensor in (("x", x), ("grad_output", grad_output)):
        _check.shape(_OP, name, tensor, (acts.n, d_in), "[n, d_in]")
        _check.same(_OP, name, tensor, "W_enc", W_enc)
    if step < 1:
        raise ValueError(f"{_OP}: expected step >= 1, got {step}")
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise ValueError(f"{_OP}: expected clip_grad_norm > 0 or None, got {clip_grad_norm}")
    _autograd.no_tangents(_OP, *parameters, acts.values, grad_values, x, grad_output)
    bf16_rows = _check.rounds_to_bf16(_OP, compute_dtype, "W_enc", W_enc)
    if _fits(extra_grads, W_enc) and _dense.pays(
        "sparse_weight_grad", _dense.counted(acts), acts.n, d_sae, d_in
    ):
        active = torch.where(acts.values != 0, grad_values, 0)
        pairs = [(active, x - parameters.b_dec), (acts.values, grad_output)]
        found = _dense.weight_grads(acts.indices, acts.offsets, d_sae, pairs)
        if found is not None:
            extra_grads = _total(found, extra_grads)
            acts, grad_values = _empty(acts), grad_values.new_empty(0)
    torch.ops.fastsae.sparse_adam_step_(
        *parameters,
        *exp_avg,
        *exp_avg_sq,
        acts.values,
        grad_values,
        acts.indices,
        acts.offsets,
        x,
        grad_output,
        *(extra_grads or (None, None, None, None)),
        lr,
        *betas,
        eps,
        step,
        math.inf if clip_grad_norm is None else clip_grad_norm,
        unit_norm,
        bf16_rows,
    )


def _fits(extra: LatentGradients | None, W_enc: Tensor) -> bool:
    """Return whether gradients of other latents are what they should be; if not, the op says so."""
    if extra is None:
        return True
    count, (d_sae, d_in) = extra.latents.numel(), W_enc.shape
    shapes = [(count,), (count, d_in), (count, d_in), (count,)]
    if [tuple(t.shape) for t in extra] != shapes or extra.latents.dtype != torch.int32:
        return False
    if any(t.dtype != W_enc.dtype or t.device != W_enc.device for t in extra[1:]):
        return False
    inside = bool(((extra.latents >= 0) & (extra.latents < d_sae)).all())
    return inside and len(extra.latents.unique()) == count


def _total(found: list[tuple[Tensor, Tensor]], extra: LatentGradients | None) -> LatentGradients:
    """Return gradients of all latents, with those of some of them added."""
    (g_enc, g_b), (g_dec, _) = found
    if extra is not None:
        latents = extra.latents.long()
        for total, more in ((g_enc, extra.W_enc), (g_dec, extra.W_dec), (g_b, extra.b_enc)):
            total.index_add_(0, latents, more)
    every = torch.arange(g_b.shape[0], dtype=torch.int32, device=g_b.device)
    return LatentGradients(every, g_enc, g_dec, g_b)


def _empty(acts: SparseActs) -> SparseActs:
    """Return the code of as many tokens without an entry."""
    offsets = torch.zeros(acts.n + 1, dtype=torch.int32, device=acts.values.device)
    return SparseActs(acts.values.new_empty(0), acts.indices.new_empty(0), offsets, acts.d_sae)


@fake(_OP)
def _fake(*_: object) -> None:
    return None


@fallback(_OP)
def _plain(*arguments: object) -> None:
    tensors, (lr, beta1, beta2, eps, step, max_norm, unit_norm) = arguments[:22], arguments[22:29]
    parameters, exp_avg, exp_avg_sq = (StepTensors(*tensors[i : i + 4]) for i in (0, 4, 8))  # type: ignore[arg-type]
    values, grad_values, indices, offsets, x, grad_output, *rows = tensors[12:]
    reference.sparse_adam_step_(
        parameters,
        exp_avg,
        exp_avg_sq,
        SparseActs(values, indices, offsets, parameters.W_enc.shape[0]),  # type: ignore[arg-type]
        grad_values,  # type: ignore[arg-type]
        x,  # type: ignore[arg-type]
        grad_output,  # type: ignore[arg-type]
        lr=lr,  # type: ignore[arg-type]
        step=step,  # type: ignore[arg-type]
        betas=(beta1, beta2),  # type: ignore[arg-type]
        eps=eps,  # type: ignore[arg-type]
        clip_grad_norm=None if max_norm == math.inf else max_norm,  # type: ignore[arg-type]
        unit_norm=unit_norm,  # type: ignore[arg-type]
        extra_grads=None if rows[0] is None else LatentGradients(*rows),  # type: ignore[arg-type]
    )


_vmap.refuse(_OP)
_flops.register(_OP, _flops.adam_step)
