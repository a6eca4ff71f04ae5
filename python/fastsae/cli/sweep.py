"""`fastsae train --sweep FILE`: many SAEs from one reading of the data."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fastsae.cli.console import device_named, emit, narrated
from fastsae.cli.recipe import build, config_of, is_store, metadata_of, sites_of, sources
from fastsae.cli.sweep_file import Resolved, Values, options_of, read

if TYPE_CHECKING:
    from fastsae.data import ActivationSource
    from fastsae.nn import SAE
    from fastsae.train import RunResult, TrainConfig

FORMAT = "fastsae-sweep"
SWEEP, RESULTS = "sweep.json", "results.json"
COLUMNS = ("name", "k", "d_sae", "fvu", "l0", "dead", "seconds")


def run(args: argparse.Namespace) -> None:
    """Train the runs of a file, and print how they did.

    Raises:
        RuntimeError: some failed; the others are there.
    """
    for option in ("time_budget", "resume_from"):
        if getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise ValueError(f"train: expected --sweep without --{name}, which is of a single run")
    from fastsae._files.write import write_json
    from fastsae.train import Run, train_many

    resolved, out = read(Path(args.sweep), args.argv[1:]), Path(args.out)
    if args.resume:
        _expect_same_names(out, [run.name for run in resolved])
    device_named(resolved[0].args.device)
    data, val, own_sites, makers = _data(args.store, resolved)
    runs = [
        Run(name, make, config_of(its, str(out / name)), sites)
        for (name, its), make, sites in zip(resolved, makers, own_sites, strict=True)
    ]

    def started(configs: dict[str, TrainConfig]) -> None:
        said = [
            {"name": name, "options": options_of(its), "config": configs[name].to_dict()}
            for name, its in resolved
        ]
        write_json(out / SWEEP, {"format": FORMAT, "store": args.store, "runs": said})

    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", "0"), ("WORLD_SIZE", "1")))
    with narrated() if rank == 0 else nullcontext():
        found = train_many(
            runs,
            data,
            val=val,
            out=out,
            resume=args.resume,
            started=started if rank == 0 else None,
            part=(rank, world),
        )
    rows = [_row(result) for result in found.values()]
    if world > 1:
        rows = _of_all_processes(rows, [run.name for run in runs])
    if rank:
        return
    write_json(out / RESULTS, {"format": f"{FORMAT}-results", "runs": rows})
    emit({"out": args.out, "runs": rows}, args.json, _table(rows))
    failed = [f"{row['name']} ({row['error']})" for row in rows if row["error"]]
    if failed:
        raise RuntimeError(
            f"train: {len(failed)} of {len(rows)} runs failed, --resume tries them again: "
            f"{', '.join(failed)}"
        )


def _of_all_processes(own: list[Values], names: list[str]) -> list[Values]:
    """Return the rows of the runs of all processes, in the order of the runs."""
    from torch import distributed

    # One may be done long before another.
    distributed.init_process_group("gloo", timeout=timedelta(days=365))
    every: list[list[Values]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(every, own)
    distributed.destroy_process_group()
    by_name = {row["name"]: row for part in every for row in part}
    return [by_name[name] for name in names]


def _data(
    store: str, resolved: list[Resolved]
) -> tuple[
    ActivationSource, ActivationSource | None, list[list[str] | None], list[Callable[[], SAE]]
]:
    """Return what to train and to validate on, and for each run its sites and what makes its SAE.

    The columns are those of all sites that a run reads.
    """
    path, first = Path(store), resolved[0].args
    for run in resolved:
        run.args.store = store
    wanted = [sites_of(run.args.arch, run.args.site) for run in resolved]
    if not is_store(path):
        if any(sites != wanted[0] for sites in wanted):
            raise ValueError(f"train: expected one --site for all runs of {path}, got several")
        data, val, widths, about = sources(first)
        makers = [_maker(run.args, widths, about) for run in resolved]
        return data, val, [None] * len(resolved), makers
    from fastsae.data import ActivationStore

    if None in wanted:
        only = list(ActivationStore(path, None, partial=first.partial).sites)
        wanted = [only if sites is None else sites for sites in wanted]
    every = list(dict.fromkeys(site for sites in wanted for site in sites or ()))
    whole = ActivationStore(path, every, partial=first.partial)
    held = ActivationStore(path, every, split="val", partial=first.partial)
    makers = [
        _maker(
            run.args,
            [whole.widths[site] for site in sites or ()],
            metadata_of(whole, sites or (), transcoder="transcoder" in run.args.arch),
        )
        for run, sites in zip(resolved, wanted, strict=True)
    ]
    return whole, held if len(held) else None, wanted, makers


def _maker(args: argparse.Namespace, widths: list[int], about: Values) -> Callable[[], SAE]:
    def make() -> SAE:
        sae = build(args, widths)
        sae.metadata = about
        return sae

    return make


def _expect_same_names(out: Path, names: list[str]) -> None:
    """Raise ValueError if the sweep in `out` had a run that is not there any more."""
    from fastsae._files.read import field, read_json

    if not (out / SWEEP).exists():
        return
    before = read_json(out / SWEEP, "train")
    for run in field(before, "runs", list, out / SWEEP, "train"):
        name = run.get("name") if isinstance(run, dict) else None
        if name not in names:
            raise ValueError(f"train: expected run {name!r} of {out / SWEEP}, got no such run")


def _row(result: RunResult) -> Values:
    """Return how a run did: on validation data where there are some."""
    row: Values = {"name": result.name, "class": type(result.sae).__name__}
    row |= {"k": getattr(result.sae, "k", None), "d_sae": result.sae.d_sae}
    final: dict[str, float] = {} if result.result is None else result.result.final
    for name in ("fvu", "l0", "dead", "seconds"):
        value = final.get(f"val_{name}", final.get(name, math.nan))
        row[name] = value if math.isfinite(value) else None
    return {**row, "steps": result.steps, "error": result.error}


def _table(rows: list[Values]) -> str:
    """Return aligned columns, the first to the left."""
    lines = [COLUMNS, *(tuple(_cell(row, name) for name in COLUMNS) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def _cell(row: Values, name: str) -> str:
    value = row[name]
    if value is None:
        return "failed" if name == "fvu" and row["error"] else "-"
    if name in ("fvu", "l0", "seconds"):
        return f"{value:.4f}" if name == "fvu" else f"{value:.1f}"
    return value if isinstance(value, str) else f"{value:g}"
