"""Time a training step of every class, and of other libraries' classes of the same kind.

    python -m bench.classes [--classes ReLU Gated] [--at start target] [--n 1024] [--d 576]
        [--d-sae 9216] [--k 32] [--rounds 5] [--dead 0] [--threads 2] [--out RESULTS.jsonl]
        [--compute-dtype float32]

Steps are the first of a run on tokens made of k latents each: `Trainer.step` here, in float32,
SAELens' `SAETrainer.step`, the `update` of dictionary-learning's trainers, and a forward, backward
and Adam step of sparsify's SparseCoder. At the `start` half of the latents of a class with a
penalty are active; at the `target` its biases are lowered, here and there, until k are. `--dead`
makes so many latents dead, for AuxK; sparsify takes no part in that. All ways take turns; reported
are medians in milliseconds, what they are of TopK's step in the same run and of each library's, the
mean number of active latents, and the update fastsae used. A class that loses is marked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsae
from bench.peers import import_error, start
from fastsae import TrainConfig, Trainer, ops
from fastsae.train.fused_update import FusedUpdate
from parity import dictionary_learning, saelens, sparsify

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "TopK": ("TopKSAE", {}),
    "BatchTopK": ("BatchTopKSAE", {}),
    "FeatureChoice": ("FeatureChoiceSAE", {}),
    "Sampled": ("SampledSAE", {}),
    "GroupMax": ("GroupMaxSAE", {}),
    "AbsTopK": ("TopKSAE", {"absolute": True}),
    "Multi-TopK": ("TopKSAE", {"multi_topk": True}),
    "Matryoshka": ("MatryoshkaSAE", {}),
    "Hierarchical": ("HierarchicalTopKSAE", {}),
    "Gradient": ("GradientSAE", {}),
    "JumpReLU": ("JumpReLUSAE", {}),
    "ReLU": ("ReLUSAE", {}),
    "Gated": ("GatedSAE", {}),
    "Transcoder": ("Transcoder", {}),
    "Skip": ("Transcoder", {"skip": True}),
    "CrossCoder": ("CrossCoder", {}),
}
"""Classes of fastsae, and how they are made; a crosscoder is of three layers."""
SAELENS: dict[str, tuple[str, Callable[[int, int], dict[str, Any]]]] = {
    "TopK": ("TopKTrainingSAE", lambda d_sae, k: {"k": k}),
    "BatchTopK": ("BatchTopKTrainingSAE", lambda d_sae, k: {"k": k}),
    "Matryoshka": (
        "MatryoshkaBatchTopKTrainingSAE",
        lambda d_sae, k: {"k": k, "matryoshka_widths": [d_sae >> i for i in (5, 4, 3, 2, 0)]},
    ),
    "JumpReLU": ("JumpReLUTrainingSAE", lambda d_sae, k: {}),
    "Gated": ("GatedTrainingSAE", lambda d_sae, k: {}),
    "ReLU": ("StandardTrainingSAE", lambda d_sae, k: {}),
}
"""SAELens' class of the same kind, and its own arguments."""
FRACTIONS = [1 / 32, 1 / 32, 1 / 16, 1 / 8, 3 / 4]
"""Groups of latents of the same widths."""
DICTIONARY_LEARNING: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "TopK": ("TopKTrainer", lambda k: {"k": k}),
    "BatchTopK": ("BatchTopKTrainer", lambda k: {"k": k}),
    "Matryoshka": (
        "MatryoshkaBatchTopKTrainer",
        lambda k: {"k": k, "group_fractions": FRACTIONS},
    ),
    "JumpReLU": ("JumpReluTrainer", lambda k: {"target_l0": float(k)}),
    "Gated": ("GatedSAETrainer", lambda k: {}),
    "ReLU": ("StandardTrainer", lambda k: {}),
}
"""dictionary-learning's trainer of the same kind, and its own arguments."""
SPARSIFY: dict[str, dict[str, Any]] = {
    "TopK": {},
    "GroupMax": {"activation": "groupmax"},
    "Multi-TopK": {"multi_topk": True},
    "Transcoder": {"transcode": True},
    "Skip": {"transcode": True, "skip_connection": True},
}
"""sparsify's options of the same kind."""
PENALIZED = ("JumpReLU", "ReLU", "Gated")
"""Classes whose step depends on how far a run is."""


def lower(bias: Tensor, W_enc: Tensor, x: Tensor, k: float) -> float:
    """Lower a bias [d_sae] so that k pre-activations a token are positive; return by how much."""
    found = ops.encode_batch_topk(x, W_enc.detach().contiguous(), bias.detach(), k).threshold
    with torch.no_grad():
        bias.sub_(found)
    return float(found)


def ours(
    name: str, at: str, x: Tensor, args: argparse.Namespace
) -> tuple[Callable[[], Any], Trainer]:
    """Return fastsae's step of a class."""
    kind, options = CLASSES[name]
    torch.manual_seed(0)
    first = {"Transcoder": (args.d, args.d), "CrossCoder": (args.d, 3)}.get(kind, (args.d,))
    sae: Any = getattr(fastsae, kind)(*first, args.d_sae, args.k, **options)
    batch = torch.cat([x] * (sum(sae.columns.widths) // args.d), 1)
    config = TrainConfig(
        steps=10_000, batch_size=args.n, compute_dtype=args.compute_dtype, progress=False
    )
    trainer = Trainer(sae, None, config)
    trainer.prepare(batch)
    if at == "target" and name in ("ReLU", "Gated"):  # JumpReLU starts there
        scaled = trainer.scaler.scale(batch) - sae.b_dec.detach()
        by = lower(sae.b_enc.data, sae.W_enc_rows, scaled, args.k)
        if name == "Gated":
            sae.b_mag.data.sub_(by)

    def step() -> Any:
        if args.dead:
            trainer._dead.tokens_since_fired.zero_()[: args.dead] = 1 << 40
            trainer._tokens_done = 1 << 40  # before, no latent can be dead
        return trainer.step(batch)

    return step, trainer


def of_saelens(name: str, at: str, x: Tensor, args: argparse.Namespace) -> Callable[[], Any] | None:
    """Return SAELens' step of the class of that kind; None without one."""
    if name not in SAELENS or import_error("sae_lens"):
        return None
    kind, options = SAELENS[name]
    torch.manual_seed(0)
    sae = saelens.module(kind, args.d, args.d_sae, torch.float32, **options(args.d_sae, args.k))
    if name == "JumpReLU":
        zeros = torch.zeros(args.d_sae)
        by = lower(zeros, sae.W_enc.t(), x, args.k)
        sae.threshold.data.fill_(by)
    elif at == "target" and name in PENALIZED:
        bias = sae.b_gate if name == "Gated" else sae.b_enc
        lower(bias.data, sae.W_enc.t(), x, args.k)
    trainer = saelens.make_trainer(sae, args.n, 10_000, 5e-4)

    def step() -> None:
        trainer.n_forward_passes_since_fired[: args.dead] = 1 << 40
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def of_dictionary_learning(
    name: str, at: str, x: Tensor, args: argparse.Namespace
) -> Callable[[], Any] | None:
    """Return dictionary-learning's step of the class of that kind; None without one."""
    if name not in DICTIONARY_LEARNING or import_error("dictionary_learning"):
        return None
    kind, options = DICTIONARY_LEARNING[name]
    torch.manual_seed(0)
    trainer = dictionary_learning.make_trainer(
        kind, args.d, args.d_sae, steps=10_000, **options(args.k)
    )
    ae = trainer.ae
    if name == "JumpReLU":
        by = lower(torch.zeros(args.d_sae), ae.W_enc.t(), x, args.k)
        ae.threshold.data.fill_(by)
    elif at == "target" and name in PENALIZED:
        bias = ae.gate_bias if name == "Gated" else ae.encoder.bias
        lower(bias.data, ae.encoder.weight, x, args.k)
    count = 0

    def step() -> None:
        nonlocal count
        if args.dead and hasattr(trainer, "num_tokens_since_fired"):
            trainer.num_tokens_since_fired[: args.dead] = 1 << 40
        trainer.update(count, x)
        count += 1

    return step


def of_sparsify(
    name: str, at: str, x: Tensor, args: argparse.Namespace
) -> Callable[[], Any] | None:
    """Return sparsify's step of that kind; None without one."""
    if name not in SPARSIFY or args.dead or import_error("sparsify"):
        return None
    torch.manual_seed(0)
    coder = sparsify.coder(
        args.d, args.d_sae, args.k, dtype=torch.float32, device="cpu", **SPARSIFY[name]
    )
    optimizer = torch.optim.Adam(coder.parameters(), lr=5e-4)
    y = x if "transcode" in SPARSIFY[name] else None

    def step() -> None:
        out = coder(x, y)
        (out.fvu + out.multi_topk_fvu / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
        coder.set_decoder_norm_to_unit_norm()

    return step


PEERS = {
    "sae-lens": of_saelens,
    "dictionary-learning": of_dictionary_learning,
    "sparsify": of_sparsify,
}


def measure(name: str, at: str, x: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Return a row: medians of the class, of TopK's step and of its peers', which take turns."""
    step, trainer = ours(name, at, x, args)
    ways = {"fastsae": step}
    for library, make in PEERS.items():
        if (peer := make(name, at, x, args)) is not None:
            ways[library] = peer
    if name != "TopK":
        ways["TopK"] = ours("TopK", "start", x, args)[0]
    times: dict[str, list[float]] = {way: [] for way in ways}
    l0 = 0.0
    for round_ in range(args.rounds + 1):
        for way, call in ways.items():
            begin = time.perf_counter()
            out = call()
            if round_:
                times[way].append(1e3 * (time.perf_counter() - begin))
            if way == "fastsae":
                l0 = float(out.acts.l0())
    row: dict[str, Any] = {"class": name, "at": at, "l0": l0, "times": times}
    row["ms"] = {way: statistics.median(found) for way, found in times.items()}
    row["update"] = "fused" if isinstance(trainer._update, FusedUpdate) else "autograd"
    row |= {
        key: getattr(args, key)
        for key in ("n", "d", "d_sae", "k", "dead", "threads", "compute_dtype")
    }
    return row


def line(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    own = row["ms"]["fastsae"]
    cells = [row["class"], row["at"], f"{row['l0']:.0f}", f"{own:.0f}"]
    cells.append(f"{own / row['ms'].get('TopK', own):.2f}")
    for library in PEERS:
        peer = row["ms"].get(library)
        cells.append("" if peer is None else f"{own / peer:.2f}" + (" loses" if own > peer else ""))
    return f"| {' | '.join([*cells, row['update']])} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--at", nargs="+", choices=("start", "target"), default=["start", "target"])
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=9216)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--dead", type=int, default=0)
    parser.add_argument(
        "--compute-dtype", default="float32", help="of fastsae; auto: as by default"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = start(args.n, args.d, args.d_sae, args.k).x
    heads = ["class", "at", "L0", "ms", "of TopK", *(f"of {name}" for name in PEERS), "update"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in args.classes:
        for at in args.at if name in PENALIZED else ["start"]:
            row = measure(name, at, x, args)
            print(line(row), flush=True)
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
