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

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.analysis.least_squares import LeastSquares, r2
from fastsae.eval.metrics import FVU
from fastsae.models.probe import evaluating
from fastsae.nn import SAE
from fastsae.types import SparseActs

Encode = Callable[[Tensor], SparseActs]
"""Gives the code of rows `[n, d_in]`."""


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


@dataclass(frozen=True)
class LinearError:
    """The linear maps of the input that give an SAE's error best; see `fit_linear_error`."""

    vector: Tensor
    """B, `[d_in, d_out]`, float64: x B is the linear error."""
    squared_norm: Tensor
    """a, `[d_in]`, float64: x . a predicts the squared norm of the error."""


@dataclass(frozen=True)
class TokenErrors:
    """The error of every token and its parts; each is `[n]`, float64."""

    activation: Tensor
    """Norm of what is reconstructed."""
    error: Tensor
    """Norm of the error."""
    linear: Tensor
    """Norm of the linear error."""
    nonlinear: Tensor
    """Norm of the error without its linear part."""
    predicted_square: Tensor
    """The squared norm of the error as the norm test predicts it; may be negative."""


def fit_linear_error(
    sae: SAE, fit: Tensor, *, encode: Encode | None = None, batch_size: int = 4096
) -> LinearError:
    """Fit the error of an SAE in eval mode, and its squared norm, by linear maps of its input.

    Args:
        sae: as in `error_anatomy`, like the rest.
        fit: `[n, d_in]`.
        encode: how rows are encoded.
        batch_size: rows at a time.

    Raises:
        ValueError: not `[n, columns]`, or fewer rows than d_in.
    """
    _check("fit_linear_error", "fit", fit, sae, sae.d_in)
    regression = LeastSquares()
    for x, y, y_hat in reconstructions(sae, fit, batch_size, encode):
        regression.update(x, _target(y - y_hat))
    weights = regression.solution()
    return LinearError(weights[:, :-1], weights[:, -1])


@torch.no_grad()
def error_anatomy(
    sae: SAE,
    fit: Tensor,
    held_out: Tensor,
    *,
    encode: Encode | None = None,
    batch_size: int = 4096,
) -> ErrorAnatomy:
    """Fit the error of an SAE in eval mode by a linear map of its input, and test that map.

    For a transcoder x B is a map of its input, and the error that of its output.

    Args:
        sae: any SAE, in any dtype.
        fit: `[n, d_in]`, rows to fit on; n should be many times d_in, since n rows of pure noise
            give an R^2 of d_in / n on themselves and about minus that on others. Columns as in
            training, see `SAE.columns`.
        held_out: the same, other rows.
        encode: how rows are encoded, such as by `fastsae.nn.gradient_pursuit`; None:
            `sae.encode_sparse`.
        batch_size: rows at a time.

    Raises:
        ValueError: not `[n, columns]`, fewer rows to fit than d_in, or none held out.

    Numerics: float64, except for the SAE itself. The normal equations are solved by a singular
    value decomposition; directions in which x has less than about 1e-7 of its largest extent take
    no part.
    Cost: beside the SAE's, 2 d_in (d_in + d_out) flops per row to fit and 2 d_in d_out per row held
    out; memory for [d_in, d_in + d_out] in float64.
    """
    _check("error_anatomy", "fit", fit, sae, sae.d_in)
    _check("error_anatomy", "held_out", held_out, sae, 1)
    linear = fit_linear_error(sae, fit, encode=encode, batch_size=batch_size)
    return anatomy_of(sae, linear, held_out, encode=encode, batch_size=batch_size)


def anatomy_of(
    sae: SAE, linear: LinearError, held_out: Tensor, *, encode: Encode | None, batch_size: int
) -> ErrorAnatomy:
    """Test a fit on rows held out, as in `error_anatomy`."""
    weights = torch.cat([linear.vector, linear.squared_norm.unsqueeze(1)], 1)
    before, after, columns = FVU(), FVU(), FVU()
    for x, y, y_hat in reconstructions(sae, held_out, batch_size, encode):
        prediction = x @ weights
        before.update(y, y_hat)
        after.update(y, y_hat + prediction[:, :-1])
        columns.update(_target(y - y_hat), prediction)
    residual, deviation = columns.squared_error, columns.squared_deviation
    by_column = r2(residual, deviation)
    return ErrorAnatomy(
        fvu=before.value,
        fvu_nonlinear=after.value,
        r2_norm=float(by_column[-1]),
        r2_vector=float(by_column[:-1].nanmean()),
        r2_vector_pooled=float(r2(residual[:-1].sum(), deviation[:-1].sum())),
    )


def token_errors(
    sae: SAE, linear: LinearError, rows: Tensor, *, batch_size: int = 4096
) -> TokenErrors:
    """Return the error of every token and its linear and nonlinear parts.

    The parts of one token need not be at right angles, so their squares add up to that of the error
    only on average over the rows of the fit.

    Args:
        sae: as in `error_anatomy`.
        linear: from `fit_linear_error`, of other rows.
        rows: `[n, d_in]`.
        batch_size: rows at a time.

    Raises:
        ValueError: not `[n, columns]`, or no rows.
    """
    _check("token_errors", "rows", rows, sae, 1)
    found = []
    for x, y, y_hat in reconstructions(sae, rows, batch_size):
        error, part = y - y_hat, x @ linear.vector
        norms = [t.norm(dim=1) for t in (y, error, part, error - part)]
        found.append(torch.stack([*norms, x @ linear.squared_norm]))
    return TokenErrors(*torch.cat(found, 1))


@torch.no_grad()
def reconstructions(
    sae: SAE, rows: Tensor, batch_size: int, encode: Encode | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield what is encoded, what is reconstructed and the reconstruction, in float64; the SAE is
    in eval mode meanwhile."""
    with evaluating(sae):
        for batch in rows.split(batch_size):
            x, y, _ = sae.columns.split(batch.to(sae.W_enc_rows))
            acts = (encode or sae.encode_sparse)(x)
            yield x.double(), y.double(), sae.reconstruct(x, acts).double()


def _target(error: Tensor) -> Tensor:
    """Return what is predicted from `error: [n, d_out]`: itself and its squared norm, side by side.

    Columns are fitted independently of each other, so one fit answers both questions.
    """
    return torch.cat([error, error.square().sum(1, keepdim=True)], 1)


def _check(owner: str, name: str, rows: Tensor, sae: SAE, least: int) -> None:
    width = sum(sae.columns.widths)
    if rows.ndim != 2 or rows.shape[1] != width or len(rows) < least:
        raise ValueError(
            f"{owner}: expected {name} to be [n, {width}] with n >= {least}, got {[*rows.shape]}"
        )
