"""Time a TopK training step over processes, against one process and against DDP.

    torchrun --nproc-per-node 2 -m bench.distributed [--shape A] [--rounds 5] [--out F.jsonl]
    torchrun --nproc-per-node 2 -m bench.distributed --memory

    alone             one process with as many threads as there are processes; the others wait
    latent            fastsae, latents spread over all processes, one thread each
    data              fastsae, tokens spread over all processes
    DDP dense torch   the same equations in autograd, DistributedDataParallel, fused Adam
    DDP sparsify      `SparseCoder` of eai-sparsify in DistributedDataParallel, as in its Trainer

All take the same batch and weights. Rounds alternate; a step ends when all processes have done it.
Reported are ratios of medians. `eai-sparsify` is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.ops.inputs import SHAPES
from bench.peers import STEPS, Start, import_error, start
from bench.step_limits import proc_mib
from fastsae import TopKSAE, TrainConfig, Trainer
from fastsae.distributed import make_mesh
from fastsae.distributed.plan import plan
from parity import sparsify
from parity.problem import fill

Step = Callable[[], float]
"""Does one step and returns its loss, the fraction of variance unexplained of the rows it saw."""


def trainer(s: Start, mesh: tuple[int, int] | None) -> Trainer:
    """Return fastsae's trainer at the start of a run, whose first steps are timed."""
    d_sae, d = s.W.shape
    sae = TopKSAE(d, d_sae, s.k)
    sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec = s.W.t(), s.W, s.b_enc, s.b_dec
    settings: dict[str, Any] = {"lr": s.lr, "batch_size": len(s.x), "steps": STEPS}
    settings |= {"warmup_steps": 0, "dead_after_tokens": 10**9, "normalize": False}
    settings["compute_dtype"] = "float32"  # as the others compute
    found = Trainer(sae, None, TrainConfig(**settings, mesh=mesh, progress=False))
    found.prepare(s.x)
    return found


def fastsae(s: Start, mesh: tuple[int, int] | None) -> Step:
    """Return a step of fastsae over a mesh."""
    run = trainer(s, mesh)
    own = run._team.own_rows(s.x)
    return lambda: run._step(own).fvu.item()


class Dense(nn.Module):
    """A TopK SAE in plain torch: [n, d_sae] latents."""

    def __init__(self, s: Start) -> None:
        super().__init__()
        self.k = s.k
        self.W_enc, self.W_dec = nn.Parameter(s.W.clone()), nn.Parameter(s.W.clone())
        self.b_enc, self.b_dec = nn.Parameter(s.b_enc.clone()), nn.Parameter(s.b_dec.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the fraction of variance unexplained."""
        z = F.linear(x - self.b_dec, self.W_enc, self.b_enc)
        top = z.topk(self.k, sorted=False)
        acts = torch.zeros_like(z).scatter_(1, top.indices, top.values.relu())
        error = (x - acts @ self.W_dec - self.b_dec).square().sum()
        loss: Tensor = error / (x - x.mean(0)).square().sum()
        return loss


def ddp_dense(s: Start, rows: Tensor) -> Step:
    """Return a step of the dense composition under DDP."""
    model = DistributedDataParallel(Dense(s))
    adam = torch.optim.Adam(model.parameters(), lr=s.lr, fused=True)

    def step() -> float:
        loss = model(rows)
        loss.backward()
        W_dec = model.module.W_dec
        with torch.no_grad():
            along = torch.einsum("fd,fd->f", W_dec.grad, W_dec)
            W_dec.grad.addcmul_(along.unsqueeze(1), W_dec, value=-1)
            adam.step()
            adam.zero_grad()
            W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))
        return float(loss.detach())

    return step


def ddp_sparsify(s: Start, rows: Tensor) -> Step:
    """Return a step of sparsify under DDP, as its Trainer does it for one module."""
    d_sae, d = s.W.shape
    sae = sparsify.coder(d, d_sae, s.k, dtype=torch.float32, device="cpu")
    fill(sae, sparsify.NAMES, s.weights)
    model = DistributedDataParallel(sae)
    adam = torch.optim.Adam(sae.parameters(), lr=s.lr, fused=True)

    def step() -> float:
        sae.set_decoder_norm_to_unit_norm()
        loss = model(rows).fvu
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        return float(loss.detach())

    return step


def timed(step: Step | None, steps: int, threads: int) -> float:
    """Return milliseconds of a step until all processes have done theirs; None waits."""
    torch.set_num_threads(threads)
    dist.barrier()
    begun = time.perf_counter()
    if step is not None:
        for _ in range(steps):
            step()
    dist.barrier()
    return 1e3 * (time.perf_counter() - begun) / steps


def memory(s: Start, mesh: tuple[int, int] | None) -> dict[str, float]:
    """Return MiB of parameters and averages of this process, and what a step adds at its peak."""
    run = trainer(s, mesh)
    own = run._team.own_rows(s.x)
    for _ in range(2):
        run._step(own[:16])  # buffers of libraries are there afterwards
    gc.collect()
    before = proc_mib("/proc/self/status", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    run._step(own)
    held = [*run.sae.parameters()]
    assert run._update is not None
    state = run._update.state_dict()
    held += [t for part in ("exp_avg", "exp_avg_sq") for t in state[part].values()]
    numbers = sum(t.numel() * t.element_size() for t in held) / 2**20
    return {"held": numbers, "peak": proc_mib("/proc/self/status", "VmHWM") - before}


def main() -> None:
    """Build all, compare their losses, time them, print and keep the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="A", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--without", nargs="+", default=[])
    parser.add_argument("--out")
    parser.add_argument("--memory", action="store_true", help="instead of times")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    make_mesh(1, world)
    n, d, d_sae, k = SHAPES[args.shape]
    s = start(n, d, d_sae, k)
    if args.memory:
        for name, mesh in (("alone", None), ("latent", (1, world)), ("data", (world, 1))):
            if mesh is not None or rank == 0:
                found = memory(s, mesh)
                said = ", ".join(f"{key} {value:.1f} MiB" for key, value in found.items())
                print(f"{name}, process {rank}: {said}", flush=True)
            dist.barrier()
        return
    rows = s.x[rank * n // world : (rank + 1) * n // world]
    ways: dict[str, tuple[Step | None, int]] = {
        "alone": (fastsae(s, None) if rank == 0 else None, world),
        "latent": (fastsae(s, (1, world)), 1),
        "data": (fastsae(s, (world, 1)), 1),
        "DDP dense torch": (ddp_dense(s, rows), 1),
    }
    if not import_error("sparsify"):
        ways["DDP sparsify"] = (ddp_sparsify(s, rows), 1)
    ways = {name: way for name, way in ways.items() if name not in args.without}
    losses = {}
    for name, (step, threads) in ways.items():  # and warms them up
        torch.set_num_threads(threads)
        own = torch.tensor([0.0 if step is None else step()], dtype=torch.float64)
        dist.all_reduce(own)
        losses[name] = float(own) / (1 if name == "alone" else world)
    for name, loss in losses.items():
        if abs(loss - losses["latent"]) > 2e-3 * losses["latent"]:  # DDP: variance of each half
            raise RuntimeError(f"{name}: loss {loss}, expected {losses['latent']}")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, (step, threads) in ways.items():
            times[name].append(timed(step, args.steps, threads))
    if rank == 0:
        report(args, times, world)
    dist.destroy_process_group()


def report(args: argparse.Namespace, times: dict[str, list[float]], world: int) -> None:
    """Print medians, ratios to fastsae's latents, and what the plan says of bytes."""
    n, d, d_sae, k = SHAPES[args.shape]
    middle = {name: statistics.median(t) for name, t in times.items()}
    print(f"shape {args.shape}: n {n}, d {d}, d_sae {d_sae}, k {k}; {world} processes")
    rows = []
    for name, ms in middle.items():
        low, high = min(times[name]), max(times[name])
        row = {"shape": args.shape, "processes": world, "way": name, "ms": ms}
        row |= {"min_ms": low, "max_ms": high, "of_latent": ms / middle["latent"]}
        row["of_alone"] = ms / middle["alone"] if "alone" in middle else None
        rows.append(row)
        print(f"{name:16} {ms:8.1f} ms ({low:.1f}-{high:.1f})  {row['of_latent']:.2f} of latent")
    for mesh in ((1, world), (world, 1)):
        found = plan(d, d_sae, k, n, data=mesh[0], latent=mesh[1])
        sent = found.sent / 1e6
        print(f"plan {mesh}: {len(found.collectives)} collectives, {sent:.1f} MB from each process")
    if args.out:
        with open(args.out, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
