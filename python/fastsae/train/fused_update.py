"""The update without gradients of matrices: everything inside `ops.sparse_adam_step_`.

The loss is the module's own. Its backward leaves the gradients of vectors, and on a tape what the
gradients of both matrices are sums of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import c_float
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn import SAE, SAEOutput, StepContext
from fastsae.ops import _autograd, _tape
from fastsae.ops._rounded import Copies, Rounded
from fastsae.ops._tape import Entries, Tape
from fastsae.train.adam_mini import squares_like
from fastsae.train.autograd_update import make_optimizer
from fastsae.types import LatentGradients, MoreGradients, SparseActs, StepTensors, can_look

if TYPE_CHECKING:
    from fastsae.train.config import TrainConfig

MOST_DICTIONARIES = 1 << 16
"""In one update: each rounds its averages by random bits of its own."""
PARAMETERS = ("W_enc_rows", "W_dec", "b_enc", "b_dec")


def moved_parameters(sae: SAE) -> dict[str, Tensor]:
    """Return the parameters that `ops.sparse_adam_step_` moves, by name: the four of an SAE, or
    those of the dictionaries of all layers."""
    found = dict(sae.named_parameters())
    names: tuple[str, ...] = PARAMETERS
    if "W_decs.0" in found:
        names = ("W_enc_rows", "b_enc", *(name for name in found if name.startswith("W_decs.")))
    return {name: found[name] for name in names}


def _dictionaries(tensors: dict[str, Tensor], moved: dict[str, Tensor]) -> list[StepTensors]:
    """Return tensors like those of `moved_parameters` by dictionary: views, and where b_dec is not
    among them, a stand-in that does not move."""
    if "W_dec" in tensors:
        return [StepTensors(*(tensors[name] for name in PARAMETERS))]
    names = [name for name in moved if name.startswith("W_decs.")]
    W_enc, b_enc = (tensors[name].chunk(len(names)) for name in ("W_enc_rows", "b_enc"))
    b_decs = [tensors["b_enc"].new_zeros(moved[name].shape[1]) for name in names]
    W_decs = [tensors[name] for name in names]
    return [StepTensors(*parts) for parts in zip(W_enc, W_decs, b_enc, b_decs, strict=True)]


class FusedUpdate:
    """Adam or Adam-mini, latent by latent; see `train.update.why_not_fused` for where it applies.

    Other parameters (thresholds, gates, skip connections) have the same optimizer, made by torch.

    Args:
        sae: moved in place.
        config: optimizer, betas, eps and clip_grad_norm.
    """

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        self.sae, self.config = sae, config
        self.count = 0
        self.buffers: dict[str, Tensor] = {}
        moved = moved_parameters(sae)
        self.copies = [self._copies(one) for one in _dictionaries(moved, moved)]
        """Of the matrices of each dictionary."""
        averages = self._averages
        self.exp_avg = {name: averages(p) for name, p in moved.items()}
        zeros = squares_like if config.optimizer == "adam_mini" else averages
        self.exp_avg_sq = {name: zeros(p) for name, p in moved.items()}
        self.others = {name: p for name, p in sae.named_parameters() if name not in moved}
        self.optimizer = make_optimizer(list(self.others.values()), config) if self.others else None

    def _copies(self, one: StepTensors) -> Copies:
        """Return the bfloat16 copies that the settings ask for."""
        return Copies(
            Rounded(one.W_enc) if self.config.weight_copies else None,
            Rounded(one.W_dec) if self.config.decode_dtype == "bfloat16" else None,
        )

    def _averages(self, p: Tensor) -> Tensor:
        """Return zeros for an average of `p`: of a matrix in the dtype that is asked for."""
        rounded = p.ndim == 2 and self.config.adam_dtype == "bfloat16"
        return torch.zeros_like(p, dtype=torch.bfloat16 if rounded else None)

    def step(self, batch: Tensor, context: StepContext, lr: float) -> SAEOutput:
        """See `Update.step`."""
        out = self.move(batch, context, lr, self.count + 1)
        self.count += 1
        return out

    def refresh_copies(self) -> None:
        """Make copies anew that are not of what the parameters hold: before a step, and before one
        that was recorded is replayed."""
        if any(copies != Copies() for copies in self.copies):
            moved = moved_parameters(self.sae)
            for copies, one in zip(self.copies, _dictionaries(moved, moved), strict=True):
                copies.refresh(one)

    def move(
        self, batch: Tensor, context: StepContext, lr: float | Tensor, number: int | Tensor
    ) -> SAEOutput:
        """Do what `step` does but count.

        Args:
            batch: [n, columns].
            context: as there.
            lr: learning rate; or [] float64 on the device, read when the step is done.
            number: of this step, from 1; or [] int64 on the device, likewise.
        """
        moved, others = moved_parameters(self.sae), list(self.others.values())
        centered = self.sae.apply_b_dec_to_input
        with _tape.opened(_dictionaries(moved, moved), centered, self.buffers) as tapes:
            self.refresh_copies()
            for tape, copies in zip(tapes, self.copies, strict=True):
                tape.copies = copies
            out = self.sae.training_loss(batch, context)
            rows = [leaf for tape in tapes if tape.rows is not None for leaf in tape.rows[1]]
            inputs = [*moved.values(), *rows, *others]
            with _tape.recorded(tapes):
                found = torch.autograd.grad(out.loss, inputs, allow_unused=True)
        out.acts, out.reconstruction = out.acts.detach(), out.reconstruction.detach()
        grads = self._of_all_tokens(found)
        own, rest = dict(zip(moved, grads, strict=False)), grads[len(moved) :]
        of_rows, of_others = rest[: len(rows)], rest[len(rows) :]
        factor, squares = None, self._squares(of_others)
        averages = [_dictionaries(held, moved) for held in (self.exp_avg, self.exp_avg_sq)]
        every = zip(tapes, _more(own, len(tapes)), *averages, strict=True)
        for place, (tape, more, *state) in enumerate(every):
            extra = _rows(tape, of_rows)
            seed = self.config.seed * MOST_DICTIONARIES + place
            kept = (state[0], state[1])
            factor = self._move(tape, kept, more, extra, squares, context, lr, number, seed)
        for tape in tapes:
            tape.copies.written(tape.parameters)  # dictionaries may share a counter of writes
        self._move_others(of_others, factor, lr)
        return out

    def _of_all_tokens(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return gradients of tensors, given those that the tokens here have."""
        return grads

    def _sums(
        self,
        tape: Tape,
        parameters: StepTensors,
        more: MoreGradients,
        extra: LatentGradients | None,
    ) -> tuple[Sums, bool]:
        """Return what a step takes, and whether b_dec is subtracted from x there."""
        return sums_of(tape, parameters, more), tape.centered

    def _squares(self, others: Sequence[Tensor | None]) -> Tensor | None:
        """Return the squared norm of the gradients of other parameters, where clipping asks."""
        if self.config.clip_grad_norm is None or not self.others:
            return None
        squares = [g.double().square().sum() for g in others if g is not None]
        return torch.stack(squares).sum() if squares else self.sae.b_enc.new_zeros(()).double()

    def _move(
        self,
        tape: Tape,
        state: tuple[StepTensors, StepTensors],
        more: MoreGradients,
        extra: LatentGradients | None,
        squares: Tensor | None,
        context: StepContext,
        lr: float | Tensor,
        number: int | Tensor,
        seed: int,
    ) -> Tensor | None:
        """Move a dictionary; return what clipping multiplied the gradients with."""
        cfg = self.config
        parameters = StepTensors(*(p.detach() for p in tape.parameters))
        if more.b_dec is None:
            more = more._replace(b_dec=torch.zeros_like(parameters.b_dec))
        sums, centered = self._sums(tape, parameters, more, extra)
        acts, grad_values, x, grad_output, more = sums
        return ops.sparse_adam_step_(
            parameters,
            *state,
            acts,
            grad_values,
            x,
            grad_output,
            lr=lr,
            step=number,
            betas=cfg.betas,
            eps=cfg.eps,
            clip_grad_norm=cfg.clip_grad_norm,
            extra_grads=extra,
            more_grads=more,
            apply_b_dec_to_input=centered,
            other_squared=squares,
            compute_dtype=context.compute_dtype,
            copies=tape.copies.tensors,
            rounding_seed=seed,
        )

    def _move_others(
        self, grads: Sequence[Tensor | None], factor: Tensor | None, lr: float | Tensor
    ) -> None:
        if self.optimizer is None:
            return
        on_device = isinstance(lr, Tensor)
        # torch takes a tensor in float32 only: a number is rounded like it.
        rate = lr.float() if isinstance(lr, Tensor) else c_float(lr).value
        for p, g in zip(self.others.values(), grads, strict=True):
            p.grad = g if factor is None or g is None else g * factor.to(g.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            group["capturable"] = on_device  # torch asks for it in a graph, and warns outside
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """See `Update.state_dict`."""
        state = {"count": self.count, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        if self.optimizer is not None:
            state["others"] = {n: dict(self.optimizer.state[p]) for n, p in self.others.items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Update.load_state_dict`."""
        self.count = state["count"]
        for own, saved in ((self.exp_avg, "exp_avg"), (self.exp_avg_sq, "exp_avg_sq")):
            for name, tensor in own.items():
                tensor.copy_(state[saved][name])
        for name, p in self.others.items():
            assert self.optimizer is not None
            for key, tensor in self.optimizer.state[p].items():
                tensor.copy_(state["others"][name][key])


def _more(grads: Mapping[str, Tensor | None], count: int) -> list[MoreGradients]:
    """Return gradients of whole parameters by dictionary."""
    if "W_dec" in grads:
        return [MoreGradients(*(grads[name] for name in PARAMETERS))]
    every = [g for name, g in grads.items() if name.startswith("W_decs.")]
    parts = [
        [None] * count if g is None else g.chunk(count)
        for g in (grads["W_enc_rows"], grads["b_enc"])
    ]
    return [
        MoreGradients(W_enc, W_dec, b_enc)
        for W_enc, W_dec, b_enc in zip(parts[0], every, parts[1], strict=True)
    ]


def _rows(tape: Tape, grads: Sequence[Tensor | None]) -> LatentGradients | None:
    """Return the gradients of the rows that a step has copied."""
    if tape.rows is None:
        return None
    latents, leaves = tape.rows
    found = (torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True))
    return LatentGradients(latents.int(), *found)


Sums = tuple[SparseActs, Tensor | SparseActs, Tensor, Tensor, MoreGradients]


def sums_of(tape: Tape, parameters: StepTensors, more: MoreGradients) -> Sums:
    """Return what a step takes: acts, grad_values, x, grad_output and more_grads."""
    d_sae = parameters.W_enc.shape[0]
    encoder, decoder = tape.encoder, tape.decoder
    if len(encoder) == len(decoder) == 1 and _share_entries(encoder[0], decoder[0]):
        (enc,), (dec,) = encoder, decoder
        acts = SparseActs(dec.values, dec.indices, dec.offsets, d_sae)
        return acts, enc.values, enc.x, dec.x, more
    acts, grad_output = _stacked(decoder, parameters.W_dec)
    grad_acts, x = _stacked(encoder, parameters.W_enc)
    return acts, grad_acts, x, grad_output, more


def _share_entries(enc: Entries, dec: Entries) -> bool:
    """Return whether one code says what both sums are of, without a full one: matmuls of both."""
    if SparseActs(dec.values, dec.indices, dec.offsets, dec.values.shape[-1]).is_full:
        return False
    if enc.indices.data_ptr() != dec.indices.data_ptr() or enc.values.shape != dec.values.shape:
        return False
    if (enc.offsets is None) != (dec.offsets is None):
        return False
    if enc.offsets is not None and enc.offsets.data_ptr() != dec.offsets.data_ptr():  # type: ignore[union-attr]
        return False
    if not can_look(enc.values):  # asking would be a wait; what was encoded says enough
        return enc.code is not None and enc.code.data_ptr() == dec.values.data_ptr()
    return not bool(((dec.values == 0) & (enc.values != 0)).any())


def _stacked(sums: list[Entries], W: Tensor) -> tuple[SparseActs, Tensor]:
    """Return several sums as one: a code of all their rows, and the rows."""
    d_sae, width = W.shape
    codes = [SparseActs(*one[:3], d_sae) for one in sums]
    if len(sums) == 1:
        return codes[0], sums[0].x
    if not sums:
        offsets = torch.zeros(1, dtype=torch.int32, device=W.device)
        return SparseActs(W.new_empty(0), offsets[:0], offsets, d_sae), W.new_empty(0, width)
    if not can_look(W):
        return SparseActs.cat(codes), torch.cat([one.x for one in sums])
    values, indices, ends = [W.new_empty(0)], [torch.empty(0, dtype=torch.int32)], [torch.zeros(1)]
    total = 0
    for one in sums:
        if one.offsets is None:
            n, k = one.values.shape
            own = torch.arange(1, n + 1) * k
        else:
            own = one.offsets[1:].long()
        count = int(own[-1]) if own.numel() else 0
        values.append(one.values.reshape(-1)[:count])
        indices.append(one.indices.reshape(-1)[:count])
        ends.append(own + total)
        total += count
    offsets = torch.cat(ends).int()
    acts = SparseActs(torch.cat(values), torch.cat(indices), offsets, d_sae)
    return acts, torch.cat([W.new_empty(0, width), *(one.x for one in sums)])


def gradients_of(tape: Tape, parameters: StepTensors, more: MoreGradients) -> Sums:
    """Return no sums, and their gradients among the others, for where these are less to send."""
    W_enc, W_dec, b_enc, b_dec = parameters
    d_sae = W_enc.shape[0]
    for values, indices, offsets, grad, _ in tape.decoder:
        g = _autograd.weight_grad(values, indices, offsets, d_sae, grad)[0]
        more = more._replace(W_dec=plus(more.W_dec, g))
    for values, indices, offsets, x, _ in tape.encoder:
        centered = x - b_dec if tape.centered else x
        g, g_b = _autograd.weight_grad(values, indices, offsets, d_sae, centered)
        more = more._replace(W_enc=plus(more.W_enc, g), b_enc=plus(more.b_enc, g_b))
        if tape.centered:
            more = more._replace(b_dec=plus(more.b_dec, -(g_b @ W_enc)))
    none = torch.zeros(0, 1, dtype=torch.int32, device=W_enc.device)
    acts = SparseActs(W_enc.new_empty(0, 1), none, None, d_sae)
    nothing = b_enc.new_empty(0, 1)
    return (
        acts,
        nothing,
        W_enc.new_empty(0, W_enc.shape[1]),
        W_dec.new_empty(0, W_dec.shape[1]),
        more,
    )


def plus(a: Tensor | None, b: Tensor) -> Tensor:
    """Return the sum of two gradients, the first of which may be none."""
    return b if a is None else a + b
