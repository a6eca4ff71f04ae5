"""Dark matter: how much of an SAE's error is a linear function of its input.

    e(x) = x - sae(x)
    B    = argmin_B sum |e(x) - x B|^2                no intercept; x B is the linear error
    a    = argmin_a sum (|e(x)|^2 - x . a)^2          the norm test: it predicts the squared norm
    R^2  = 1 - sum (e - x B)^2 / sum (e - mean e)^2   per output dimension, on rows held out
    fvu_nonlinear = sum |x - sae(x) - x B|^2 / sum |x - mean x|^2

What is left of the error, its nonlinear part, holds fewer features that are not learned yet, says
the paper; it takes some of it for what the SAE itself introduces. Activations with a large mean
give the fit a constant after all.

Source: Engels et al. 2024, "Decomposing the dark matter of sparse autoencoders" (arXiv 2410.14670).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.eval.metrics import FVU
from fastsae.nn import SAE


@dataclass(frozen=True)
class ErrorAnatomy:
    """What `error_anatomy` found, all of it on the rows held out."""

    fvu: float
    """Fraction of variance unexplained by the SAE."""
    fvu_nonlinear: float
    """The same when the linear error is added to the reconstruction."""
    r2_norm: float
    """R^2 of the squared norm of the error; nan where it does not vary."""
    r2_vector: float
    """R^2 of the error, mean over the output dimensions in which it varies: the paper's number."""
    r2_vector_pooled: float
    """R^2 of the error with both sums taken over all dimensions; nan where it does not vary."""


@torch.no_grad()
def error_anatomy(
    sae: SAE, fit: Tensor, held_out: Tensor, *, batch_size: int = 4096
) -> ErrorAnatomy:
    """Fit the error of an SAE in eval mode by a linear map of its input, and test that map.

    For a transcoder x B is a map of its input, and the error that of its output.

    Args:
        sae: any SAE, in any dtype.
        fit: `[n, d_in]`, rows to fit on; n should be many times d_in, since n rows of pure noise
            give an R^2 of d_in / n on themselves and about minus that on others. Columns as in
            training, see `SAE.columns`.
        held_out: the same, other rows.
        batch_size: rows at a time.

    Raises:
        ValueError: not `[n, columns]`, fewer rows to fit than d_in, or none held out.

    Numerics: float64, except for the SAE itself. The normal equations are solved by a singular
    value decomposition; directions in which x has less than about 1e-7 of its largest extent take
    no part.
    Cost: beside the SAE's, 2 d_in (d_in + d_out) flops per row to fit and 2 d_in d_out per row held
    out; memory for [d_in, d_in + d_out] in float64.
    """
    width = sum(sae.columns.widths)
    for name, rows, least in (("fit", fit, sae.d_in), ("held_out", held_out, 1)):
        if rows.ndim != 2 or rows.shape[1] != width or len(rows) < least:
            raise ValueError(
                f"error_anatomy: expected {name} to be [n, {width}] with n >= {least}, "
                f"got {[*rows.shape]}"
            )
    training = sae.training
    sae.eval()
    try:
        weights = _regress(sae, fit, batch_size)
        before, after, columns = FVU(), FVU(), FVU()
        for x, y, y_hat in _reconstructions(sae, held_out, batch_size):
            prediction = x @ weights
            before.update(y, y_hat)
            after.update(y, y_hat + prediction[:, :-1])
            columns.update(_target(y - y_hat), prediction)
    finally:
        sae.train(training)
    residual, deviation = columns.squared_error, columns.squared_deviation
    r2 = _r2(residual, deviation)
    return ErrorAnatomy(
        fvu=before.value,
        fvu_nonlinear=after.value,
        r2_norm=float(r2[-1]),
        r2_vector=float(r2[:-1].nanmean()),
        r2_vector_pooled=float(_r2(residual[:-1].sum(), deviation[:-1].sum())),
    )


def _reconstructions(
    sae: SAE, rows: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield what is encoded, what is reconstructed and the reconstruction, in float64."""
    for batch in rows.split(batch_size):
        x, y, _ = sae.columns.split(batch.to(sae.W_enc_rows))
        yield x.double(), y.double(), sae.reconstruct(x, sae.encode_sparse(x)).double()


def _target(error: Tensor) -> Tensor:
    """Return what is predicted from `error: [n, d_out]`: itself and its squared norm, side by side.

    Columns are fitted independently of each other, so one fit answers both questions.
    """
    return torch.cat([error, error.square().sum(1, keepdim=True)], 1)


def _regress(sae: SAE, rows: Tensor, batch_size: int) -> Tensor:
    """Return B and, as its last column, a: `[d_in, d_out + 1]`, float64."""
    d_in, d_out = sae.d_in, sae.b_dec.shape[0]
    gram = torch.zeros(d_in, d_in, dtype=torch.float64, device=sae.W_enc.device)
    moments = gram.new_zeros(d_in, d_out + 1)
    for x, y, y_hat in _reconstructions(sae, rows, batch_size):
        gram.addmm_(x.t(), x)
        moments.addmm_(x.t(), _target(y - y_hat))
    # Only the CPU has drivers for a singular matrix. The default one, gelsy, can be wrong where
    # columns depend on each other (seen in torch 2.13).
    solution: Tensor = torch.linalg.lstsq(gram.cpu(), moments.cpu(), driver="gelsd").solution
    return solution.to(gram.device)


def _r2(residual: Tensor, deviation: Tensor) -> Tensor:
    """Return 1 - residual / deviation; nan where nothing deviates."""
    return torch.where(deviation > 0, 1 - residual / deviation, torch.nan)
