"""What a run of `fastsae train` is made of: its options, and what they stand for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae.cli.console import duration, positive

if TYPE_CHECKING:
    from fastsae.data import ActivationSource, ActivationStore
    from fastsae.nn import SAE
    from fastsae.train import TrainConfig

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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of one run."""
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
    parser.add_argument(
        "--hold-back", type=positive, metavar="ROWS",
        help="rows to keep from training whatever the class (default: for thresholds only)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data (default 0)")
    parser.add_argument(
        "--start-seed", type=int, help="of the weights at the start (default: that of --seed)"
    )
    parser.add_argument("--optimizer", default="adam", choices=("adam", "adam_mini", "sgd_sai"))
    parser.add_argument("--update", default="auto", choices=("auto", "fused", "autograd"))
    parser.add_argument(
        "--compute-dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the encoder's matmul; parameters and sums stay float32 (default: auto)",
    )
    parser.add_argument(
        "--decode-dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the rows of W_dec that the decoder reads; W_dec itself stays float32 "
        "(default: float32)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--checkpoint-every", type=positive, help="updates between checkpoints")
    parser.add_argument(
        "--async-checkpoints", action="store_true", help="write checkpoints while training goes on"
    )
    parser.add_argument(
        "--capture", action="store_true", help="replay steps as a CUDA graph (with --device cuda)"
    )
    parser.add_argument(
        "--partial", action="store_true", help="use what is there of an interrupted harvest"
    )
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard logs")


def config_of(args: argparse.Namespace, out: str) -> TrainConfig:
    """Return the settings of a run in folder `out`."""
    from fastsae.train import TrainConfig

    return TrainConfig(
        lr=args.lr,
        batch_size=args.batch_size,
        epochs=args.epochs,
        steps=args.steps,
        hold_back=args.hold_back,
        seed=args.seed,
        start_seed=args.start_seed,
        optimizer=args.optimizer,
        update=args.update,
        compute_dtype=args.compute_dtype,
        decode_dtype=args.decode_dtype,
        checkpoint_every=args.checkpoint_every,
        async_checkpoints=args.async_checkpoints,
        capture=args.capture,
        tensorboard=args.tensorboard,
        out=out,
    )


def is_store(path: Path) -> bool:
    """Return whether `path` is a folder of ours, and no file of another program."""
    return path.suffix not in (".npy", ".safetensors") and not (path / "state.json").exists()


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
    if not is_store(path):
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
    about = metadata_of(store, store.sites, transcoder="transcoder" in args.arch)
    widths = [store.manifest.sites[site] for site in store.sites]
    return store, held if len(held) else None, widths, about


def metadata_of(
    store: ActivationStore, sites: Sequence[str], *, transcoder: bool = False
) -> dict[str, Any]:
    """Return what an SAE trained on sites of a store says of it, in the words of SAELens."""
    from fastsae.interop.hooks import describe_sites

    return {
        "model_name": store.manifest.model,
        **describe_sites(sites, transcoder=transcoder),
        "context_size": store.manifest.context,
        "prepend_bos": True,
    }


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
