"""Dark matter of one or several SAEs at a site: what their errors are made of, and what helps.

For every SAE: its error of every token in a linear and a nonlinear part, what each part costs the
model, what gradient pursuit does to both, and what linear maps of earlier SAEs' outputs do. Over
SAEs of different widths: whether they fail on the same tokens.

Source: Engels et al. 2024, "Decomposing the dark matter of sparse autoencoders" (arXiv 2410.14670).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastsae.analysis.error import (
    ErrorAnatomy,
    TokenErrors,
    anatomy_of,
    error_anatomy,
    fit_linear_error,
    reconstructions,
    token_errors,
)
from fastsae.analysis.error_cost import ErrorCost, error_cost
from fastsae.analysis.least_squares import LeastSquares, r2
from fastsae.eval.metrics import FVU
from fastsae.models.probe import evaluating
from fastsae.models.sites import Site
from fastsae.nn import SAE
from fastsae.nn.gradient_pursuit import gradient_pursuit
from fastsae.types import SparseActs


@dataclass(frozen=True)
class Pursuit:
    """The error of an SAE with its own code and with one of gradient pursuit, on the same rows."""

    own: ErrorAnatomy
    pursuit: ErrorAnatomy
    rows: int
    """To fit on; as many, or all that there are, were held out."""


@dataclass(frozen=True)
class EarlierOutput:
    """How far a linear map of an earlier SAE's output s gives an SAE's error; on rows held out."""

    r2_error: float
    """R^2 of the error, mean over output dimensions."""
    r2_linear: float
    """The same of the linear error."""
    r2_nonlinear: float
    """The same of the nonlinear error."""
    fvu: float
    """Fraction of variance unexplained with the map of s added to the reconstruction."""
    fvu_nonlinear: float
    """The same with the linear error and a map of s to the nonlinear error added."""


@dataclass(frozen=True)
class SAEError:
    """What `dark_matter` found of one SAE, on the rows held out."""

    d_sae: int
    l0: float
    """Mean number of active latents per token."""
    anatomy: ErrorAnatomy
    tokens: TokenErrors
    pursuit: Pursuit | None
    """None where it was not asked for."""
    earlier: dict[str, EarlierOutput]
    """By name, as given."""
    cost: ErrorCost | None
    """None without a model."""


@dataclass(frozen=True)
class DarkMatter:
    """What `dark_matter` found."""

    saes: tuple[SAEError, ...]
    """In the order given."""
    correlation: Tensor = field(repr=False)
    """Of the error norms of tokens between SAEs: float64 `[m, m]`."""
    r2_by_norm: tuple[float, ...]
    """R^2 of each SAE's error norms by a line in those of the first SAE."""
    r2_by_parts: tuple[float, ...]
    """The same by the norms of the first SAE's linear and nonlinear errors."""


def dark_matter(
    saes: Sequence[SAE],
    fit: Tensor,
    held_out: Tensor,
    *,
    pursuit_rows: int = 0,
    earlier: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    model: nn.Module | None = None,
    site: str | Site | tuple[str | Site, str | Site] | None = None,
    contexts: Sequence[Sequence[int]] = (),
    batch_size: int = 4096,
    contexts_per_pass: int = 8,
    drop_prefix: int = 1,
    max_norm: float | None = None,
) -> DarkMatter:
    """Take apart the errors of SAEs of one site.

        found = dark_matter([narrow, wide], store.sample(100_000), held_out.sample(20_000))

    Args:
        saes: of the same columns, narrowest first; in eval mode meanwhile.
        fit: `[n, d_in]`, rows that linear maps are fitted on, as in `error_anatomy`.
        held_out: the same, other rows, of which all numbers are.
        pursuit_rows: how many of each to run gradient pursuit on, the first ones, so rows should
            come in random order; 0: none. Of SAEs with parameters of at least 32 bits.
        earlier: name -> what an SAE at an earlier site gives at the tokens of `fit`, `[n, d]`, and
            of `held_out`.
        model: for what the error costs; None: that is left out.
        site: where the SAEs belong, see `error_cost`.
        contexts: text for that, other than that of `fit`.
        batch_size: rows at a time.
        contexts_per_pass: contexts per forward pass of the model.
        drop_prefix: as in `error_cost`, like max_norm.
        max_norm: rows of a larger norm pass through.

    Raises:
        ValueError: no SAE, SAEs of different columns, rows that do not fit them, or a model without
            a site and contexts.
        TypeError: see `fastsae.nn.gradient_pursuit`.

    Cost: that of `error_anatomy` for every SAE; of pursuit, k encodings of every row.
    """
    if not saes or len({sae.columns for sae in saes}) > 1:
        raise ValueError(
            "dark_matter: expected SAEs of the same columns, got "
            f"{', '.join(str(sae.columns.widths) for sae in saes) or 'none'}"
        )
    if model is not None and (site is None or not contexts):
        raise ValueError("dark_matter: expected a site and contexts with a model, got none")
    if pursuit_rows and saes[0].columns.targets:
        raise ValueError(
            f"dark_matter: expected pursuit_rows = 0 for {type(saes[0]).__name__}, whose output is "
            f"not what it reads, got {pursuit_rows}"
        )
    found = []
    for sae in saes:
        linear = fit_linear_error(sae, fit, batch_size=batch_size)
        cost = None
        if model is not None and site is not None:
            cost = error_cost(
                model, site, sae, linear, contexts, batch_size=contexts_per_pass,
                drop_prefix=drop_prefix, max_norm=max_norm,
            )  # fmt: skip
        found.append(
            SAEError(
                d_sae=sae.d_sae,
                l0=_l0(sae, held_out, batch_size),
                anatomy=anatomy_of(sae, linear, held_out, encode=None, batch_size=batch_size),
                tokens=token_errors(sae, linear, held_out, batch_size=batch_size),
                pursuit=_pursue(sae, fit[:pursuit_rows], held_out[:pursuit_rows], batch_size)
                if pursuit_rows
                else None,
                earlier={
                    name: earlier_output(sae, linear.vector, (fit, held_out), outputs, batch_size)
                    for name, outputs in (earlier or {}).items()
                },
                cost=cost,
            )
        )
    norms = torch.stack([sae.tokens.error for sae in found])
    first = found[0].tokens
    return DarkMatter(
        saes=tuple(found),
        correlation=torch.corrcoef(norms).reshape(len(found), len(found)),
        r2_by_norm=tuple(_r2_of_line([first.error], y) for y in norms),
        r2_by_parts=tuple(_r2_of_line([first.linear, first.nonlinear], y) for y in norms),
    )


def earlier_output(
    sae: SAE,
    B: Tensor,
    rows: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    batch_size: int = 4096,
) -> EarlierOutput:
    """Fit an SAE's error, and both its parts, by linear maps of an earlier SAE's output.

        M = argmin_M sum |e - s M|^2,   and the same of x B and of e - x B

    Args:
        sae: as in `dark_matter`.
        B: of its linear error, `[d_in, d_out]`.
        rows: of the SAE, to fit on and held out.
        outputs: s, at the same tokens.
        batch_size: rows at a time.

    Raises:
        ValueError: outputs are of other numbers of tokens.
    """
    for x, s in zip(rows, outputs, strict=True):
        if s.ndim != 2 or len(s) != len(x):
            raise ValueError(
                f"dark_matter: expected outputs of an earlier SAE to be [n, d] with n = {len(x)}, "
                f"got {[*s.shape]}"
            )
    regression, d_out = LeastSquares(), B.shape[1]
    for (x, y, y_hat), s in _beside(sae, rows[0], outputs[0], batch_size):
        regression.update(s, torch.cat([y - y_hat, x @ B], 1))
    maps = regression.solution()
    parts, after, nonlinear = FVU(), FVU(), FVU()
    for (x, y, y_hat), s in _beside(sae, rows[1], outputs[1], batch_size):
        error, linear = y - y_hat, x @ B
        e_hat, linear_hat = (s @ maps).split(d_out, 1)
        rest_hat = e_hat - linear_hat  # least squares are linear in what they fit
        parts.update(
            torch.cat([error, linear, error - linear], 1),
            torch.cat([e_hat, linear_hat, rest_hat], 1),
        )
        after.update(y, y_hat + e_hat)
        nonlinear.update(y, y_hat + linear + rest_hat)
    by_column = r2(parts.squared_error, parts.squared_deviation).view(3, d_out).nanmean(1)
    r2_error, r2_linear, r2_nonlinear = by_column.tolist()
    return EarlierOutput(r2_error, r2_linear, r2_nonlinear, after.value, nonlinear.value)


def _beside(
    sae: SAE, rows: Tensor, outputs: Tensor, batch_size: int
) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
    """Yield what `reconstructions` does, and the outputs of an earlier SAE there, in float64."""
    found = reconstructions(sae, rows, batch_size)
    for batch, s in zip(found, outputs.split(batch_size), strict=True):
        yield batch, s.to(batch[0])


def _pursue(sae: SAE, fit: Tensor, held_out: Tensor, batch_size: int) -> Pursuit:
    """Compare the SAE's own code with one of gradient pursuit with as many latents per token."""

    def pursue(x: Tensor) -> SparseActs:
        return gradient_pursuit(sae, x, sae.encode_sparse(x).row_counts())

    own = error_anatomy(sae, fit, held_out, batch_size=batch_size)
    pursuit = error_anatomy(sae, fit, held_out, encode=pursue, batch_size=batch_size)
    return Pursuit(own, pursuit, len(fit))


@torch.no_grad()
def _l0(sae: SAE, rows: Tensor, batch_size: int) -> float:
    with evaluating(sae):
        parts = (sae.columns.split(part.to(sae.W_enc_rows))[0] for part in rows.split(batch_size))
        return sum(int(sae.encode_sparse(x).row_counts().sum()) for x in parts) / len(rows)


def _r2_of_line(inputs: Sequence[Tensor], y: Tensor) -> float:
    """Return the R^2 of the best guess of `y: [n]` by a line in inputs `[n]`: of so few numbers to
    fit that none are held out."""
    x = torch.stack([torch.ones_like(y), *inputs], 1)
    residual = y - x @ torch.linalg.lstsq(x.cpu(), y.cpu().unsqueeze(1)).solution.to(y)[:, 0]
    return float(r2(residual.square().sum(), (y - y.mean()).square().sum()))
