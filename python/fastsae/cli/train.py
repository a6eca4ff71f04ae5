"""`fastsae train`: train an SAE on stored activations."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae.cli import sweep
from fastsae.cli.budget import within
from fastsae.cli.console import device_named, emit, narrated, positive, say, subcommand
from fastsae.cli.recipe import add_options, build, config_of, sources

if TYPE_CHECKING:
    from fastsae.data import ActivationSource
    from fastsae.nn import SAE
    from fastsae.train import TrainConfig

EXAMPLE = """
fastsae train acts --out sae
fastsae train acts --site mlp_out.3 --arch batchtopk --k 64 --expansion 16 --epochs 4 --out sae
fastsae train acts --time-budget 10m --out sae
fastsae train vectors.npy --out sae
fastsae train acts --arch matryoshka --option groups=[512,1024,3072] --out sae
fastsae train acts --arch transcoder --site mlp_in.3 --site mlp_out.3 --option skip=true --out sae
fastsae train acts --sweep sweep.yaml --out saes
torchrun --nproc-per-node 4 -m fastsae.cli train acts --out sae --latent-parallel 4
fastsae train acts --out sae --resume
fastsae train acts --out sae --resume-from sae/checkpoints/step_000001000
"""


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(subparsers, "train", "train an SAE on stored activations", EXAMPLE, run)
    parser.add_argument(
        "store",
        help="folder written by `fastsae harvest`, a .npy or .safetensors file, a "
        "folder of `datasets.save_to_disk` (SAELens' cached activations); --site names a column",
    )
    parser.add_argument("--out", required=True, help="folder for the SAE, metrics and checkpoints")
    add_options(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--resume-from", metavar="CHECKPOINT", help="continue from another than the newest one"
    )
    parser.add_argument(
        "--sweep", metavar="FILE",
        help="train many SAEs, reading the data once: YAML of these options, with lists of values "
        "under sweep: and of runs under runs:",
    )  # fmt: skip
    parser.add_argument(
        "--latent-parallel", type=positive, metavar="N",
        help="processes that latents are spread over, under torchrun (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--data-parallel", type=positive, metavar="N",
        help="groups of processes that tokens are spread over, under torchrun (default: 1)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Train and print the last metrics."""
    if args.sweep is not None:
        sweep.run(args)
        return
    mesh = _mesh(args)
    import torch

    from fastsae.train import Trainer, latest

    first = os.environ.get("RANK", "0") == "0"
    if mesh is not None and args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    data, held_out, widths, about = sources(args)
    device_named(args.device)
    torch.manual_seed(args.seed if args.start_seed is None else args.start_seed)
    sae = build(args, widths)
    sae.metadata = about
    config = replace(config_of(args, args.out), mesh=mesh)
    if args.time_budget is not None:
        config = _of_length(args, sae, data, config, held_out)
    trainer = Trainer(sae, data, config, val=held_out)
    if first and args.resume and latest(Path(args.out) / "checkpoints") is None:
        say(f"train: no checkpoint in {args.out}, so this is a new run")
    with narrated() if first else nullcontext():
        result = trainer.fit(resume=args.resume_from or args.resume)
    if not first:
        return
    found: dict[str, Any] = {"out": args.out, **result.final}
    text = ", ".join(f"{name} {value:.6g}" for name, value in result.final.items())
    text = f"{args.out}: {text}"
    if result.gap is not None:
        found["gap"] = asdict(result.gap)
    emit(found, args.json, text)


def _mesh(args: argparse.Namespace) -> tuple[int, int] | None:
    """Return over how many processes (data, latent) a run is spread; None: this one alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 and args.data_parallel is None and args.latent_parallel is None:
        return None
    if args.time_budget is not None:
        raise ValueError(f"train: expected --time-budget in one process, got {world} processes")
    data = args.data_parallel or world // (args.latent_parallel or world) or 1
    latent = args.latent_parallel or world // data or 1
    if data * latent != world:
        raise ValueError(
            f"train: expected --data-parallel times --latent-parallel to be the {world} processes "
            f"of torchrun, got {data} * {latent}"
        )
    return data, latent


def _of_length(
    args: argparse.Namespace,
    sae: SAE,
    data: ActivationSource,
    config: TrainConfig,
    val: ActivationSource | None,
) -> TrainConfig:
    """Return `config` with the length of the run that is continued, or that fits the budget."""
    from fastsae.train import latest, settings_of

    path = Path(args.resume_from) if args.resume_from else None
    if args.resume and path is None:
        path = latest(Path(args.out) / "checkpoints")
    if path is None:
        return within(args.time_budget, sae, data, config, val)
    before = settings_of(path)
    length = {name: before[name] for name in ("steps", "total_tokens", "epochs")}
    config = replace(config, **length)
    if config.steps is not None:
        say(f"--time-budget: {config.steps:,} updates, as the run in {args.out} began")
    return config
