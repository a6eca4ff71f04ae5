"""`fastsae report`: one HTML page about an SAE, to read, mail or archive."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

from fastsae.cli.activations import activations_of
from fastsae.cli.console import emit, positive, progress, subcommand, table
from fastsae.cli.evaluate import loss_on

EXAMPLE = """
fastsae report sae acts
fastsae report sae acts --model ./my-llama --text held_out.txt --out report.html
"""


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(
        subparsers,
        "report",
        "write one HTML page about an SAE: numbers, plots, latents",
        EXAMPLE,
        run,
    )
    add = parser.add_argument
    add("sae", help="folder of the SAE")
    add("store", help="folder written by `fastsae harvest`")
    add("--site", action="append", help="which site, if the store has several (default: the SAE's)")
    add("--model", help="whose tokens these are, and what --text runs through (default: the "
        "store's model, its tokenizer only)")  # fmt: skip
    add("--text", nargs="+", metavar="FILE", help="held-out text for --model")
    add("--contexts", type=positive, default=24, help="contexts to predict (default 24)")
    add("--latents", type=positive, default=50, help="latents to show (default 50)")
    add("--tokens", type=positive, default=200_000, help="tokens searched for examples (200,000)")
    add("--out", default="report.html", help="file to write (default: report.html)")


def run(args: argparse.Namespace) -> None:
    """Evaluate on held-out rows, look for examples in the others, and write the page."""
    if args.text and not args.model:
        raise ValueError("report: expected --model together with --text, got --text alone")
    from fastsae.models.text import read_files

    texts = read_files(args.text) if args.text else []
    import torch

    import fastsae
    from fastsae.eval import evaluate
    from fastsae.interop import load
    from fastsae.models.load import load_model, load_tokenizer
    from fastsae.nn import SAE
    from fastsae.report import write_report
    from fastsae.train.metrics import read_metrics

    sae = load(args.sae)
    if not isinstance(sae, SAE):
        raise ValueError(f"report: expected an SAE in {args.sae}, got {type(sae).__name__}")
    train, val = (activations_of(sae, args.store, args.site, split=s) for s in ("train", "val"))
    if len(train.sites) > 1:
        raise ValueError(f"report: expected an SAE of one site, got one of {train.site}")
    if not len(val):
        raise ValueError(f"report: expected held-out rows in {args.store}, got none")
    model, ce = None, None
    if args.model:
        model, tokenizer = load_model(args.model)
    else:
        tokenizer = load_tokenizer(train.manifest.model)
    with progress("evaluate", len(val), "token") as advance:
        result = evaluate(sae, val, progress=advance)
    if model is not None and texts:
        ce = loss_on(texts, args.contexts, model, tokenizer, sae, val)
    facts = {
        "SAE": f"{type(sae).__name__}, {sae.d_sae:,} latents, from {args.sae}",
        "Activations": f"{train.manifest.model}, site {train.site}; {len(train):,} rows for "
        f"training, {len(val):,} of other documents held out, from {args.store}",
        "Versions": f"fastsae {fastsae.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
    }
    write_report(
        args.out,
        sae,
        train,
        tokenizer,
        result,
        model=model,
        cross_entropy=ce,
        history=read_metrics(Path(args.sae)),
        facts=facts,
        n_latents=args.latents,
        max_rows=args.tokens,
    )
    numbers: dict[str, Any] = {**result.to_dict(), **(ce.to_dict() if ce else {})}
    shown = [(name, f"{value:.6g}") for name, value in numbers.items()]
    emit({**numbers, "report": args.out}, args.json, table([*shown, ("report", args.out)]))
