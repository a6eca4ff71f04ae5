"""Pieces of a report as HTML; every string that comes from a model or a user is escaped here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from fastsae._files.read import visible
from fastsae.analysis.examples import Context, Latent


def page(title: str, body: str) -> str:
    """Return a whole page; `body` is HTML, `title` is not."""
    css = Path(__file__).with_name("report.css").read_text()
    return _PAGE.format(title=escape(title), css=css, body=body)


def figure_list(shown: Sequence[tuple[str, str]]) -> str:
    """Return the few numbers to look at first: what is shown large, and what it says."""
    return "".join(f"<li><b>{value}</b><span>{text}</span></li>" for value, text in shown)


def plot_list(shown: Sequence[tuple[str, str]]) -> str:
    """Return plots, which are `<svg>`, with their captions."""
    return "".join(f"<figure>{svg}<figcaption>{text}</figcaption></figure>" for svg, text in shown)


def table_rows(rows: Sequence[tuple[str, ...]]) -> str:
    """Return `<tr>`s: the first cell is the head; of three, the second is a number."""
    out = []
    for head, *cells in rows:
        kinds = ["<td>"] if len(cells) == 1 else ['<td class="n">', "<td>"]
        tds = "".join(f"{kind}{escape(c)}</td>" for kind, c in zip(kinds, cells, strict=True))
        out.append(f'<tr><th scope="row">{escape(head)}</th>{tds}</tr>')
    return "\n".join(out)


def latent_section(latent: Latent, promoted: Sequence[int], decode: Callable[[int], str]) -> str:
    """Return one latent: its facts, and its contexts aligned at the strongest token.

    Args:
        latent: the latent.
        promoted: tokens it promotes; empty if not known.
        decode: token id to text.
    """
    facts = (
        f"fires on {100 * latent.frequency:.2f}% of tokens · strongest {latent.max_act:.1f} · "
        f"selectivity {latent.selectivity:.1f}"
    )
    if promoted:
        words = " ".join(f"<code>{show(decode(i))}</code>" for i in promoted)
        facts += f"<br>promotes (logit lens) {words}"
    lines = "\n".join(_context(context, latent.max_act, decode) for context in latent.contexts)
    return (
        f'<section class="latent" id="latent-{latent.index}"><h3>Latent {latent.index}</h3>'
        f'<span class="meta">{facts}</span><ol class="contexts">\n{lines}\n</ol></section>'
    )


def _context(context: Context, max_act: float, decode: Callable[[int], str]) -> str:
    cells = []
    for place, (token, act) in enumerate(zip(context.token_ids, context.acts, strict=True)):
        text = show(decode(token))
        if act > 0:
            peak = ' class="peak"' if place == context.peak else ""
            shade = f"background:rgba(var(--hot),{0.08 + 0.62 * act / max_act:.2f})"
            text = f'<i{peak} style="{shade}" title="{act:.2f}">{text}</i>'
        cells.append(text)
    before, after = "".join(cells[: context.peak]), "".join(cells[context.peak :])
    return (
        f'<li><span class="v">{context.acts[context.peak]:.1f}</span>'
        f'<span class="before"><bdi>{before}</bdi></span>'
        f'<span class="after"><bdi>{after}</bdi></span></li>'
    )


def show(token: str) -> str:
    """Return a token as HTML: escaped, with line breaks, tabs and control characters visible."""
    return escape(visible(token))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
