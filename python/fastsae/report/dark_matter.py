"""One HTML page about what SAEs of a site leave out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastsae._files.write import write_atomic
from fastsae.analysis.dark_matter import DarkMatter, SAEError
from fastsae.report.html import figure_list, page, plot_list, table_rows
from fastsae.report.plots import BLUE, GRAY, ORANGE, svg

POINTS = 1500
"""Most tokens in a plot of tokens."""


def write_dark_matter(
    path: str | os.PathLike[str],
    found: DarkMatter,
    *,
    title: str = "Dark matter",
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write a page about what `fastsae.analysis.dark_matter` found.

    Args:
        path: the HTML file.
        found: of one or several SAEs; what is about a single one is of the last.
        title: of the page.
        facts: lines for "How this was made".

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    body = _BODY.format(
        figures=figure_list(_figures(found)),
        numbers="".join(
            f"<h2>{name}</h2><table>\n{table_rows(rows)}\n</table>" for name, rows in _tables(found)
        ),
        plots=plot_list(_plots(found)),
        facts=table_rows(list((facts or {}).items())),
    )
    write_atomic(path, page(title, body))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _figures(found: DarkMatter) -> list[tuple[str, str]]:
    last = found.saes[-1]
    shown = [
        (_percent(last.anatomy.fvu), "of the variance is not reconstructed: the error"),
        (_percent(last.anatomy.r2_vector), "of the error vector follows from x by a linear map"),
        (_percent(last.anatomy.r2_norm), "of how its squared norm varies between tokens does"),
    ]
    if last.cost is not None:
        recovered = _percent(last.cost.recovered_by_linear)
        shown.append((recovered, "of the loss comes back when the linear error is added"))
    if len(found.saes) > 1:
        correlation = f"{float(found.correlation[0, -1]):.2f}"
        shown.append((correlation, "correlation of a token's error in the first and last SAE"))
    return shown


Rows = list[tuple[str, ...]]


def _tables(found: DarkMatter) -> list[tuple[str, Rows]]:
    last = found.saes[-1]
    tables = [(f"{_name(sae)}", _anatomy(sae)) for sae in found.saes]
    if len(found.saes) > 1:
        tables.append(("Do wider SAEs fail on the same tokens?", _widths(found)))
    if last.pursuit is not None:
        tables.append((f"Gradient pursuit instead of the encoder, {_name(last)}", _pursuit(last)))
    if last.earlier:
        tables.append((f"Linear maps of earlier SAEs' outputs, {_name(last)}", _earlier(last)))
    return tables


def _name(sae: SAEError) -> str:
    return f"{sae.d_sae:,} latents, L0 {sae.l0:.1f}"


def _anatomy(sae: SAEError) -> Rows:
    a = sae.anatomy
    rows: Rows = [
        ("FVU", f"{a.fvu:.4f}", "fraction of variance unexplained by the SAE"),
        ("FVU, nonlinear", f"{a.fvu_nonlinear:.4f}",
         "what a linear map of the SAE's input, added to its output, leaves"),
        ("R² of the error", f"{a.r2_vector:.3f}",
         "by a linear map of x, mean over dimensions; the paper's number"),
        ("R² of the error, pooled", f"{a.r2_vector_pooled:.3f}", "sums over all dimensions"),
        ("R² of its squared norm", f"{a.r2_norm:.3f}", "by a linear function of x"),
    ]  # fmt: skip
    if sae.cost is not None:
        c = sae.cost
        rows += [
            ("Cross entropy", f"{c.clean:.3f}",
             f"of the untouched model; nats per token over {c.tokens:,} predictions"),
            ("… through the SAE", f"{c.sae:.3f}", f"{c.sae - c.clean:+.3f}"),
            ("… with the linear error added", f"{c.linear_added:.3f}",
             f"{_percent(c.recovered_by_linear)} of the loss recovered"),
            ("… with the nonlinear error added", f"{c.nonlinear_added:.3f}",
             f"{_percent(c.recovered_by_nonlinear)} of the loss recovered"),
        ]  # fmt: skip
    return rows


def _widths(found: DarkMatter) -> Rows:
    return [
        (
            _name(sae),
            f"{float(found.correlation[0, i]):.3f}",
            f"correlation of its tokens' errors with those at {found.saes[0].d_sae:,}; R² by a "
            f"line in them {found.r2_by_norm[i]:.3f}, in their parts {found.r2_by_parts[i]:.3f}",
        )
        for i, sae in enumerate(found.saes)
    ]


def _pursuit(sae: SAEError) -> Rows:
    assert sae.pursuit is not None
    own, new = sae.pursuit.own, sae.pursuit.pursuit
    return [
        ("FVU", f"{new.fvu:.4f}", f"{own.fvu:.4f} with the encoder's code on the same rows"),
        ("FVU, nonlinear", f"{new.fvu_nonlinear:.4f}",
         f"{own.fvu_nonlinear:.4f} with the encoder's code; {sae.pursuit.rows:,} rows to fit"),
    ]  # fmt: skip


def _earlier(sae: SAEError) -> Rows:
    return [
        (
            name,
            f"{e.fvu:.4f}",
            f"FVU with the map added ({sae.anatomy.fvu:.4f} without), nonlinear "
            f"{e.fvu_nonlinear:.4f} with one of its own ({sae.anatomy.fvu_nonlinear:.4f} without); "
            f"R² of the error {e.r2_error:.3f}, of its linear part {e.r2_linear:.3f}, of the "
            f"nonlinear {e.r2_nonlinear:.3f}",
        )
        for name, e in sae.earlier.items()
    ]


def _plots(found: DarkMatter) -> list[tuple[str, str]]:
    last = found.saes[-1]
    shown = [
        (_by_width(found), "Each bar is an SAE: what a linear map of its input could still give, "
         "and what it could not."),
        (_norms(last), "Each dot is a token. On the line, its error's squared norm is what a "
         f"linear function of x says ({_name(last)})."),
    ]  # fmt: skip
    if len(found.saes) > 1:
        shown.append((_against(found), "Each dot is a token: the norm of its error in two SAEs."))
    if last.cost is not None:
        shown.append((_costs(found.saes), "Share of the loss of the splice that comes back when "
                      "either part of the error is added, beside that part's share of the squared "
                      "error."))  # fmt: skip
    if last.pursuit is not None or last.earlier:
        shown.append((_remedies(last), f"What is left with each remedy ({_name(last)})."))
    return shown


def _by_width(found: DarkMatter) -> str:
    labels = [f"{sae.d_sae:,}" for sae in found.saes]
    parts = [(sae.anatomy.fvu, sae.anatomy.fvu_nonlinear) for sae in found.saes]
    return svg("widths", lambda ax: _bars(ax, labels, parts, "What is not reconstructed"))


def _bars(ax: Any, labels: Sequence[str], parts: Sequence[tuple[float, float]], title: str) -> None:
    at = list(range(len(labels)))
    nonlinear = [part for _, part in parts]
    linear = [whole - part for whole, part in parts]
    ax.barh(at, nonlinear, color=BLUE, label="nonlinear", height=0.6)
    ax.barh(at, linear, left=nonlinear, color=ORANGE, label="linear in x", height=0.6)
    ax.set_yticks(at, labels)
    ax.set(xlabel="FVU", title=title)
    ax.set_ylim(len(labels) + 0.3, -0.6)
    ax.legend(ncols=2, loc="lower right")


def _chosen(n: int) -> torch.Tensor:
    return torch.linspace(0, n - 1, min(n, POINTS), dtype=torch.float64).long()


def _norms(sae: SAEError) -> str:
    chosen = _chosen(len(sae.tokens.error))
    actual = sae.tokens.error.cpu()[chosen].square()
    predicted = sae.tokens.predicted_square.cpu()[chosen]

    def draw(ax: Any) -> None:
        ax.plot(predicted.tolist(), actual.tolist(), ".", ms=2.5, color=BLUE, alpha=0.5)
        ends = [float(actual.min()), float(actual.max())]
        ax.plot(ends, ends, color=GRAY, lw=1)
        ax.set(xlabel="predicted from x", ylabel="squared norm", title="Error of each token")
        ax.locator_params(axis="x", nbins=5)

    return svg("norms", draw)


def _against(found: DarkMatter) -> str:
    first, last = found.saes[0], found.saes[-1]
    chosen = _chosen(len(first.tokens.error))

    def draw(ax: Any) -> None:
        x, y = (sae.tokens.error.cpu()[chosen].tolist() for sae in (first, last))
        ax.plot(x, y, ".", ms=2.5, color=BLUE, alpha=0.5)
        ax.set(xlabel=f"{first.d_sae:,} latents", ylabel=f"{last.d_sae:,} latents",
               title="Error norm of each token")  # fmt: skip

    return svg("against", draw)


def _costs(saes: Sequence[SAEError]) -> str:
    def draw(ax: Any) -> None:
        for i, sae in enumerate(saes):
            if sae.cost is None:
                continue
            nonlinear = sae.anatomy.fvu_nonlinear / sae.anatomy.fvu
            parts = (1 - nonlinear, sae.cost.recovered_by_linear, nonlinear,
                     sae.cost.recovered_by_nonlinear)  # fmt: skip
            colors = (GRAY, ORANGE, GRAY, BLUE)
            names = ("share of the squared error", "linear added", None, "nonlinear added")
            for j, (part, color, name) in enumerate(zip(parts, colors, names, strict=True)):
                at = i + 0.19 * (j - 1.5)
                ax.bar(at, part, 0.18, color=color, label=None if i else name)
        ax.set_xticks(range(len(saes)), [f"{sae.d_sae:,}" for sae in saes])
        ax.set(ylabel="share of the loss recovered", title="What each part costs")
        ax.set_ylim(top=1.35)
        ax.legend(fontsize=8)

    return svg("costs", draw)


def _remedies(sae: SAEError) -> str:
    rows = [("SAE", sae.anatomy.fvu, sae.anatomy.fvu_nonlinear)]
    if sae.pursuit is not None:
        own, new = sae.pursuit.own, sae.pursuit.pursuit
        rows.append(("SAE, fewer rows", own.fvu, own.fvu_nonlinear))
        rows.append(("pursuit", new.fvu, new.fvu_nonlinear))
    rows += [(f"+ {name}", e.fvu, e.fvu_nonlinear) for name, e in sae.earlier.items()]
    labels = [name for name, *_ in rows]
    parts = [(fvu, nonlinear) for _, fvu, nonlinear in rows]

    return svg("remedies", lambda ax: _bars(ax, labels, parts, "Remedies"))


_BODY = """<p class="lead">A sparse autoencoder (SAE) does not reconstruct all of an activation x.
Here is what it leaves out: how much of the error is a <b>linear</b> function of x, which may be
features that are not learned yet, and how much is not: the <b>nonlinear</b> error, some of which
the SAE itself brings in (Engels et al. 2024).</p>
<ul class="figures">{figures}</ul>
{numbers}
<h2>Plots</h2>
<div class="plots">{plots}</div>
<h2>How this was made</h2>
<table>
{facts}
</table>"""
