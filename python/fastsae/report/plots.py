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
        if val_fvu is not None:
            ax.axhline(val_fvu, color=ORANGE, ls="--", label=f"held-out text: {val_fvu:.3f}")
        ax.set(yscale="log", xlabel="training step", title="Variance unexplained (FVU)")
        ticks = [t for t in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1) if _within(t, ax.get_ylim())]
        ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.legend()

    return _svg("training", draw)


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

    return _svg("frequency", draw)


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

    return _svg("alignment", draw)


def _within(x: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= x <= limits[1]


def _svg(name: str, draw: Callable[[Any], None]) -> str:
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
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(
        r'id="(figure|axes|patch|text|line2d|matplotlib|xtick|ytick|legend)[._]\w+"', "", svg
    )
    # What is left is referred to; another plot on the page may use the same names.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
