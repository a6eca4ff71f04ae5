"""The feature-major update: one training step of an SAE without a gradient tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastsae import reference
from fastsae._library import fake, fallback
from fastsae.ops import _autograd, _check, _dense, _flops, _vmap
from fastsae.ops._matmul import where_active
from fastsae.types import LatentGradients, MoreGradients, SparseActs, StepTensors

_OP = "sparse_adam_step_"


@torch.no_grad()
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
    compute_dtype: torch.dtype | None = None,
    copies: tuple[Tensor | None, Tensor | None] = (None, None),
    rounding_seed: int = 0,
) -> Tensor | None:
    """Do one Adam step on all four parameters of an SAE, in place, latent by latent.

        g_dec[f] = sum over the entries of f of value * grad_output[row]
        g_enc[f] = sum of g (x - b_dec)[row],  g_b_enc[f] = sum of g,   g = grad_values
        g_b_dec  = sum of grad_output's rows - W_enc^T g_b_enc
        g_dec[f] -= (g_dec[f] . d) d,   d = W_dec[f] / |W_dec[f]|

    then clipping, Adam with dense gradients (rows without entries take a step with gradient 0), and
    unit rows of W_dec.

    Args:
        parameters: `StepTensors(W_enc [d_sae, d_in], W_dec [d_sae, d_out], b_enc [d_sae], b_dec
            [d_out])`, float32 or float64, contiguous; changed in place, like the next two.
        exp_avg: Adam's average of the gradient, tensors like `parameters`. With float32 parameters
            `W_enc` and `W_dec` of both averages may be bfloat16, rounded stochastically.
        exp_avg_sq: Adam's average of its square. With `W_enc` and `W_dec` of shape [d_sae], one
            number for each row: the average of the mean square of the row's gradient, which makes
            it Adam-mini with a block per latent.
        acts: the sparse code that the decoder got, of n rows, values in the dtype of the
            parameters.
        grad_values: the gradient of the loss in `acts.values`, same shape. Where the encoder's
            gradient is of other entries, a code of its own, over the rows of x.
        x: [n, d_in], what was encoded (b_dec not subtracted); one row for each of that code.
        grad_output: [n, d_out], the gradient of the loss in the reconstruction. Of a loss that
            decodes several times, the rows of all these under each other, and the same of `acts`.
        lr: learning rate; or a tensor [] float64 on the device, read when the step is done.
        step: number of this step, from 1, for Adam's bias corrections; or a tensor [] int64 on the
            device, read when the step is done. Where that is below 1, nothing is updated.
        betas: decay rates of the averages.
        eps: added to the denominator, outside the root, as torch.optim.Adam does.
        clip_grad_norm: largest norm of the whole gradient; None does not clip. Costs a second pass
            over the entries, no memory.
        unit_norm: scale rows of W_dec to norm 1 at the end; rows of zeros stay.
        extra_grads: gradients of some latents from another loss, added to the above; that of b_enc
            reaches b_dec through the encoder's input.
        more_grads: gradients of whole parameters from other parts of the loss.
        apply_b_dec_to_input: whether b_dec was subtracted from x, which takes d_out = d_in.
        other_squared: [] float64, the squared norm of the gradients of other parameters, which are
            clipped along with these.
        compute_dtype: `torch.bfloat16` rounds the rows of grad_output and of x - b_dec, of which
            g_dec and g_enc are sums, where that is faster (CUDA, float32 parameters); sums and
            everything else keep their precision.
        copies: [d_sae, d_in] and [d_sae, d_out] bfloat16, contiguous: get the new W_enc and W_dec,
            rounded to nearest, ties to even. None: no copy. Of float32 parameters alone.
        rounding_seed: of the random bits by which averages in bfloat16 are rounded.

    Returns:
        With `other_squared` the number [] float64 that clipping multiplied all gradients with, by
        which those other gradients are still to be multiplied; else None. It means nothing where
        nothing is updated.

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
        entries are active, whose gradients a matmul adds up on a CPU. An entry whose value is
        exactly 0 is ignored. Autocast changes nothing. Tensors `lr` and `step` give the same bits
        as numbers. Averages in bfloat16 are computed in float32, move the parameters, and are then
        rounded up or down such that their mean is what was computed. The random bits follow from
        `rounding_seed`, `step`, matrix, row and column alone: the same on every device.

    Cost:
        Reads and writes every parameter and both averages once, 24 bytes for each float32
        parameter (16 with one number for each row, or with averages in bfloat16); two rows of width
        d_in per entry from cache. A copy is 2 more bytes written for each parameter.

    Source:
        Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1; Zhang et al. 2024, "Adam-mini"
        (arXiv 2406.16793), algorithm 1; the projection and the unit rows as in Bricken et al. 2023,
        "Towards monosemanticity", appendix.
    """
    W_enc = parameters.W_enc
    more = more_grads or MoreGradients()
    own = grad_values if isinstance(grad_values, SparseActs) else None
    g: Tensor = grad_values.values if isinstance(grad_values, SparseActs) else grad_values
    _check_state(parameters, exp_avg, exp_avg_sq)
    _check_batch(parameters, acts, grad_values, x, grad_output)
    _check_more(parameters, more, other_squared)
    d_in, d_out = W_enc.shape[1], parameters.W_dec.shape[1]
    if apply_b_dec_to_input and d_in != d_out:
        raise ValueError(
            f"{_OP}: expected b_dec to be [d_in] with d_in = {d_in} where it is subtracted from x, "
            f"got [{d_out}]"
        )
    _check_number("lr", lr, torch.float64, W_enc)
    _check_number("step", step, torch.int64, W_enc)
    if not isinstance(step, Tensor) and step < 1:
        raise ValueError(f"{_OP}: expected step >= 1, got {step}")
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise ValueError(f"{_OP}: expected clip_grad_norm > 0 or None, got {clip_grad_norm}")
    _autograd.no_tangents(_OP, *parameters, acts.values, g, x, grad_output)
    for name, copy, W in zip(("W_enc", "W_dec"), copies, parameters, strict=False):
        _check_copy(name, copy, W)
    bf16_rows = _check.rounds_to_bf16(_OP, compute_dtype, "W_enc", W_enc)
    step_of = _Sums(acts, own, g, x, grad_output, more).dense(parameters, apply_b_dec_to_input)
    acts, own, g, more = step_of.acts, step_of.own, step_of.g, step_of.more
    clip = None
    if other_squared is not None:
        clip = torch.stack([other_squared, torch.ones_like(other_squared)])
    torch.ops.fastsae.sparse_adam_step_(
        *parameters,
        *exp_avg,
        *exp_avg_sq,
        acts.values,
        acts.indices,
        acts.offsets,
        grad_output,
        g,
        None if own is None else own.indices,
        None if own is None else own.offsets,
        x,
        *(extra_grads or (None, None, None, None)),
        *more,
        clip,
        0.0 if isinstance(lr, Tensor) else lr,
        *betas,
        eps,
        0 if isinstance(step, Tensor) else step,
        math.inf if clip_grad_norm is None else clip_grad_norm,
        unit_norm,
        apply_b_dec_to_input,
        bf16_rows,
        lr if isinstance(lr, Tensor) else None,
        step if isinstance(step, Tensor) else None,
        *copies,
        rounding_seed,
    )
    _count_writes(*parameters, *exp_avg, *exp_avg_sq, *copies)
    return None if clip is None else clip[1]


def _count_writes(*tensors: Tensor | None) -> None:
    """Tell torch that tensors were written to, as its own operators do."""
    if not torch.compiler.is_compiling():
        increment_version([t for t in tensors if t is not None and not t.is_inference()])


def _check_state(parameters: StepTensors, exp_avg: StepTensors, exp_avg_sq: StepTensors) -> None:
    W_enc = parameters.W_enc
    if W_enc.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{_OP}: expected W_enc to be float32 or float64, got {W_enc.dtype}")
    for name in ("W_enc", "W_dec"):
        if (t := getattr(parameters, name)).ndim != 2:
            width = "d_in" if name == "W_enc" else "d_out"
            raise ValueError(f"{_OP}: expected {name} to be [d_sae, {width}], got {[*t.shape]}")
    (d_sae, d_in), d_out = W_enc.shape, parameters.W_dec.shape[1]
    shapes = ((d_sae, d_in), (d_sae, d_out), (d_sae,), (d_out,))
    meanings = ("[d_sae, d_in]", "[d_sae, d_out]", "[d_sae]", "[d_out]")
    by_rows = exp_avg_sq.W_enc.ndim == 1
    rounded = exp_avg.W_enc.dtype == torch.bfloat16
    if rounded and (W_enc.dtype != torch.float32 or by_rows):
        raise TypeError(
            f"{_OP}: expected float32 parameters and squares of every number with averages in "
            f"bfloat16, got {W_enc.dtype} and {'one for each row' if by_rows else 'those'}"
        )
    for group, tensors in (("", parameters), ("exp_avg.", exp_avg), ("exp_avg_sq.", exp_avg_sq)):
        for name, tensor, size, meaning in zip(
            StepTensors._fields, tensors, shapes, meanings, strict=True
        ):
            if by_rows and tensors is exp_avg_sq and len(size) == 2:
                size, meaning = shapes[2], meanings[2]
            _check.shape(_OP, group + name, tensor, size, meaning)
            if rounded and group and len(size) == 2:
                _check.same(_OP, group + name, tensor, "exp_avg.W_enc", exp_avg.W_enc)
            else:
                _check.same(_OP, group + name, tensor, "W_enc", W_enc)


def _check_batch(
    parameters: StepTensors,
    acts: SparseActs,
    grad_values: Tensor | SparseActs,
    x: Tensor,
    grad_output: Tensor,
) -> None:
    W_enc, W_dec, _, _ = parameters
    rows = acts.n
    for name, code in (("acts", acts), ("grad_values", grad_values)):
        if not isinstance(code, SparseActs):
            continue
        if code.d_sae != W_enc.shape[0]:
            raise ValueError(
                f"{_OP}: expected {name} over d_sae = {W_enc.shape[0]} latents, got {code.d_sae}"
            )
        _check.same(_OP, f"{name}.values", code.values, "W_enc", W_enc)
        rows = code.n
    if not isinstance(grad_values, SparseActs):
        _check.shape(_OP, "grad_values", grad_values, tuple(acts.values.shape), "like acts.values")
        _check.same(_OP, "grad_values", grad_values, "W_enc", W_enc)
    for name, tensor, n, W, meaning in (
        ("x", x, rows, W_enc, "[n, d_in]"),
        ("grad_output", grad_output, acts.n, W_dec, "[n, d_out]"),
    ):
        _check.shape(_OP, name, tensor, (n, W.shape[1]), meaning)
        _check.same(_OP, name, tensor, "W_enc", W_enc)


def _check_number(name: str, number: float | Tensor, dtype: torch.dtype, W_enc: Tensor) -> None:
    if not isinstance(number, Tensor):
        return
    _check.shape(_OP, name, number, (), "[]")
    if number.dtype != dtype:
        raise TypeError(f"{_OP}: expected {name} to be {dtype}, got {number.dtype}")
    if number.device != W_enc.device:
        raise ValueError(
            f"{_OP}: expected {name} on the device of W_enc, {W_enc.device}, got {number.device}"
        )


def _check_copy(name: str, copy: Tensor | None, W: Tensor) -> None:
    if copy is None:
        return
    if W.dtype != torch.float32:
        raise TypeError(f"{_OP}: expected float32 parameters with copies, got {W.dtype}")
    _check.shape(_OP, f"the copy of {name}", copy, tuple(W.shape), f"like {name}")
    if copy.dtype != torch.bfloat16:
        raise TypeError(f"{_OP}: expected the copy of {name} to be bfloat16, got {copy.dtype}")
    if copy.device != W.device:
        raise ValueError(
            f"{_OP}: expected the copy of {name} on the device of {name}, {W.device}, got "
            f"{copy.device}"
        )


def _check_more(parameters: StepTensors, more: MoreGradients, other_squared: Tensor | None) -> None:
    for name, tensor, like in zip(StepTensors._fields, more, parameters, strict=True):
        if tensor is not None:
            _check.shape(_OP, f"more_grads.{name}", tensor, tuple(like.shape), f"like {name}")
            _check.same(_OP, f"more_grads.{name}", tensor, "W_enc", parameters.W_enc)
    if other_squared is not None:
        _check.shape(_OP, "other_squared", other_squared, (), "[]")
        if other_squared.dtype != torch.float64:
            raise TypeError(
                f"{_OP}: expected other_squared to be float64, got {other_squared.dtype}"
            )


@dataclass
class _Sums:
    """What the gradients of a step are sums of."""

    acts: SparseActs
    own: SparseActs | None
    """Entries of the encoder's own."""
    g: Tensor
    x: Tensor
    grad_output: Tensor
    more: MoreGradients

    def dense(self, parameters: StepTensors, centers: bool) -> _Sums:
        """Return the same with whole gradients in place of codes that are hardly sparse."""
        bias = parameters.b_dec

        def centered() -> Tensor:
            return self.x - bias if centers else self.x

        if self.own is None:
            if not _pays(self.acts, parameters.W_enc):
                return self
            active = where_active(self.acts.values, self.g)
            pairs = [(self.acts.values, self.grad_output), (active, centered())]
            found = _dense.weight_grads(*_places(self.acts), pairs)
            if found is None:
                return self
            acts = _empty(self.acts)
            more = self._with_decoder(found[0][0])._with_encoder(found[1], parameters, centers)
            return replace(self, acts=acts, g=acts.values, more=more.more)
        sums = self
        if _pays(self.acts, parameters.W_dec):
            pairs = [(self.acts.values, self.grad_output)]
            if (found := _dense.weight_grads(*_places(self.acts), pairs)) is not None:
                sums = replace(sums._with_decoder(found[0][0]), acts=_empty(self.acts))
        if _pays(self.own, parameters.W_enc):
            pairs = [(self.g, centered())]
            if (found := _dense.weight_grads(*_places(self.own), pairs)) is not None:
                own = _empty(self.own)
                sums = sums._with_encoder(found[0], parameters, centers)
                sums = replace(sums, own=own, g=own.values)
        return sums

    def _with_decoder(self, weight: Tensor) -> _Sums:
        more = self.more
        more = more._replace(W_dec=weight if more.W_dec is None else weight + more.W_dec)
        return replace(self, more=more)

    def _with_encoder(
        self, found: tuple[Tensor, Tensor], parameters: StepTensors, centers: bool
    ) -> _Sums:
        (weight, bias), more = found, self.more
        g_b_dec = more.b_dec
        if centers:
            rest = self.grad_output.sum(0) if g_b_dec is None else g_b_dec
            g_b_dec = rest - bias @ parameters.W_enc
        more = MoreGradients(
            weight if more.W_enc is None else weight + more.W_enc,
            more.W_dec,
            bias if more.b_enc is None else bias + more.b_enc,
            g_b_dec,
        )
        return replace(self, more=more)


def _pays(acts: SparseActs, W: Tensor) -> bool:
    return _dense.pays("sparse_weight_grad", _dense.counted(acts), acts.n, *W.shape)


def _places(acts: SparseActs) -> tuple[Tensor, Tensor | None, int]:
    return acts.indices, acts.offsets, acts.d_sae


def _empty(acts: SparseActs) -> SparseActs:
    """Return the code of as many tokens without an entry."""
    offsets = torch.zeros(acts.n + 1, dtype=torch.int32, device=acts.values.device)
    nothing = acts.indices.new_empty(0)  # a slice of a full code's would be one of a copy
    return SparseActs(acts.values.new_empty(0), nothing, offsets, acts.d_sae)


@fake(_OP)
def _fake(*_: object) -> None:
    return None


@fallback(_OP)
def _plain(*arguments: Any) -> None:
    parameters, exp_avg, exp_avg_sq = (StepTensors(*arguments[i : i + 4]) for i in (0, 4, 8))
    values, indices, offsets, grad_output, g, enc_indices, enc_offsets, x = arguments[12:20]
    rows, more, clip = arguments[20:24], arguments[24:28], arguments[28]
    lr, beta1, beta2, eps, step, max_norm, unit_norm, apply_b_dec, _ = arguments[29:38]
    lr_tensor, step_tensor, *copies, seed = (*arguments[38:], None, None, None, None, 0)[:5]
    d_sae = parameters.W_enc.shape[0]
    factor = reference.sparse_adam_step_(
        parameters,
        exp_avg,
        exp_avg_sq,
        SparseActs(values, indices, offsets, d_sae),
        g if enc_indices is None else SparseActs(g, enc_indices, enc_offsets, d_sae),
        x,
        grad_output,
        lr=lr if lr_tensor is None else lr_tensor,
        step=step if step_tensor is None else step_tensor,
        betas=(beta1, beta2),
        eps=eps,
        clip_grad_norm=None if max_norm == math.inf else max_norm,
        unit_norm=unit_norm,
        extra_grads=None if rows[0] is None else LatentGradients(*rows),
        more_grads=MoreGradients(*more),
        apply_b_dec_to_input=apply_b_dec,
        other_squared=None if clip is None else clip[0],
        copies=(copies[0], copies[1]),
        rounding_seed=seed,
    )
    if clip is not None:
        clip[1] = factor


_vmap.refuse(_OP)
_flops.register(_OP, _flops.adam_step)
