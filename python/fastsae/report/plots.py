"""The plots of a report, as inline SVG that reads on light and dark ground."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae.nn import SAE

GRAY, BLUE, ORANGE = "#8a8a8a", "#3b82f6", "#f08c2e"
HELD_OUT = {"val_fvu": "held-out text", "val_fvu_sample": "sample of held-out text"}
TIMES = {0.1: "0.1 s", 1: "1 s", 3: "3 s", 10: "10 s", 30: "30 s", 60: "1 min", 180: "3 min"}
TIMES |= {600: "10 min", 1800: "30 min", 3600: "1 h", 10800: "3 h", 36000: "10 h", 86400: "24 h"}
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "axes.titlesize": 10.5,
    "axes.titlecolor": GRAY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "legend.labelcolor": GRAY,
    "legend.frameon": False,
    "grid.color": GRAY,
    "grid.alpha": 0.25,
}


def training_curve(history: Sequence[dict[str, float]], val_fvu: float | None = None) -> str:
    """Plot the variance unexplained against the training step, both log scaled."""

    def draw(ax: Any) -> None:
        steps = [row["step"] for row in history]
        ax.plot(steps, [row["fvu"] for row in history], color=BLUE, label="training batches")
        name, points = held_out(history)
        if len(points) > 1:
            at, fvu = [row["step"] for row in points], [row[name] for row in points]
            ax.plot(at, fvu, color=ORANGE, marker="o", ms=3, label=HELD_OUT[name])
        if val_fvu is not None:
            ax.axhline(val_fvu, color=ORANGE, ls="--", label=f"held-out text: {val_fvu:.3f}")
        ax.set(yscale="log", xlabel="training step", title="Variance unexplained (FVU)")
        _fvu_ticks(ax)
        ax.legend()

    return svg("training", draw)


def held_out(history: Sequence[dict[str, float]]) -> tuple[str, list[dict[str, float]]]:
    """Return what to draw of held-out text as a curve: the name, and the rows that have it.

    It is the FVU on all validation rows, or on the sample of them, whichever was measured more
    often; never some points of one and some of the other.
    """
    found = {name: [row for row in history if name in row] for name in HELD_OUT}
    name = max(found, key=lambda name: len(found[name]))
    return name, found[name]


def time_curve(history: Sequence[dict[str, float]]) -> str | None:
    """Plot the held-out FVU against the seconds of training, both log scaled.

    Returns:
        None if `history` has less than two points with a time.
    """
    name, points = held_out(history)
    points = [row for row in points if row.get("seconds", 0.0) > 0]
    if len(points) < 2:
        return None

    def draw(ax: Any) -> None:
        seconds = [row["seconds"] for row in points]
        ax.plot(seconds, [row[name] for row in points], color=ORANGE, marker="o", ms=4)
        for row, at in zip(points, seconds, strict=True):
            ax.annotate(
                f"{int(row['step']):,}", (at, row[name]), (0, 6), textcoords="offset points",
                ha="center", color=GRAY, fontsize=8,
            )  # fmt: skip
        ax.set(
            xscale="log", yscale="log", xlabel="time of training", title=f"FVU, {HELD_OUT[name]}"
        )
        ticks = [t for t in TIMES if _within(t, ax.get_xlim())]
        ax.set_xticks(list(ticks), [TIMES[t] for t in ticks])
        _fvu_ticks(ax)
        ax.margins(y=0.12)

    return svg("time", draw)


def firing_frequency(frequency: Tensor) -> str:
    """Plot how many latents fire how often, from `[d_sae]` shares of the tokens."""
    alive = frequency[frequency > 0]

    def draw(ax: Any) -> None:
        low = float(alive.min().log10()) if len(alive) else -4.0
        bins = torch.logspace(min(low, -3.0) - 0.1, 0, 41, dtype=torch.float64)
        ax.hist(alive.tolist(), bins=bins.tolist(), color=BLUE)
        ax.set(
            xscale="log",
            xlabel="share of tokens on which a latent fires",
            ylabel="latents",
            title="How often latents fire",
        )
        ticks = [t for t in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0) if t >= float(bins[0])]
        ax.set_xticks(ticks, [f"{100 * t:g}%" for t in ticks])

    return svg("frequency", draw)


def alignment(sae: SAE) -> str:
    """Plot the cosine between what makes each latent fire and what it writes."""
    encoder, decoder = sae.W_enc.detach().t().float().cpu(), sae.W_dec.detach().float().cpu()
    cosine = torch.cosine_similarity(encoder, decoder, dim=1)

    def draw(ax: Any) -> None:
        ax.hist(cosine.tolist(), bins=50, range=(min(0.0, float(cosine.min())), 1.0), color=BLUE)
        ax.set(
            xlabel="cosine of encoder and decoder direction",
            ylabel="latents",
            title="Reading vs. writing direction",
        )

    return svg("alignment", draw)


def _fvu_ticks(ax: Any) -> None:
    every = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1)
    ticks = [t for t in every if _within(t, ax.get_ylim())]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()


def _within(x: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= x <= limits[1]


def svg(name: str, draw: Callable[[Any], None]) -> str:
    """Return what `draw` draws as an `<svg>` element that refers to nothing outside itself.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError(
            "report: matplotlib not installed; run: pip install 'fastsae[report]'"
        ) from None
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        ax = figure.add_subplot()
        draw(ax)
        ax.grid(True)
        ax.set_axisbelow(True)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()[file.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(
        r'id="(figure|axes|patch|text|line2d|matplotlib|xtick|ytick|legend)[._]\w+"', "", text
    )
    # What is left is referred to; another plot on the page may use the same names.
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
