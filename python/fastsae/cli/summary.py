"""What the demo says about a finished run: for the terminal, and for the report."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import fastsae
from fastsae.cli.console import table
from fastsae.models.load import SMOLLM2, SMOLLM2_NAME

if TYPE_CHECKING:
    from fastsae.data import ActivationStore
    from fastsae.eval import CrossEntropy, EvalResult


def facts(
    args: argparse.Namespace,
    train: ActivationStore,
    seconds: dict[str, float],
    history: Sequence[dict[str, float]],
) -> dict[str, str]:
    """Return the lines of "How this was made"."""
    import torch

    manifest = train.manifest
    length = f"{args.epochs:g} epochs"
    if args.steps or args.time_budget:
        length = f"{int(history[-1]['step']):,} steps"
        length += f" in {args.time_budget.text}" if args.time_budget else ""
    return {
        "Model": f"{SMOLLM2_NAME if args.model == SMOLLM2 else args.model}, site {args.site}",
        "Text": ", ".join(args.text) if args.text else "the language reference in Python's help()",
        "Tokens": f"{len(train):,} for training, {manifest.rows('val'):,} of other documents held "
        f"out; left out were {manifest.dropped['prefix']:,} starts of contexts and "
        f"{manifest.dropped['norm']:,} tokens of more than 3 times the median norm",
        "SAE": f"TopK, k = {args.k}, {args.expansion * train.d_in:,} latents, peak learning rate "
        f"{max(row['lr'] for row in history):.3g}, {length}, seed {args.seed}",
        "Time": ", ".join(f"{phase} {value:.0f} s" for phase, value in seconds.items()),
        "Versions": f"fastsae {fastsae.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
    }


def summary(result: EvalResult, ce: CrossEntropy, seconds: dict[str, float], out: Path) -> str:
    """Return the table that ends the demo."""
    by_mean, by_zero = ce.fraction_recovered_mean, ce.fraction_recovered_zero
    return table(
        [
            ("cross entropy", f"{ce.clean:.3f} nats clean, {ce.sae:.3f} through the SAE"),
            ("ablated", f"{ce.mean:.3f} by the mean, {ce.zero:.3f} by zero"),
            ("recovered", f"{100 * by_mean:.1f}% against mean, {100 * by_zero:.1f}% against zero"),
            ("FVU", f"{result.fvu:.4f} on {result.rows:,} held-out tokens"),
            ("L0", f"{result.l0:.1f}"),
            ("dead latents", f"{result.dead:,} of {result.d_sae:,}"),
            ("time", f"{sum(seconds.values()):.0f} s"),
            ("SAE", f"{out / 'sae'} (open with fastsae.load)"),
            ("report", f"{out / 'report.html'} (open in a browser)"),
        ]
    )
