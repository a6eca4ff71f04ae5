"""`fastsae serve`: look through all latents of an SAE in a browser."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae.cli.activations import activations_of
from fastsae.cli.console import device_named, emit, positive, progress, say, subcommand

if TYPE_CHECKING:
    from torch import nn

    from fastsae.data import ActivationStore
    from fastsae.interpret import ContextSample
    from fastsae.nn import SAE, NormalizedSAE
    from fastsae.serve import Words

EXAMPLE = """
fastsae serve fastsae-demo
fastsae serve my-sae --activations acts --model ./my-llama
fastsae serve fastsae-demo --port 8000
"""
EXPLANATIONS = "explanations.jsonl"
TOKENS = 1_000_000
DRAWN = 60
"""Windows drawn for each latent: as many as `fastsae interpret` wants by default, so that it uses
the same file."""


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(
        subparsers, "serve", "look through all latents of an SAE in a browser", EXAMPLE, run
    )
    add = parser.add_argument
    add("folder", help="folder of a demo, or of an SAE (with --activations)")
    add("--activations", metavar="STORE", help="folder written by `fastsae harvest`")
    add("--site", action="append", help="which site, if the store has several (default: the SAE's)")
    add("--model", help="folder or hub name, to show text and try some (demo: smollm2)")
    add("--tokenizer", help="folder or hub name, to show text without the model")
    add("--host", default="127.0.0.1", help="where to listen (default: this machine only)")
    add("--port", type=_port, default=0, help="default: a free one")
    add("--tokens", type=positive, help=f"most tokens to sample contexts from ({TOKENS:,})")
    add("--overwrite", action="store_true", help="replace a contexts.safetensors of another SAE")
    add("--device", default="cpu", help="where the SAE and the model run, e.g. cuda")


def run(args: argparse.Namespace) -> None:
    """Sample contexts, unless they are there, and serve until interrupted."""
    from fastsae._files.write import reason
    from fastsae.serve import Dashboard, DashboardServer, Explanations, Live

    folder = Path(args.folder)
    sae, store = _opened(args, folder)
    explanations = Explanations(folder / EXPLANATIONS, sae.d_sae)
    words, model = _model(args, store)
    sample = _contexts(args, folder, sae, store)  # last, as it may take long
    live = None if model is None else Live(model, sae, store.sites, store.manifest)
    dashboard = Dashboard(sae, sample, words, explanations, live)
    try:
        server = DashboardServer(dashboard, args.host, args.port)
    except OSError as error:
        raise OSError(
            f"serve: expected to listen at {args.host}, port {args.port}, got {reason(error)}"
        ) from None
    with server:
        emit({"url": server.url}, args.json, f"{server.url} (Ctrl-C stops it)")
        dashboard.start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")
            # Threads may be inside of torch, which aborts when the interpreter ends under it.
            os._exit(0)


def _opened(args: argparse.Namespace, folder: Path) -> tuple[SAE | NormalizedSAE, ActivationStore]:
    """Return the SAE, and the store of its activations."""
    from fastsae.interop import load

    if not folder.is_dir():
        raise FileNotFoundError(f"serve: expected a folder, got {folder}")
    inner = folder / "sae"
    path = inner if inner.is_dir() else folder
    activations = Path(args.activations or folder / "activations")
    if args.activations is None and not activations.is_dir():
        raise ValueError(
            f"serve: expected {activations}, as a demo makes it, or --activations STORE"
        )
    sae = load(path, device=device_named(args.device))
    return sae, activations_of(sae, activations, args.site)


def _contexts(
    args: argparse.Namespace, folder: Path, sae: SAE | NormalizedSAE, store: ActivationStore
) -> ContextSample:
    """Return the contexts kept in `folder`; sampled now, and kept, if there are none yet."""
    from safetensors import SafetensorError

    from fastsae._files.write import reason
    from fastsae.interpret import ContextSample, sample_contexts
    from fastsae.interpret.sample import CONTEXTS

    path = folder / CONTEXTS
    tokens = min(args.tokens or TOKENS, len(store))
    if path.exists() and not args.overwrite:
        sample = ContextSample.open(path)
        other = sample.not_of(sae, store)
        if args.tokens is not None and sample.tokens != tokens:
            other.append("number of tokens")
        if other:
            raise ValueError(
                f"serve: expected {path} to be of this SAE, store and --tokens, got another "
                f"{' and '.join(other)}; --overwrite samples anew"
            )
        return sample
    say(f"sampling contexts from {tokens:,} of {len(store):,} tokens, once")
    with progress("contexts", tokens, "token") as advance:
        sample = sample_contexts(sae, store, drawn=DRAWN, max_rows=tokens, progress=advance)
    try:
        sample.save(path)
    except (OSError, SafetensorError) as error:
        say(f"contexts are not kept: {path} cannot be written ({reason(error)})")
        return sample
    return ContextSample.open(path)


def _model(
    args: argparse.Namespace, store: ActivationStore
) -> tuple[Words, Callable[[], tuple[nn.Module, Any]] | None]:
    """Return how tokens are shown, and what loads the model if there is one."""
    from fastsae.models.load import SMOLLM2, SMOLLM2_NAME, load_model, load_tokenizer
    from fastsae.serve import Words

    name = args.model
    if name is None and args.tokenizer is None and store.manifest.model == SMOLLM2_NAME:
        name = SMOLLM2
    if name is None and args.tokenizer is None:
        say("tokens are shown as numbers: no --model, and no --tokenizer")
        return Words(), None
    try:
        words = Words(load_tokenizer(args.tokenizer or name))
    except RuntimeError as error:
        if args.model or args.tokenizer:
            raise
        say(f"tokens are shown as numbers: {error}")
        return Words(), None
    if name is None:
        return words, None
    device = device_named(args.device)

    def load() -> tuple[nn.Module, Any]:
        model, tokenizer = load_model(name)
        return model.to(device), tokenizer

    return words, load


def _port(text: str) -> int:
    """Parse a port, or 0."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port in 0..65535, got {text!r}")
    return int(text)
