"""`fastsae convert IN OUT`: an SAE of one format as one of another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastsae.cli.console import emit, subcommand

EXAMPLE = """
fastsae convert downloads/layer_20/width_16k sae
fastsae convert runs/topk sparsify/layers.15 --to sparsify
fastsae convert transcoders layer_3.safetensors --layer 3 --to circuit-tracer
"""


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(
        subparsers, "convert", "read an SAE of any library, write it for another", EXAMPLE, run
    )
    parser.add_argument("source", help="folder or file of an SAE, or hf:OWNER/NAME/FOLDER")
    parser.add_argument("out", help="folder to write; of circuit-tracer, a .safetensors file")
    parser.add_argument(
        "--to",
        default="saelens",
        choices=("saelens", "sparsify", "dictionary-learning", "circuit-tracer"),
        help="format (default: saelens, which is also fastsae's own)",
    )
    parser.add_argument("--from", dest="format", help="format of SOURCE (default: recognized)")
    parser.add_argument("--layer", type=int, help="which one, of files of several layers")
    parser.add_argument("--k", type=int, help="active latents, where files do not say")


def run(args: argparse.Namespace) -> None:
    """Convert and say what was written."""
    from fastsae.interop import load, save

    if Path(args.out).exists() and Path(args.out).samefile(args.source):
        raise ValueError(f"convert: expected OUT to be another path than SOURCE, got {args.out}")
    sae = load(args.source, format=args.format, layer=args.layer, k=args.k)
    save(sae, args.out, format=None if args.to == "saelens" else args.to)
    found = {"out": args.out, "format": args.to, "class": type(sae).__name__}
    emit(found, args.json, f"{args.out}: {type(sae).__name__} for {args.to}")
