"""`fastsae verify PATH`: is every byte of a folder what was written?"""

from __future__ import annotations

import argparse
from typing import Any

from fastsae.cli.console import emit, subcommand

EXAMPLE = """
fastsae verify fastsae-demo/sae
fastsae verify fastsae-demo/activations --json
"""


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(
        subparsers,
        "verify",
        "compare every byte of a harvest, a run or an SAE with its checksums",
        EXAMPLE,
        run,
    )
    parser.add_argument("path", help="folder of a harvest, a training run, a checkpoint or an SAE")


def run(args: argparse.Namespace) -> None:
    """Print what was checked; exit with 1 if anything differs."""
    from fastsae.verification import verify

    found = verify(args.path)
    lines = [*found.problems, f"{args.path}: {found.kind}, {len(found.checked)} verified"]
    result = {
        "path": args.path,
        "kind": found.kind,
        "ok": found.ok,
        "checked": found.checked,
        "problems": found.problems,
    }
    emit(result, args.json, "\n".join(lines))
    if not found.ok:
        raise ValueError(
            f"verify: expected {args.path} as it was written, got {len(found.problems)} problems"
        )
