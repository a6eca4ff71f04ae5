"""`fastsae eval`: measure an SAE on held-out activations, and spliced into its model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastsae.cli.activations import activations_of
from fastsae.cli.console import device_named, emit, positive, progress, subcommand, table

if TYPE_CHECKING:
    from torch import nn

    from fastsae.data import ActivationStore
    from fastsae.eval import CrossEntropy
    from fastsae.nn import SAE, NormalizedSAE

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
    from fastsae.eval import evaluate
    from fastsae.interop import load

    device = device_named(args.device)
    sae = load(args.sae, device=device)
    store = activations_of(sae, args.store, args.site, split=args.split, partial=args.partial)
    if not len(store):
        raise ValueError(f"eval: expected rows in split {args.split} of {args.store}, got none")
    with progress("evaluate", len(store), "token") as advance:
        numbers: dict[str, float] = evaluate(sae, store, progress=advance).to_dict()
    if args.model:
        from fastsae.models.load import load_model

        model, tokenizer = load_model(args.model)
        loss = loss_on(texts, args.contexts, model.to(device), tokenizer, sae, store)
        numbers |= loss.to_dict()
    emit(numbers, args.json, table([(name, f"{value:.6g}") for name, value in numbers.items()]))


def loss_on(
    texts: list[str],
    n: int,
    model: nn.Module,
    tokenizer: Any,
    sae: SAE | NormalizedSAE,
    store: ActivationStore,
) -> CrossEntropy:
    """Splice an SAE into its model on up to `n` contexts of texts, cut as those of its store."""
    from fastsae.eval import cross_entropy
    from fastsae.models.chunks import chunks, spread

    manifest = store.manifest
    every = chunks(tokenizer, texts, manifest.context, manifest.prefix_id)
    contexts = spread([chunk.ids for chunk in every], n)
    with progress("cross entropy", 4 * len(contexts), "context") as advance:
        return cross_entropy(
            model,
            store.site if len(store.sites) == 1 else store.sites,
            sae,
            contexts,
            drop_prefix=manifest.drop_prefix,
            max_norm=store.max_norm,
            progress=advance,
        )
