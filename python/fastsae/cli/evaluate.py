"""`fastsae eval`: measure an SAE on held-out activations, and spliced into its model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastsae.cli.console import device_named, emit, positive, progress, subcommand, table

EXAMPLE = """
fastsae eval sae acts
fastsae eval sae acts --model ./my-llama --text held_out.txt --json
"""


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(
        subparsers, "eval", "measure an SAE on held-out activations and text", EXAMPLE, run
    )
    parser.add_argument("sae", help="folder of the SAE")
    parser.add_argument("store", help="folder written by `fastsae harvest`")
    parser.add_argument(
        "--site", action="append",
        help="which site, if the store has several (default: what the SAE was trained on)",
    )  # fmt: skip
    parser.add_argument("--split", default="val", choices=("train", "val"))
    parser.add_argument("--model", help="also splice the SAE into this model (with --text)")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="held-out text for --model")
    parser.add_argument(
        "--contexts", type=positive, default=24, help="contexts to predict (default 24)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--partial", action="store_true", help="use what is there of an interrupted harvest"
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate and print the numbers."""
    if bool(args.model) != bool(args.text):
        raise ValueError("eval: expected --model and --text together, got one of them")
    from fastsae.models.text import read_files

    texts = read_files(args.text) if args.text else []
    from fastsae.data import ActivationStore
    from fastsae.data.shards import Manifest
    from fastsae.eval import evaluate
    from fastsae.interop import load
    from fastsae.interop.hooks import sites_in

    device = device_named(args.device)
    sae = load(args.sae, device=device)
    trained_on = sites_in(sae.metadata)
    manifest = Manifest.read(Path(args.store), partial=args.partial)
    known = set(trained_on) <= set(manifest.sites)
    sites = args.site or (trained_on if known else None)
    store = ActivationStore(args.store, sites, split=args.split, partial=args.partial)
    if not len(store):
        raise ValueError(f"eval: expected rows in split {args.split} of {args.store}, got none")
    with progress("evaluate", len(store), "token") as advance:
        numbers: dict[str, float] = evaluate(sae, store, progress=advance).to_dict()
    if args.model:
        from fastsae.eval import cross_entropy
        from fastsae.models.chunks import chunks, spread
        from fastsae.models.load import load_model

        model, tokenizer = load_model(args.model)
        every = chunks(tokenizer, texts, manifest.context, manifest.prefix_id)
        contexts = spread([chunk.ids for chunk in every], args.contexts)
        with progress("cross entropy", 4 * len(contexts), "context") as advance:
            numbers |= cross_entropy(
                model.to(device),
                store.site if len(store.sites) == 1 else store.sites,
                sae,
                contexts,
                drop_prefix=manifest.drop_prefix,
                max_norm=store.max_norm,
                progress=advance,
            ).to_dict()
    emit(numbers, args.json, table([(name, f"{value:.6g}") for name, value in numbers.items()]))
