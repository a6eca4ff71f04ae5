"""`fastsae train`: train an SAE on stored activations."""

from __future__ import annotations

import argparse
from typing import Any

from fastsae.cli.console import emit, positive, subcommand

EXAMPLE = """
fastsae train acts --out sae
fastsae train acts --site mlp_out.3 --arch batchtopk --k 64 --expansion 16 --epochs 4 --out sae
fastsae train acts --out sae --resume
"""

ARCHITECTURES = {
    "topk": "TopKSAE",
    "batchtopk": "BatchTopKSAE",
    "featurechoice": "FeatureChoiceSAE",
}
"""Names on the command line, and their classes in `fastsae.nn`."""


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(subparsers, "train", "train an SAE on stored activations", EXAMPLE, run)
    parser.add_argument("store", help="folder written by `fastsae harvest`")
    parser.add_argument("--out", required=True, help="folder for the SAE, metrics and checkpoints")
    parser.add_argument("--site", help="which site, if the store has several")
    parser.add_argument("--arch", default="topk", choices=tuple(ARCHITECTURES))
    parser.add_argument("--k", type=positive, default=32, help="active latents per token")
    parser.add_argument("--expansion", type=positive, default=8, help="d_sae / d_in (default 8)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: from d_sae)")
    parser.add_argument("--batch-size", type=positive, default=4096, help="tokens per update")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the data")
    parser.add_argument("--steps", type=positive, help="updates, instead of --epochs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--update", default="fused", choices=("fused", "autograd"))
    parser.add_argument(
        "--compute-dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the encoder's product; parameters and sums stay float32 (default: auto)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--checkpoint-every", type=positive, help="updates between checkpoints")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard logs")


def run(args: argparse.Namespace) -> None:
    """Train and print the last metrics."""
    import torch

    from fastsae import nn
    from fastsae.data import ActivationStore
    from fastsae.train import TrainConfig, Trainer

    data = ActivationStore(args.store, args.site)
    val = ActivationStore(args.store, args.site, split="val")
    torch.manual_seed(args.seed)
    cls = getattr(nn, ARCHITECTURES[args.arch])
    sae = cls(data.d_in, args.expansion * data.d_in, args.k, device=args.device)
    sae.metadata = {"model_name": data.manifest.model, "hook_name": data.site}
    config = TrainConfig(
        lr=args.lr,
        batch_size=args.batch_size,
        epochs=args.epochs,
        steps=args.steps,
        seed=args.seed,
        update=args.update,
        compute_dtype=args.compute_dtype,
        checkpoint_every=args.checkpoint_every,
        tensorboard=args.tensorboard,
        out=args.out,
    )
    trainer = Trainer(sae, data, config, val=val if len(val) else None)
    final = trainer.fit(resume=args.resume).final
    text = ", ".join(f"{name} {value:.6g}" for name, value in final.items())
    emit({"out": args.out, **final}, args.json, f"{args.out}: {text}")
