"""`fastsae train`: train an SAE on stored activations."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae.cli.budget import within
from fastsae.cli.console import device_named, duration, emit, narrated, positive, say, subcommand

if TYPE_CHECKING:
    from fastsae.data import ActivationSource, ActivationStore
    from fastsae.nn import SAE
    from fastsae.train import TrainConfig

EXAMPLE = """
fastsae train acts --out sae
fastsae train acts --site mlp_out.3 --arch batchtopk --k 64 --expansion 16 --epochs 4 --out sae
fastsae train acts --time-budget 10m --out sae
fastsae train vectors.npy --out sae
fastsae train acts --arch matryoshka --option groups=[512,1024,3072] --out sae
fastsae train acts --arch transcoder --site mlp_in.3 --site mlp_out.3 --option skip=true --out sae
fastsae train acts --out sae --resume
fastsae train acts --out sae --resume-from sae/checkpoints/step_000001000
"""

ARCHITECTURES = {
    "topk": "TopKSAE",
    "batchtopk": "BatchTopKSAE",
    "featurechoice": "FeatureChoiceSAE",
    "sampled": "SampledSAE",
    "matryoshka": "MatryoshkaSAE",
    "hierarchicaltopk": "HierarchicalTopKSAE",
    "groupmax": "GroupMaxSAE",
    "gradient": "GradientSAE",
    "relu": "ReLUSAE",
    "gated": "GatedSAE",
    "jumprelu": "JumpReLUSAE",
    "transcoder": "Transcoder",
    "batchtopk-transcoder": "BatchTopKTranscoder",
    "jumprelu-transcoder": "JumpReLUTranscoder",
    "relu-transcoder": "ReLUTranscoder",
    "crosscoder": "CrossCoder",
    "topk-crosscoder": "TopKCrossCoder",
    "relu-crosscoder": "ReLUCrossCoder",
    "clt": "CrossLayerTranscoder",
    "batchtopk-clt": "BatchTopKCrossLayerTranscoder",
    "jumprelu-clt": "JumpReLUCrossLayerTranscoder",
    "relu-clt": "ReLUCrossLayerTranscoder",
}
"""Names on the command line, and their classes in `fastsae.nn`."""


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(subparsers, "train", "train an SAE on stored activations", EXAMPLE, run)
    parser.add_argument(
        "store",
        help="folder written by `fastsae harvest`, a .npy or .safetensors file, a "
        "folder of `datasets.save_to_disk` (SAELens' cached activations); --site names a column",
    )
    parser.add_argument("--out", required=True, help="folder for the SAE, metrics and checkpoints")
    parser.add_argument(
        "--site",
        action="append",
        help="which site, if the store has several; twice for a transcoder (its input, then its "
        "output), once per layer for a crosscoder; for a clt the inputs of all layers in order, "
        "then their outputs",
    )
    parser.add_argument("--arch", default="topk", choices=tuple(ARCHITECTURES))
    parser.add_argument("--k", type=positive, default=32, help="active latents per token")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another argument of the class, as JSON or plain text, e.g. aux=zipf; repeatable",
    )
    parser.add_argument("--expansion", type=positive, default=8, help="d_sae / d_in (default 8)")
    parser.add_argument(
        "--lr", type=float, help="peak learning rate (default: from sizes and length)"
    )
    parser.add_argument(
        "--batch-size", type=positive, help="tokens per update (default: from device and length)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=float, default=1.0, help="passes over the data (default 1)"
    )
    length.add_argument("--steps", type=positive, help="updates, instead of --epochs")
    length.add_argument(
        "--time-budget",
        type=duration,
        metavar="TIME",
        help="as many updates as take about this long: 90s, 10m, 1.5h; a few are tried first",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizer", default="adam", choices=("adam", "adam_mini", "sgd_sai"))
    parser.add_argument("--update", default="auto", choices=("auto", "fused", "autograd"))
    parser.add_argument(
        "--compute-dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the encoder's matmul; parameters and sums stay float32 (default: auto)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--checkpoint-every", type=positive, help="updates between checkpoints")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--resume-from", metavar="CHECKPOINT", help="continue from another than the newest one"
    )
    parser.add_argument(
        "--partial", action="store_true", help="use what is there of an interrupted harvest"
    )
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard logs")


def run(args: argparse.Namespace) -> None:
    """Train and print the last metrics."""
    import torch

    from fastsae.train import TrainConfig, Trainer, latest

    data, held_out, widths, about = sources(args)
    device_named(args.device)
    torch.manual_seed(args.seed)
    sae = build(args, widths)
    sae.metadata = about
    config = TrainConfig(
        lr=args.lr,
        batch_size=args.batch_size,
        epochs=args.epochs,
        steps=args.steps,
        seed=args.seed,
        optimizer=args.optimizer,
        update=args.update,
        compute_dtype=args.compute_dtype,
        checkpoint_every=args.checkpoint_every,
        tensorboard=args.tensorboard,
        out=args.out,
    )
    if args.time_budget is not None:
        config = _of_length(args, sae, data, config, held_out)
    trainer = Trainer(sae, data, config, val=held_out)
    if args.resume and latest(Path(args.out) / "checkpoints") is None:
        say(f"train: no checkpoint in {args.out}, so this is a new run")
    with narrated():
        result = trainer.fit(resume=args.resume_from or args.resume)
    found: dict[str, Any] = {"out": args.out, **result.final}
    text = ", ".join(f"{name} {value:.6g}" for name, value in result.final.items())
    text = f"{args.out}: {text}"
    if result.gap is not None:
        found["gap"] = asdict(result.gap)
    emit(found, args.json, text)


def sources(
    args: argparse.Namespace,
) -> tuple[ActivationSource, ActivationSource | None, list[int], dict[str, Any]]:
    """Return rows to train on and to validate on, widths of columns, and what an SAE says of them.

    Of a file of another program, a twentieth of the rows is for validation, 2^15 at most.
    """
    from fastsae.data import ActivationStore, open_activations
    from fastsae.data.source import hold_back, known_rows
    from fastsae.interop.hooks import hook_name

    sites, path = sites_of(args.arch, args.site), Path(args.store)
    if path.suffix in (".npy", ".safetensors") or (path / "state.json").exists():
        if len(sites or ()) > 1:
            raise ValueError(f"train: expected --site once for {path}, got {len(sites or ())}")
        column = sites[0] if sites else None
        source = open_activations(path, column)
        parts = hold_back(source, min((known_rows(source) or 0) // 20, 1 << 15))
        data, val = parts or (source, None)
        about = {"hook_name": hook_name(column)} if column else {}
        return data, val, [source.d_in], about
    store = ActivationStore(path, sites, partial=args.partial)
    held = ActivationStore(path, sites, split="val", partial=args.partial)
    about = metadata_of(store, transcoder="transcoder" in args.arch)
    widths = [store.manifest.sites[site] for site in store.sites]
    return store, held if len(held) else None, widths, about


def metadata_of(store: ActivationStore, *, transcoder: bool = False) -> dict[str, Any]:
    """Return what an SAE trained on a store says of it, in the words of SAELens."""
    from fastsae.interop.hooks import describe_sites

    return {
        "model_name": store.manifest.model,
        **describe_sites(store.sites, transcoder=transcoder),
        "context_size": store.manifest.context,
        "prepend_bos": True,
    }


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


def sites_of(arch: str, sites: list[str] | None) -> list[str] | None:
    """Return the columns that an architecture reads, in its order; None for the only site."""
    count = len(sites or ())
    if "transcoder" in arch and count != 2:
        raise ValueError(f"train: expected --site twice for {arch}, input and output, got {count}")
    if "crosscoder" in arch and count < 2:
        raise ValueError(f"train: expected --site once per layer for {arch}, got {count}")
    if arch.endswith("clt") and (count < 2 or count % 2):
        raise ValueError(
            f"train: expected --site twice per layer for {arch}, inputs of all and then outputs, "
            f"got {count}"
        )
    if not ("coder" in arch or arch.endswith("clt")) and count > 1:
        raise ValueError(f"train: expected --site once for {arch}, got {count}")
    if arch == "gradient":
        if not sites:
            raise ValueError("train: expected --site for gradient, a site that has gradients")
        return [*sites, f"grad.{sites[0]}"]
    return sites


def build(args: argparse.Namespace, widths: list[int]) -> SAE:
    """Return the module that the arguments describe, for columns of these widths."""
    from fastsae import nn

    cls = getattr(nn, ARCHITECTURES[args.arch])
    d_sae = args.expansion * widths[0]
    sizes = [widths[0], d_sae]
    if "transcoder" in args.arch:
        sizes = [*widths, d_sae]
    if "crosscoder" in args.arch:
        if len(set(widths)) > 1:
            raise ValueError(f"train: expected layers of one width for {args.arch}, got {widths}")
        sizes = [widths[0], len(widths), d_sae]
    if args.arch.endswith("clt"):
        if len(set(widths)) > 1:
            raise ValueError(f"train: expected sites of one width for {args.arch}, got {widths}")
        sizes = [widths[0], len(widths) // 2, d_sae]
    try:
        sae: SAE = cls(*sizes, args.k, device=args.device, **options(args.option))
    except TypeError as error:
        raise ValueError(f"train: expected --option of {cls.__name__}, got {error}") from error
    return sae


def options(given: list[str]) -> dict[str, Any]:
    """Return `NAME=VALUE` pairs as keyword arguments; a value that is no JSON is text."""
    found: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not (equals and name.isidentifier()):
            raise ValueError(f"train: expected --option NAME=VALUE, got {pair!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
