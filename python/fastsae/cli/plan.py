"""`fastsae plan`: what a run over many devices will hold, send and take."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastsae.cli.console import emit, positive, subcommand, table

if TYPE_CHECKING:
    from fastsae.distributed.plan import Machine, Plan

EXAMPLE = """
fastsae plan --d-in 4096 --d-sae 1048576 --k 64 --batch 65536 --tokens 8e9 --gpus 64
fastsae plan --d-in 2304 --d-sae 65536 --k 32 --batch 8192 --gpus 8 --latent-parallel 4
"""


def add_to(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(subparsers, "plan", "say what a run over many devices takes", EXAMPLE, run)
    for name, text in (
        ("d-in", "width of the activations"),
        ("d-sae", "number of latents"),
        ("gpus", "processes, each with a device"),
    ):
        parser.add_argument(f"--{name}", type=positive, required=True, help=text)
    parser.add_argument("--k", type=float, default=32, help="active latents per token (default 32)")
    parser.add_argument(
        "--batch", type=positive, help="tokens of a step, of all devices (default 4096 for each)"
    )
    parser.add_argument("--tokens", type=float, help="of the whole run, to say how long it takes")
    parser.add_argument(
        "--arch",
        default="topk",
        choices=("topk", "batchtopk", "matryoshka", "jumprelu", "transcoder"),
    )
    parser.add_argument("--d-out", type=positive, help="width of a transcoder's target")
    parser.add_argument(
        "--latent-parallel", type=positive, metavar="N",
        help="devices that latents are spread over (default: what is fastest and fits)",
    )  # fmt: skip
    parser.add_argument(
        "--machine",
        default="h200",
        choices=("h200", "h200-nodes"),
        help="ceilings: H200 over NVLink (default), or over 400 Gb/s between nodes",
    )
    parser.add_argument("--flops", type=float, help="per second and device, instead of its own")
    parser.add_argument("--memory-rate", type=float, help="bytes per second, instead of its own")
    parser.add_argument("--link", type=float, help="bytes per second, instead of its own")
    parser.add_argument("--latency", type=float, help="seconds of a collective, instead of its own")
    parser.add_argument(
        "--memory", type=float, default=141e9, help="bytes of a device (default 141e9)"
    )


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    from dataclasses import asdict, replace

    from fastsae.distributed.plan import MACHINES

    own = {"flops": args.flops, "memory": args.memory_rate, "link": args.link}
    own["latency"] = args.latency
    machine = replace(
        MACHINES[args.machine], **{name: value for name, value in own.items() if value is not None}
    )
    found = _best(args, machine)
    parts = found.seconds(machine)
    seconds = sum(parts.values())
    batch = found.rows * found.data
    rows = [
        ("mesh", f"{found.data} data groups x {found.latent} latent processes"),
        ("latents of a device", f"{found.held:,}"),
        ("tokens of a step", f"{batch:,}, {found.rows:,} of a data group"),
        ("memory of a device", _memory(found)),
        ("collectives of a step", f"{len(found.collectives)}, {_bytes(found.sent)} from a device"),
        *((f"  {one.kind}, {one.dimension}", _said(one)) for one in found.collectives),
        ("step at the ceilings", f"{1e3 * seconds:.3g} ms"),
        *((f"  {name}", f"{1e3 * part:.3g} ms") for name, part in parts.items()),
        ("tokens per second", f"{batch / seconds:,.0f} at most"),
    ]
    if args.tokens is not None:
        hours = args.tokens / batch * seconds / 3600
        rows.append(("whole run", f"{hours:.3g} hours at least, {hours * args.gpus:.3g} GPU hours"))
    rows.append(("", "a plan from sizes and ceilings; only a run tells the time"))
    result = {
        "data": found.data,
        "latent": found.latent,
        "held": found.held,
        "batch": batch,
        "memory": found.memory,
        "sent": found.sent,
        "collectives": [asdict(one) for one in found.collectives],
        "seconds": parts,
        "tokens_per_second": batch / seconds,
    }
    emit(result, args.json, table(rows))


def _best(args: argparse.Namespace, machine: Machine) -> Plan:
    """Return the plan for the mesh asked for, or for the fastest one that fits."""
    from fastsae.distributed.plan import plan

    batch = args.batch or 4096 * args.gpus
    if args.latent_parallel is not None and args.gpus % args.latent_parallel:
        raise ValueError(
            f"plan: expected --latent-parallel to divide --gpus {args.gpus}, got "
            f"{args.latent_parallel}"
        )
    meshes = [latent for latent in range(1, args.gpus + 1) if args.gpus % latent == 0]
    plans, why = [], ""
    for latent in meshes if args.latent_parallel is None else [args.latent_parallel]:
        try:
            found = plan(
                args.d_in,
                args.d_sae,
                args.k,
                batch,
                data=args.gpus // latent,
                latent=latent,
                architecture=args.arch,
                d_out=args.d_out,
            )
        except ValueError as error:
            why = str(error)
        else:
            plans.append(found)
    if not plans:
        raise ValueError(why)
    fitting = [found for found in plans if found.memory <= args.memory]
    if not fitting:
        least = min(plans, key=lambda found: found.memory)
        raise ValueError(
            f"plan: expected a device with {_bytes(least.memory)} at least ({least.data} x "
            f"{least.latent}), got {_bytes(args.memory)}"
        )
    return min(fitting, key=lambda found: sum(found.seconds(machine).values()))


def _memory(found: Plan) -> str:
    return (
        f"{_bytes(found.memory)}: {_bytes(found.parameters)} of parameters, "
        f"{_bytes(found.optimizer)} of averages, {_bytes(found.batch)} of a batch"
    )


def _said(one: Any) -> str:
    return f"{_bytes(one.bytes)}: {one.what}"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
