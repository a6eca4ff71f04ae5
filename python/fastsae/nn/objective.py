"""The terms of the training loss, and the rows of latents that the auxiliary term trains."""

from __future__ import annotations

from typing import NoReturn, Protocol

import torch
from torch import Tensor

from fastsae.nn.auxk import LatentRows, auxk_loss
from fastsae.nn.loss import SAEOutput, error_of, fvu
from fastsae.nn.parallel import Parallel
from fastsae.ops import _tape
from fastsae.types import SparseActs


class Dictionary(Protocol):
    """What the loss reads of an SAE."""

    d_sae: int
    parallel: Parallel
    k_aux: int
    auxk_alpha: float
    W_enc_rows: Tensor
    W_dec: Tensor
    b_enc: Tensor

    def _input_bias(self) -> Tensor | None: ...

    def _fail(self, expectation: str) -> NoReturn: ...


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
    squared = sae.parallel.sum_over_tokens(error.square().sum())
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


def dead_rows(sae: Dictionary, dead: Tensor | None) -> LatentRows | None:
    """Return the rows of the latents that the auxiliary loss trains, None without any.

    Args:
        sae: gives the rows.
        dead: bool [d_sae] or None. On a GPU, counting them waits for the device.

    Raises:
        ValueError: dead has another dtype or shape.
    """
    if dead is None or not sae.auxk_alpha:
        return None
    if dead.shape != (sae.d_sae,) or dead.dtype != torch.bool:
        sae._fail(f"dead to be bool [{sae.d_sae}], got {dead.dtype} {[*dead.shape]}")
    bias = sae._input_bias()
    if torch.compiler.is_compiling():  # no shape may depend on how many there are
        return LatentRows(None, sae.W_enc_rows, sae.W_dec, sae.b_enc, bias, dead)
    latents = dead.nonzero().squeeze(1)
    total = sae.parallel.count(latents.numel())
    if total == 0:
        return None
    if (tape := _tape.of(sae.W_enc_rows)) is not None:
        bias = None if bias is None else bias.detach()
        W_enc, W_dec, b_enc = tape.copy_rows(latents)
        return LatentRows(latents, W_enc, W_dec, b_enc, bias, total=total)
    W_enc, W_dec, b_enc = (
        t.index_select(0, latents) for t in (sae.W_enc_rows, sae.W_dec, sae.b_enc)
    )
    return LatentRows(latents, W_enc, W_dec, b_enc, bias, total=total)
