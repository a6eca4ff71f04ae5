"""`fastsae inspect PATH`: what a trained SAE, or a folder of activations, holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastsae.cli.console import emit, subcommand, table


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(
        subparsers,
        "inspect",
        "show what an SAE or a folder of activations holds",
        "fastsae inspect fastsae-demo/sae\nfastsae inspect fastsae-demo/activations --json",
        run,
    )
    parser.add_argument("path", help="folder of an SAE, or of a harvest")


def run(args: argparse.Namespace) -> None:
    """Print the facts of a folder."""
    from fastsae._files.read import printable

    path = Path(args.path)
    if any((path / name).exists() for name in ("manifest.json", "manifest.partial.json")):
        facts = _store(path)
    elif (path / "cfg.json").exists():
        facts = _sae(path)
    else:
        what = "no manifest.json or cfg.json in it" if path.is_dir() else "no such folder"
        raise FileNotFoundError(f"inspect: expected an SAE or a harvest, got {path}: {what}")
    emit(facts, args.json, table([(name, printable(str(value))) for name, value in facts.items()]))


def _store(path: Path) -> dict[str, Any]:
    from fastsae.data.shards import Manifest, open_shard

    manifest = Manifest.read(path, partial=True)
    return {
        "kind": "activations",
        "complete": manifest.complete,
        "model": manifest.model,
        "sites": manifest.sites,
        "dtype": manifest.dtype,
        "rows": {split: manifest.rows(split) for split in ("train", "val")},
        "documents": manifest.documents,
        "shards": len(manifest.shards),
        "bytes": sum(open_shard(path, s).path.stat().st_size for s in manifest.shards),
        "context": manifest.context,
        "dropped": manifest.dropped,
        "max_norm": manifest.max_norm,
    }


def _sae(path: Path) -> dict[str, Any]:
    import torch

    from fastsae.interop import load

    sae = load(path)
    encoder, decoder = sae.W_enc.detach().t().float(), sae.W_dec.detach().float()
    cosine = torch.cosine_similarity(encoder, decoder, dim=1)
    return {
        "kind": type(sae).__name__,
        **sae.config(),
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in sae.parameters()),
        "decoder_norm": _spread(decoder.norm(dim=1)),
        "encoder_norm": _spread(encoder.norm(dim=1)),
        "encoder_decoder_cosine": _spread(cosine),
        "finite": all(bool(p.isfinite().all()) for p in sae.parameters()),
        "metadata": sae.metadata,
    }


def _spread(x: Any) -> dict[str, float]:
    return {
        name: round(float(value), 4)
        for name, value in (("min", x.min()), ("median", x.median()), ("max", x.max()))
    }
