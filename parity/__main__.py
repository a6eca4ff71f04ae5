"""Run every comparison and print the table: `python -m parity --help`."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version

import torch

import parity
from parity import dictionary_learning as dl
from parity import saelens, sparsify
from parity.compare import Comparison, Row, compare, table
from parity.problem import Problem, problem

Case = Callable[[Problem], Iterable[Comparison]]
MODULES = {
    "sae-lens": "sae_lens",
    "dictionary-learning": "dictionary_learning.trainers",
    "eai-sparsify": "sparsify",
}
# fastsae's class, the peer's class, the peer's package, and the comparison.
CASES: list[tuple[str, str, str, Case]] = [
    ("TopKSAE", "TopKSAE, TopKTrainingSAE", "sae-lens", saelens.compare_topk),
    ("TopKSAE", "AutoEncoderTopK, TopKTrainer", "dictionary-learning", dl.compare_topk),
    ("TopKSAE", "SparseCoder", "eai-sparsify", sparsify.compare_topk),
    ("BatchTopKSAE", "BatchTopKTrainingSAE", "sae-lens", saelens.compare_batch_topk),
    (
        "BatchTopKSAE",
        "BatchTopKSAE, BatchTopKTrainer",
        "dictionary-learning",
        dl.compare_batch_topk,
    ),
    ("MatryoshkaSAE", "MatryoshkaBatchTopKTrainingSAE", "sae-lens", saelens.compare_matryoshka),
    (
        "MatryoshkaSAE",
        "MatryoshkaBatchTopKSAE, its trainer",
        "dictionary-learning",
        dl.compare_matryoshka,
    ),
    ("ReLUSAE", "StandardSAE, StandardTrainingSAE", "sae-lens", saelens.compare_relu),
    ("ReLUSAE", "AutoEncoder, StandardTrainer", "dictionary-learning", dl.compare_relu),
    ("GatedSAE", "GatedSAE, GatedTrainingSAE", "sae-lens", saelens.compare_gated),
    ("GatedSAE", "GatedAutoEncoder, GatedSAETrainer", "dictionary-learning", dl.compare_gated),
    ("JumpReLUSAE", "JumpReLUSAE, JumpReLUTrainingSAE", "sae-lens", saelens.compare_jumprelu),
    (
        "JumpReLUSAE",
        "JumpReluAutoEncoder, JumpReluTrainer",
        "dictionary-learning",
        dl.compare_jumprelu,
    ),
]


def unavailable(package: str) -> str:
    """Return why a library is unavailable here, or an empty string."""
    module = MODULES[package]
    # Read by sparsify at import: its Triton decoder takes no CPU tensors.
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    try:
        importlib.import_module(module)
    except ImportError as error:
        absent = module.startswith(str(error.name))
        return "not installed" if absent else f"not imported: {error}"
    return ""


def run(p: Problem, only: str = "") -> list[Row]:
    """Return the rows of all cases whose classes have `only` in their names."""
    rows = []
    for ours, theirs, package, case in CASES:
        if only.lower() not in f"{ours} {theirs} {package}".lower():
            continue
        reason = unavailable(package)
        if reason:
            rows.append(Row(ours, f"{theirs} ({package})", "", math.nan, reason))
            continue
        peer = f"{theirs} ({package} {version(package)})"
        for found in case(p):
            rows += compare(ours, peer, found)
    return rows


def main() -> int:
    """Print the table; return 1 if something that has to be equal is not."""
    parser = argparse.ArgumentParser(
        prog="python -m parity", description=parity.__doc__.splitlines()[0]
    )
    parser.add_argument("--only", default="", help="part of a class's or a library's name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float64", choices=("float32", "float64"))
    arguments = parser.parse_args()
    rows = run(problem(getattr(torch, arguments.dtype), arguments.seed), arguments.only)
    print(table(rows))
    return int(not all(row.ok for row in rows))


if __name__ == "__main__":
    sys.exit(main())
