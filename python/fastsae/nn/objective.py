"""The terms of the training loss, and the rows of latents that the auxiliary term trains."""

from __future__ import annotations

import os
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from fastsae import ops
from fastsae.nn.auxk import LatentRows, auxk_loss
from fastsae.nn.context import StepContext
from fastsae.nn.loss import SAEOutput, error_of, fvu
from fastsae.nn.parallel import Parallel
from fastsae.ops import _dense, _tape
from fastsae.types import SparseActs, can_look

AUX_ROOM = 2
"""Dead latents that a step trains at most, in units of k_aux; more take turns. What is measured is
in docs/training.md."""


class Dictionary(Protocol):
    """What the loss reads of an SAE."""

    d_sae: int
    parallel: Parallel
    k_aux: int
    auxk_alpha: float
    W_enc_rows: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor

    @property
    def adds_rows(self) -> bool: ...

    def reconstruct(self, x: Tensor, acts: SparseActs) -> Tensor: ...

    def _input_bias(self) -> Tensor | None: ...

    def _fail(self, expectation: str) -> NoReturn: ...


_on_cuda = os.environ.get("FASTSAE_CUDA_DECODE_ERROR") == "1"


def set_cuda_decode_error(on: bool) -> bool:
    """Say whether training steps on CUDA decode by `ops.sparse_decode_error`, as those on a CPU do.

    Off by default, because the kernel has not run on hardware; `FASTSAE_CUDA_DECODE_ERROR=1` turns
    it on from the start. A step that was recorded as a graph stays as it is.

    Args:
        on: whether they do.

    Returns:
        What was in force before.
    """
    global _on_cuda
    before, _on_cuda = _on_cuda, bool(on)
    return before


def decodes_with_error(sae: Dictionary, target: Tensor, acts: SparseActs) -> bool:
    """Return whether the loss of a code is made by `ops.sparse_decode_error`.

    That is so in a step of the fused update, whose classes are all known here, where the
    reconstruction is a sum of rows of W_dec, everything is in this process, and the code is sparse.
    There nobody asks for the gradient of the loss in the reconstruction.
    """
    if not (_tape.is_open() and sae.adds_rows and sae.parallel.is_alone):
        return False
    W_dec, values = sae.W_dec, acts.values
    device = W_dec.device.type
    return (
        _tape.of(W_dec) is not None
        and device in (("cpu", "cuda") if _on_cuda else ("cpu",))
        and values.requires_grad
        and values.dtype == target.dtype == W_dec.dtype
        and not torch.is_autocast_enabled(device)
        and not _dense.applies(acts, W_dec.shape[1])
    )


def loss_of_code(
    sae: Dictionary,
    x: Tensor,
    target: Tensor,
    acts: SparseActs,
    sparsity: Tensor | None,
    dead: LatentRows | None,
) -> SAEOutput:
    """Return `total_loss` of the reconstruction from a code."""
    if not decodes_with_error(sae, target, acts):
        return total_loss(sae, x, target, acts, sae.reconstruct(x, acts), sparsity, dead)
    rows = target.reshape(acts.n, sae.W_dec.shape[1])
    found = ops.sparse_decode_error(acts, sae.W_dec, sae.b_dec, rows)
    reconstruction = found.reconstruction.reshape(target.shape)
    return _sum_of_terms(
        sae, x, target, acts, reconstruction, found.error, found.squared.sum(), sparsity, dead
    )


def total_loss(
    sae: Dictionary,
    x: Tensor,
    target: Tensor,
    acts: SparseActs,
    x_hat: Tensor,
    sparsity: Tensor | None,
    dead: LatentRows | None,
) -> SAEOutput:
    """Return fvu + auxk_alpha * aux_loss + sparsity, given a reconstruction.

    Args:
        sae: gives k_aux and auxk_alpha.
        x: [n, d_in], what was encoded.
        target: [..., d_out] of n rows.
        acts: the code.
        x_hat: [n, d_out].
        sparsity: [], the weighted penalty; None: none.
        dead: from `dead_rows`.
    """
    reconstruction = x_hat if x_hat.shape == target.shape else x_hat.reshape(target.shape)
    error = error_of(target, reconstruction)
    return _sum_of_terms(
        sae, x, target, acts, reconstruction, error, error.square().sum(), sparsity, dead
    )


def _sum_of_terms(
    sae: Dictionary,
    x: Tensor,
    target: Tensor,
    acts: SparseActs,
    reconstruction: Tensor,
    error: Tensor,
    squared: Tensor,
    sparsity: Tensor | None,
    dead: LatentRows | None,
) -> SAEOutput:
    """Return the loss, given the `error` of the reconstruction and the sum of its squares here."""
    squared = sae.parallel.sum_over_tokens(squared)
    unexplained = fvu(squared, target, sae.parallel)
    loss, zero = unexplained, unexplained.new_zeros(())
    aux = zero
    if dead is not None:
        aux = auxk_loss(x, error.detach().flatten(0, -2), dead, sae.k_aux, sae.parallel)
        loss = loss + sae.auxk_alpha * aux
    if sparsity is not None:
        loss = loss + sparsity
    return SAEOutput(
        loss=loss,
        reconstruction=reconstruction,
        acts=acts,
        fvu=unexplained,
        mse=squared.detach() / max(sae.parallel.tokens(x.shape[0]), 1),
        aux_loss=aux,
        sparsity_loss=zero if sparsity is None else sparsity,
    )


def dead_rows(sae: Dictionary, context: StepContext) -> LatentRows | None:
    """Return the rows of the latents that the auxiliary loss trains, None without any.

    A step has room for `AUX_ROOM * k_aux` of them. When more are dead, they take turns: of c dead
    latents in ascending order, `context.turn` t takes those from place `t * room mod c` on, and
    from the first one on after the last. Without a turn, all are taken where they can be counted.
    Where counting them would be a wait for the device, there are `room` rows, and a mask says
    which of these are dead.

    Args:
        sae: gives the rows.
        context: `dead`, bool [d_sae] or None, and `turn`, None for none.

    Raises:
        ValueError: dead has another dtype or shape.
    """
    dead = context.dead
    if dead is None or not sae.auxk_alpha:
        return None
    if dead.shape != (sae.d_sae,) or dead.dtype != torch.bool:
        sae._fail(f"dead to be bool [{sae.d_sae}], got {dead.dtype} {[*dead.shape]}")
    bias = sae._input_bias()
    if torch.compiler.is_compiling():  # no shape may depend on how many there are
        return LatentRows(None, sae.W_enc_rows, sae.W_dec, sae.b_enc, bias, dead)
    mask, total = None, None
    room = min(sae.parallel.latents(sae.d_sae), AUX_ROOM * sae.k_aux)
    if can_look(dead) or not sae.parallel.is_alone:
        total = sae.parallel.count(int(dead.count_nonzero()))
        if total == 0:
            return None
        if total > room and context.turn is not None:
            every = sae.parallel.of_all_latents(dead)
            dead, total = sae.parallel.of_own_latents(_taken(every, room, context.turn)), room
        latents = dead.nonzero().squeeze(1)
    else:
        latents, mask = _in_room(dead, room, 0 if context.turn is None else context.turn)
    if (tape := _tape.of(sae.W_enc_rows)) is not None:
        bias = None if bias is None else bias.detach()
        W_enc, W_dec, b_enc = tape.copy_rows(latents)
        return LatentRows(latents, W_enc, W_dec, b_enc, bias, mask, total)
    W_enc, W_dec, b_enc = (
        t.index_select(0, latents) for t in (sae.W_enc_rows, sae.W_dec, sae.b_enc)
    )
    return LatentRows(latents, W_enc, W_dec, b_enc, bias, mask, total)


def _in_room(dead: Tensor, room: int, turn: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return `room` different latents, the dead ones whose turn it is first, and which those are.

    No shape depends on how many are dead. Both parts ascend.
    """
    taken = _taken(dead, room, turn)
    latents = (~taken).to(torch.uint8).argsort(stable=True)[:room]
    return latents, taken.index_select(0, latents)


def _taken(dead: Tensor, room: int, turn: int | Tensor) -> Tensor:
    """Return which `room` of the dead latents have their turn, all where they fit."""
    place = dead.cumsum(0) - 1
    count = (place[-1] + 1).clamp(min=1)
    return dead & ((place - turn * room) % count < room)
