"""`fastsae demo`: from a language model to a report about a trained SAE, in one command.

Harvest -> train -> evaluate on held-out documents -> splice into the model -> report.html. Model
and text are on the machine already (see `cli.models` and `cli.text`), so the demo needs no network.
A second run with the same settings reuses what is complete, and continues the rest; one with other
settings is refused, unless --overwrite replaces what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsae.cli.budget import within
from fastsae.cli.console import duration, emit, narrated, positive, progress, say, subcommand
from fastsae.cli.recipe import metadata_of
from fastsae.cli.summary import facts, summary
from fastsae.models.load import SMOLLM2, load_model
from fastsae.models.text import pieces, python_topics, read_files

if TYPE_CHECKING:
    from torch import nn

    from fastsae.data import ActivationStore
    from fastsae.eval import CrossEntropy
    from fastsae.nn import SAE
    from fastsae.train import TrainResult

EXAMPLE = """
fastsae demo
fastsae demo --text novel.txt --site mlp_out.20 --k 48 --out my-demo
fastsae demo --tokens 20000 --epochs 4
fastsae demo --time-budget 5m
"""
VAL_FRACTION = 0.15
MIN_TOKENS = 1000


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(
        subparsers, "demo", "train an SAE on a small language model and report on it", EXAMPLE, run
    )
    add = parser.add_argument
    add("--out", default="fastsae-demo", help="folder to write (default: fastsae-demo)")
    add(
        "--text",
        nargs="+",
        metavar="FILE",
        help="UTF-8 text to use (default: the language reference that comes with Python)",
    )
    add("--model", default=SMOLLM2, help="folder or hub name (default: smollm2, bundled)")
    add("--site", default="resid_post.15", help="where in the model (default: resid_post.15)")
    add("--tokens", type=positive, default=100_000, help="most tokens to harvest (100,000)")
    add("--k", type=positive, default=32, help="active latents per token (default: 32)")
    add("--expansion", type=positive, default=4, help="d_sae / d_in (default: 4)")
    add("--lr", type=float, help="peak learning rate (default: from sizes and length)")
    add("--contexts", type=positive, default=24, help="contexts for the cross entropy (24)")
    add("--seed", type=int, default=0, help="of weights and order (default: 0)")
    add("--overwrite", action="store_true", help="replace the results of other settings in --out")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, default=8.0, help="passes over the tokens (8)")
    length.add_argument("--steps", type=positive, help="updates, instead of --epochs")
    length.add_argument(
        "--time-budget",
        type=duration,
        metavar="TIME",
        help="train for about this long: 90s, 10m, 1.5h",
    )


def run(args: argparse.Namespace) -> None:
    """Run all phases; print a summary."""
    from fastsae._files.write import write_json
    from fastsae.eval import evaluate
    from fastsae.report.write import write_report

    texts = pieces(read_files(args.text)) if args.text else python_topics()
    out, phase = Path(args.out), Phases()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with phase("load model"):
            model, tokenizer = load_model(args.model)
        with phase("harvest"):
            train, val = _harvest(args, out / "activations", texts, model, tokenizer)
        with phase("train"):
            trained = _train(args, out / "sae", train, val)
            sae, history = trained.sae, trained.history
        with phase("evaluate"), progress("evaluate", len(val), "token") as advance:
            result = evaluate(sae, val, progress=advance)
        with phase("cross entropy"):
            ce = _cross_entropy(args, texts, model, tokenizer, sae, train)
        with phase("report"):
            write_report(
                out / "report.html",
                sae,
                train,
                tokenizer,
                result,
                model=model,
                cross_entropy=ce,
                history=history,
                facts=facts(args, train, phase.seconds, history),
            )
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("run the same command again to continue") from error
    numbers = {
        **result.to_dict(),
        "cross_entropy": ce.to_dict(),
        "gap": None if trained.gap is None else asdict(trained.gap),
        "seconds": {name: round(value, 1) for name, value in phase.seconds.items()},
        "report": str(out / "report.html"),
        "sae": str(out / "sae"),
    }
    write_json(out / "result.json", numbers)
    emit(numbers, args.json, summary(result, ce, phase.seconds, out))


class Phases:
    """Times the phases of a run, and says what begins and how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        say(f"{name:<14}{self.seconds[name]:7.1f} s")


def _harvest(
    args: argparse.Namespace, folder: Path, texts: list[str], model: nn.Module, tokenizer: Any
) -> tuple[ActivationStore, ActivationStore]:
    """Harvest, or take the harvest of an earlier run of the same settings and text."""
    from fastsae.data import ActivationStore, harvest
    from fastsae.data.shards import MANIFEST, PARTIAL, Manifest

    settings = {
        "model": args.model,
        "site": args.site,
        "tokens": args.tokens,
        "text": hashlib.blake2b("\0".join(texts).encode(), digest_size=16).hexdigest(),
    }
    old = None
    if any((folder / name).exists() for name in (MANIFEST, PARTIAL)):
        old = Manifest.read(folder, partial=True)
        _expect_same(args, folder, old.meta, settings)
    if old is None or not old.complete or old.meta != settings:
        with progress("harvest", None, "token") as advance:
            harvest(
                model,
                tokenizer,
                texts,
                args.site,
                folder,
                max_tokens=args.tokens,
                max_norm_ratio=3.0,
                val_fraction=VAL_FRACTION,
                overwrite=old is not None and old.meta != settings,
                meta=settings,
                progress=advance,
            )
    train, val = (ActivationStore(folder, args.site, split=split) for split in ("train", "val"))
    if len(train) < MIN_TOKENS or not len(val):
        raise ValueError(
            f"demo: expected text of at least {MIN_TOKENS} tokens, got {len(train)} for training "
            f"and {len(val)} held out; give more text or --tokens"
        )
    return train, val


def _train(
    args: argparse.Namespace, folder: Path, data: ActivationStore, val: ActivationStore
) -> TrainResult:
    """Train, or continue (or take) the run of the same settings in `folder`."""
    import torch

    from fastsae._files.read import check_seal, read_json
    from fastsae._files.write import remove, sealed, write_json
    from fastsae.nn import TopKSAE
    from fastsae.train import TrainConfig, Trainer

    names = ("k", "expansion", "lr", "epochs", "steps", "seed")
    settings = {**{name: getattr(args, name) for name in names}, **data.manifest.meta}
    if args.time_budget is not None:
        settings["time_budget"] = args.time_budget.seconds
    note = folder / "demo.json"
    if folder.exists() and any(folder.iterdir()):
        if not note.exists():
            raise FileExistsError(f"demo: {folder} was not made by a demo; choose another --out")
        before = read_json(note, "demo")
        if "checksum" in before:  # earlier versions wrote none
            check_seal(before, note, "demo")
        if args.time_budget is not None and before.get("time_budget") == args.time_budget.seconds:
            settings["steps"] = before.get("steps")  # of the run that is continued
        _expect_same(args, folder, before, settings)
        if before != settings:
            remove(folder)
    torch.manual_seed(args.seed)
    sae = TopKSAE(data.d_in, args.expansion * data.d_in, args.k)
    sae.metadata = metadata_of(data, data.sites)
    config = TrainConfig(
        lr=args.lr,
        epochs=args.epochs,
        steps=settings["steps"],
        seed=args.seed,
        log_every=10,
        out=folder,
    )
    if args.time_budget is not None and config.steps is None:
        config = within(args.time_budget, sae, data, config, val)
        settings["steps"] = config.steps
    folder.mkdir(exist_ok=True)
    write_json(note, sealed(settings))
    with narrated():
        return Trainer(sae, data, config, val=val).fit(resume=True)


def _expect_same(
    args: argparse.Namespace, folder: Path, before: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Raise FileExistsError where `folder` is of other settings and may not be replaced."""
    other = sorted(name for name in settings if before.get(name) != settings[name])
    if other and not args.overwrite:
        was = ", ".join(f"{name} = {before.get(name)!r}" for name in other)
        now = ", ".join(f"{settings[name]!r}" for name in other)
        raise FileExistsError(
            f"demo: expected {was} as in {folder}, got {now}; choose another --out, or --overwrite "
            "replaces it"
        )


def _cross_entropy(
    args: argparse.Namespace,
    texts: list[str],
    model: nn.Module,
    tokenizer: Any,
    sae: SAE,
    train: ActivationStore,
) -> CrossEntropy:
    """Splice the SAE into the model on held-out documents; the mean is that of training rows."""
    from fastsae.eval import cross_entropy
    from fastsae.models.chunks import chunks, held_out, spread

    manifest = train.manifest
    held = [text for doc, text in enumerate(texts) if held_out(doc, VAL_FRACTION)]
    every = [c.ids for c in chunks(tokenizer, held, manifest.context, manifest.prefix_id)]
    contexts = spread(every, args.contexts)
    with progress("cross entropy", 4 * len(contexts), "context") as advance:
        return cross_entropy(
            model,
            args.site,
            sae,
            contexts,
            mean=train.sample(16384).mean(0),
            drop_prefix=manifest.drop_prefix,
            max_norm=train.max_norm,
            progress=advance,
        )
