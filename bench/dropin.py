"""Time other libraries' own trainers with fastsae's kernels inside and without.

    python -m bench.dropin [--shape A] [--only TopK] [--rounds 7] [--threads 2] [--cpu]
                           [--out F.jsonl]

Each line is one trainer of one library: the median time of its step as it is installed, with
`fastsae.interop.dropin`, and the ratio of the two. Both start from the same weights, and their
first losses are compared before anything is timed; then they step alternately on the same batch.
Nothing of a trainer is left out: gradient clipping, optimizer, statistics, schedules. sparsify's
trainer runs whole (`fit`), on a model that only looks its activations up, and is switched between
its steps.

Where other programs run, threads wait for each other and wall-clock times say little: `--threads 1
--cpu` counts the time that the processor works on each step.

A library that is not installed is skipped: pip install sae-lens eai-sparsify dictionary-learning
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.ops.inputs import SHAPES, describe
from bench.peers import Start, import_error, start
from bench.run import machine

Step = Callable[[], object]
STEPS = 100_000  # length of the runs whose first steps are timed
THEIRS, OURS, UNFUSED = "theirs", "ours", "ours, their Adam"

clock: Callable[[], float] = time.perf_counter

# --- sae-lens -------------------------------------------------------------------------------------

SAE_LENS = ("TopK", "BatchTopK", "MatryoshkaBatchTopK", "JumpReLU")


def sae_lens(name: str, s: Start) -> dict[str, Step]:
    """Return a step of its trainer for each way, checked; `register` decides what it builds."""
    fast = importlib.import_module("fastsae.interop.dropin.sae_lens")
    lens, d_sae, d_in = importlib.import_module("sae_lens"), *s.W.shape
    options: dict[str, Any] = {"k": s.k}
    if name == "MatryoshkaBatchTopK":
        options["matryoshka_widths"] = [d_sae // 32, d_sae // 8, d_sae // 2, d_sae]
    if name == "JumpReLU":
        options = {"jumprelu_init_threshold": _threshold(s), "decoder_init_norm": 1.0}
    config = getattr(lens, f"{name}TrainingSAEConfig")(d_in=d_in, d_sae=d_sae, **options)
    settings = importlib.import_module("sae_lens.config").SAETrainerConfig(
        len(s.x) * STEPS, len(s.x), lr=s.lr, lr_end=s.lr
    )
    works: dict[str, Step] = {}
    losses: dict[str, float] = {}
    for way in (THEIRS, OURS, UNFUSED):
        if way != THEIRS:
            fast.register(fused_adam=way == OURS)
        torch.manual_seed(0)
        sae = lens.TrainingSAE.from_dict(config.to_dict())
        trainer = lens.SAETrainer(settings, sae, data_provider=iter(()))
        fast.unregister()
        losses[way] = float(trainer.step(s.x).loss.detach())
        works[way] = _counted(trainer, s.x)
    _same(losses)
    return works


def _threshold(s: Start) -> float:
    """Return a threshold that k latents per token exceed, for unit rows of seed 0."""
    torch.manual_seed(0)
    W = nn.functional.normalize(nn.init.kaiming_uniform_(torch.empty_like(s.W)))
    return float((s.x[:64] @ W.t()).flatten().topk(64 * s.k).values[-1])


def _counted(trainer: Any, x: Tensor) -> Step:
    def step() -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


# --- dictionary-learning --------------------------------------------------------------------------

DICTIONARY_LEARNING = {
    "TopKTrainer": "top_k",
    "BatchTopKTrainer": "batch_top_k",
    "MatryoshkaBatchTopKTrainer": "matryoshka_batch_top_k",
}


def dictionary_learning(name: str, s: Start) -> dict[str, Step]:
    """Return an update of its trainer for each way, checked."""
    fast = importlib.import_module("fastsae.interop.dropin.dictionary_learning")
    theirs = importlib.import_module(f"dictionary_learning.trainers.{DICTIONARY_LEARNING[name]}")
    d_sae, d_in = s.W.shape
    run: dict[str, Any] = {"steps": STEPS, "activation_dim": d_in, "dict_size": d_sae, "k": s.k}
    run |= {"layer": 0, "lm_name": "none", "device": "cpu", "warmup_steps": 0, "lr": s.lr}
    if name.startswith("Matryoshka"):
        run["group_fractions"] = [1 / 32, 3 / 32, 3 / 8, 1 / 2]
    works: dict[str, Step] = {}
    losses: dict[str, float] = {}
    for way, module in ((THEIRS, theirs), (OURS, fast)):
        trainer = getattr(module, name)(**run, seed=0)
        losses[way] = trainer.update(1, s.x)  # step 0 would compute a geometric median
        works[way] = partial(trainer.update, 1, s.x)
    _same(losses)
    return works


# --- sparsify -------------------------------------------------------------------------------------

SPARSIFY = ("signum", "adam")


class LookUp(nn.Module):
    """Stands for a language model: token i has activation `rows[i]`, at the module `embed`."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(rows)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> LookUp:
        """Itself."""
        return self

    @property
    def device(self) -> torch.device:
        """Of the rows."""
        device: torch.device = self.embed.weight.device
        return device

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return activations `[sequences, tokens, d]`."""
        found: Tensor = self.embed(input_ids)
        return found


class Switching:
    """A data set of one sequence over and over; before it is read, the next way is switched to."""

    def __init__(self, tokens: int, rounds: int, switches: dict[str, Step]) -> None:
        self.tokens, self.rounds, self.switches = torch.arange(tokens), rounds, switches
        self.times: dict[str, list[float]] = {way: [] for way in switches}
        self.running, self.since = "", 0.0

    def __len__(self) -> int:
        return len(self.switches) * (self.rounds + 1) + 1

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        if i > len(self.switches):  # the first step of each is not counted
            self.times[self.running].append(1e3 * (clock() - self.since))
        self.running = [*self.switches][i % len(self.switches)]
        self.switches[self.running]()
        self.since = clock()
        return {"input_ids": self.tokens}


def sparsify_trainer(
    optimizer: str, rows: Tensor, data: Any, d_sae: int, k: int, **more: Any
) -> Any:
    """Return its trainer on activations `rows: [n, d]`, which writes no files."""
    library = importlib.import_module("sparsify")
    coder = library.SparseCoderConfig(num_latents=d_sae, k=k, **more.pop("sae", {}))
    config = library.TrainConfig(
        coder, batch_size=1, optimizer=optimizer, hookpoints=["embed"], log_to_wandb=False, **more
    )
    trainer = library.Trainer(config, data, LookUp(rows))
    trainer.save = lambda: None
    return trainer


def sparsify(optimizer: str, s: Start, rounds: int) -> dict[str, list[float]]:
    """Return the times of the steps of its `fit`, with and without us alternately."""
    fast = importlib.import_module("fastsae.interop.dropin.sparsify")
    tuned = contextlib.ExitStack()

    def ours() -> None:
        fast.enable()
        tuned.enter_context(fast.optimizers_in_one_pass(trainer.optimizers))

    def theirs() -> None:
        fast.disable()
        tuned.close()

    data = Switching(len(s.x), rounds, {THEIRS: theirs, OURS: ours})
    precision = torch.get_float32_matmul_precision()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer = sparsify_trainer(optimizer, s.x, data, len(s.W), s.k)
        (coder,) = trainer.saes.values()
        losses = {THEIRS: float(coder(s.x).fvu.detach())}
        with fast.enabled():
            losses[OURS] = float(coder(s.x).fvu.detach())
        _same(losses)
        trainer.fit()
    fast.disable()
    torch.set_float32_matmul_precision(precision)
    return data.times


# --- All ------------------------------------------------------------------------------------------


def _same(losses: dict[str, float]) -> None:
    """Raise where a loss differs from theirs by more than float32 explains."""
    for way, loss in losses.items():
        if not abs(loss - losses[THEIRS]) <= 1e-4 * abs(losses[THEIRS]):
            raise AssertionError(f"the first loss {way} is {loss}, theirs is {losses[THEIRS]}")


def alternately(works: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the times of `rounds` steps of each, in ms, after an untimed one."""
    times: dict[str, list[float]] = {way: [] for way in works}
    for i in range(rounds + 1):
        for way, work in works.items():
            begin = clock()
            work()
            if i:
                times[way].append(1e3 * (clock() - begin))
    return times


def cases(s: Start, rounds: int) -> Iterator[tuple[str, str, Callable[[], dict[str, list[float]]]]]:
    """Yield package, class, and what times it."""
    for name in SAE_LENS:
        yield "sae-lens", name, partial(_timed, sae_lens, name, s, rounds)
    for name in SPARSIFY:
        yield "eai-sparsify", f"Trainer, {name}", partial(sparsify, name, s, rounds)
    for name in DICTIONARY_LEARNING:
        yield "dictionary-learning", name, partial(_timed, dictionary_learning, name, s, rounds)


def _timed(
    build: Callable[[str, Start], dict[str, Step]], name: str, s: Start, rounds: int
) -> dict[str, list[float]]:
    return alternately(build(name, s), rounds)


MODULES = {
    "sae-lens": "sae_lens",
    "eai-sparsify": "sparsify",
    "dictionary-learning": "dictionary_learning.trainers",
}


def main() -> int:
    """Parse arguments, measure, print, write."""
    parser = argparse.ArgumentParser(description="time other libraries' trainers with fastsae")
    parser.add_argument("--shape", default="A", choices=list(SHAPES))
    parser.add_argument("--only", default="", help="part of a library's or a class's name")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="processor time, not wall-clock time")
    parser.add_argument("--out", type=Path, help="write JSON lines here")
    arguments = parser.parse_args()
    global clock
    clock = time.process_time if arguments.cpu else time.perf_counter
    torch.set_num_threads(arguments.threads)
    rows = [{**machine("cpu"), "shape": describe(arguments.shape), "rounds": arguments.rounds}]
    rows[0] |= {"threads": arguments.threads, "clock": clock.__name__}
    missing = {package: import_error(module) for package, module in MODULES.items()}
    s = start(*SHAPES[arguments.shape])
    for package, name, timed in cases(s, arguments.rounds):
        if arguments.only.lower() not in f"{package} {name}".lower():
            continue
        if missing[package]:
            print(f"left out: {package} {name} ({missing[package]})", file=sys.stderr)
            continue
        found = timed()
        middle = {way: statistics.median(times) for way, times in found.items()}
        ratios = {way: ms / middle[THEIRS] for way, ms in middle.items() if way != THEIRS}
        shown = ", ".join(f"{way} {middle[way]:.0f} ms = {r:.2f}" for way, r in ratios.items())
        label = f"{package} {version(package)} {name}"
        print(f"{label}: theirs {middle[THEIRS]:.0f} ms, {shown}", flush=True)
        row = {"library": package, "version": version(package), "class": name, "ms": middle}
        rows.append({**row, "min_ms": {way: min(times) for way, times in found.items()}})
        gc.collect()
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
