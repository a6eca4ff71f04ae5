"""Make small checkpoints with the peers' own code: `python -m tests.interop.make_checkpoints`."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

FORMATS = (
    "saelens",
    "saelens_legacy",
    "dictionary_learning",
    "sparsify",
    "openai",
    "gemma_scope",
    "llama_scope",
    "llamascopium",
    "circuit_tracer",
    "saev",
    "overcomplete",
    "hypothesaes",
)


def main() -> None:
    """Make the formats that are asked for, or all."""
    import torch

    from .common import made

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "peers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.formats or FORMATS:
        if name not in FORMATS:
            parser.error(f"no format {name}, there are {', '.join(FORMATS)}")
        importlib.import_module(f".{name}", __package__).make(arguments.out)
    for row in (("format", "case", "peer"), *made):
        print("{:20} {:40} {}".format(*row))


if __name__ == "__main__":
    main()
