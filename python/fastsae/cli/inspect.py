"""`fastsae inspect`: what an SAE or a folder of activations holds, or what a model's sites are."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastsae.cli.console import emit, subcommand, table

EXAMPLE = """
fastsae inspect fastsae-demo/sae
fastsae inspect fastsae-demo/activations --json
fastsae inspect --model ./my-llama --site mlp_out.3
"""

ROUNDING = "one scale for each row; an entry is off by at most max |row| / 254"


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(
        subparsers,
        "inspect",
        "show what an SAE or a folder of activations holds, or what a model's sites are",
        EXAMPLE,
        run,
    )
    parser.add_argument("path", nargs="?", help="folder of an SAE, or of a harvest")
    parser.add_argument("--layer", type=int, help="which SAE, of files of several layers")
    parser.add_argument("--model", help="a model instead, as in `fastsae harvest`")
    parser.add_argument(
        "--site", action="append",
        help="which sites of the model (default: all kinds, in the block in the middle)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Print the facts of a folder."""
    from fastsae._files.read import printable

    if (args.path is None) == (args.model is None):
        raise ValueError("inspect: expected a folder or --model, and not both")
    if args.site and args.model is None:
        raise ValueError("inspect: expected --site together with --model")
    if args.model is not None:
        _sites(args)
        return
    path = Path(args.path)
    if any((path / name).exists() for name in ("manifest.json", "manifest.partial.json")):
        facts = _store(path)
    elif path.exists():
        facts = _sae(path, args.layer)
    else:
        raise FileNotFoundError(f"inspect: expected an SAE or a harvest, got {path}: nothing there")
    emit(facts, args.json, table([(name, printable(str(value))) for name, value in facts.items()]))


def _sites(args: argparse.Namespace) -> None:
    """Print what the sites of a model are."""
    from fastsae.models import check_sites, find_blocks
    from fastsae.models.load import load_model
    from fastsae.models.sites import BLOCK_KINDS, MODEL_KINDS

    model, _ = load_model(args.model)
    names = args.site
    if not names:
        layer = len(find_blocks(model)[1]) // 2
        names = [f"{kind}.{layer}" for kind in BLOCK_KINDS] + [f"head.{layer}.0", *MODEL_KINDS]
    reports = check_sites(model, names)
    if not args.site:  # what there is; dense models have no router
        reports = {name: report for name, report in reports.items() if report.path}
    rows = []
    for name, report in reports.items():
        told = [report.why] if report.why else []
        if report.ok:
            told = [report.path, f"{report.shape[-1]} wide", *filter(None, [report.written]), *told]
        rows.append((name, ", ".join(told)))
    found = {name: report.to_dict() for name, report in reports.items()}
    emit(found, args.json, table(rows))


def _store(path: Path) -> dict[str, Any]:
    from fastsae.data.shards import Manifest, open_shard

    manifest = Manifest.read(path, partial=True)
    return {
        "kind": "activations",
        "complete": manifest.complete,
        "model": manifest.model,
        "sites": manifest.sites,
        "dtype": manifest.dtype,
        **({"rounding": ROUNDING} if manifest.dtype == "int8" else {}),
        "rows": {split: manifest.rows(split) for split in ("train", "val")},
        "documents": manifest.documents,
        "shards": len(manifest.shards),
        "bytes": sum(open_shard(path, s).path.stat().st_size for s in manifest.shards),
        "context": manifest.context,
        "dropped": manifest.dropped,
        **({"notes": notes} if (notes := _notes(manifest.checks)) else {}),
        "max_norm": manifest.max_norm,
    }


def _notes(checks: dict[str, Any]) -> dict[str, str]:
    """Return what one should know about the sites of a store."""
    told = {name: check.get("why") for name, check in checks.items() if isinstance(check, dict)}
    return {name: str(why) for name, why in told.items() if why}


def _sae(path: Path, layer: int | None) -> dict[str, Any]:
    import torch

    from fastsae.interop import load
    from fastsae.nn import NormalizedSAE
    from fastsae.nn.cross_layer_base import CrossLayerMixin

    sae = load(path, layer=layer)
    around: dict[str, Any] = {}
    if isinstance(sae, NormalizedSAE):
        keys = ("normalize_activations", "reshape_activations")
        around, sae = {key: getattr(sae, key) for key in keys}, sae.sae
    encoder = sae.W_enc.detach().t().float()
    aligned: dict[str, Any] = {}
    if not isinstance(sae, CrossLayerMixin) and encoder.shape == sae.W_dec.shape:
        cosine = torch.cosine_similarity(encoder, sae.W_dec.detach().float(), dim=1)
        aligned["encoder_decoder_cosine"] = _spread(cosine)
    return {
        "kind": type(sae).__name__,
        **sae.config(),
        **around,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in sae.parameters()),
        "decoder_norm": _spread(sae.decoder_norms()),
        "encoder_norm": _spread(encoder.norm(dim=1)),
        **aligned,
        "finite": all(bool(p.isfinite().all()) for p in sae.parameters()),
        "metadata": sae.metadata,
    }


def _spread(x: Any) -> dict[str, float]:
    return {
        name: round(float(value), 4)
        for name, value in (("min", x.min()), ("median", x.median()), ("max", x.max()))
    }
