"""`fastsae harvest`: store a model's activations over text files."""

from __future__ import annotations

import argparse
from typing import Any

from fastsae.cli.console import device_named, emit, positive, progress, subcommand

EXAMPLE = """
fastsae harvest --model ./my-llama --text corpus.jsonl --site resid_post.12 --out acts
fastsae harvest --model smollm2 --text a.txt b.txt --site mlp_in.3 --site mlp_out.3 --out acts
fastsae harvest --model ./my-llama --text more.jsonl --site resid_post.12 --out acts --append
"""


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(
        subparsers, "harvest", "store a model's activations over text files", EXAMPLE, run
    )
    parser.add_argument("--model", required=True, help="folder or hub name, or smollm2 (bundled)")
    parser.add_argument(
        "--text", required=True, nargs="+", metavar="FILE",
        help="UTF-8 text, one document per file; or .jsonl with a field 'text' per line",
    )  # fmt: skip
    parser.add_argument(
        "--site", required=True, action="append",
        help="resid_post.L, mlp_in.L, mlp_out.L, attn_z.L, or a module path; may be repeated",
    )  # fmt: skip
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--tokens", type=positive, help="stop after this many (default: all)")
    parser.add_argument("--context", type=positive, default=256, help="tokens per context")
    parser.add_argument("--batch-size", type=positive, default=8, help="contexts per forward pass")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32", "int8"),
        help="default: float16; int8 is half of it, with one scale for each row",
    )  # fmt: skip
    parser.add_argument(
        "--max-norm-ratio", type=float, default=3.0,
        help="drop tokens above this many times the median norm (default 3; 0 keeps all)",
    )  # fmt: skip
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, help="share of documents held out"
    )
    parser.add_argument(
        "--gradients", action="store_true",
        help="also store the loss's gradient at each site, for --arch gradient (dtype bfloat16)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where the model runs, e.g. cuda")
    parser.add_argument("--overwrite", action="store_true", help="replace a harvest in --out")
    parser.add_argument(
        "--append", action="store_true", help="add to the harvest in --out, of the same settings"
    )


def run(args: argparse.Namespace) -> None:
    """Harvest and print where the activations are."""
    from fastsae.models.text import read_files

    texts = read_files(args.text)
    from fastsae.data import harvest
    from fastsae.models.load import load_model

    device = device_named(args.device)
    model, tokenizer = load_model(args.model)
    with progress("harvest", args.tokens, "token") as advance:
        manifest = harvest(
            model.to(device),
            tokenizer,
            texts,
            args.site,
            args.out,
            context=args.context,
            batch_size=args.batch_size,
            max_tokens=args.tokens,
            dtype=args.dtype or ("bfloat16" if args.gradients else "float16"),
            gradients=args.gradients,
            max_norm_ratio=args.max_norm_ratio or None,
            val_fraction=args.val_fraction,
            overwrite=args.overwrite,
            append=args.append,
            progress=advance,
        )
    train, val = manifest.rows("train"), manifest.rows("val")
    result = {"out": args.out, "train": train, "val": val, "dropped": manifest.dropped}
    text = f"{args.out}: {train} training rows, {val} held-out rows of {', '.join(args.site)}"
    emit(result, args.json, text)
