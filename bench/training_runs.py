"""A whole training run of a TopK SAE in fastsae and in other libraries, each as its users run it.

All take the same batches in the same order. What differs is each library's own: initialization,
unit of the activations, loss, clipping, optimizer, auxiliary loss and schedule. Where a default of
a schedule is a number of steps, longer than the runs here, it is a share of the run instead.

Timed is everything from the first batch on; fastsae's time also has its measurement of scale and
center. The unit of the activations of the other libraries is measured before that.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fastsae import TopKSAE, TrainConfig, Trainer
from fastsae.data import ActivationSource, ActivationStore, TensorSource
from fastsae.data.source import sample_rows
from parity import dictionary_learning, saelens, sparsify

Reconstruct = Callable[[Tensor], Tensor]

OLD = "fastsae, old rate"


@dataclass(frozen=True)
class Job:
    """What to train on, and for how long."""

    rows: ActivationSource
    d_sae: int
    k: int
    lr: float | None
    """Peak rate in the library's own unit; None: its default."""
    steps: int
    seed: int
    batch_size: int = 512


@dataclass
class Trained:
    """What came out of a run."""

    seconds: float
    reconstruct: Reconstruct
    """From raw rows to raw rows."""
    lr: float
    """The peak rate that was used."""


def load(path: Path, site: str | None = None, held_out: int = 8192) -> tuple[Any, Tensor]:
    """Return training rows, and at most `held_out` others.

    path: a store of `fastsae harvest`, or safetensors with `acts` [n, d] and, in its metadata,
    `n_train`; there, rows above 3 times the median norm are left out.
    """
    if path.is_dir():
        val = ActivationStore(path, site, split="val")
        return ActivationStore(path, site), val.sample(held_out)
    with safe_open(path, "pt") as f:
        acts, n = f.get_tensor("acts").float(), int(f.metadata()["n_train"])
    norm = acts.norm(dim=1)
    usual = norm <= 3 * norm[:n].median()
    return TensorSource(acts[:n][usual[:n]]), acts[n:][usual[n:]][:held_out]


@torch.no_grad()
def fvu(x: Tensor, reconstruct: Reconstruct) -> float:
    """Return sum |x - x_hat|^2 / sum |x - mean x|^2 over all rows."""
    error = sum(float((part - reconstruct(part)).double().square().sum()) for part in x.split(1024))
    return error / float((x.double() - x.double().mean(0)).square().sum())


def _timed(job: Job, update: Callable[[int, Tensor], object]) -> float:
    start = time.perf_counter()
    batches = job.rows.batches(job.batch_size, seed=job.seed)
    for step, x in zip(range(job.steps), batches, strict=False):
        update(step, x)
    return time.perf_counter() - start


def _rate(job: Job, default: float) -> float:
    return default if job.lr is None else job.lr


def _fastsae(job: Job, old: bool = False) -> Trained:
    """Run Trainer.fit with its defaults; old: those before the rate depended on the run."""
    settings: dict[str, Any] = {"lr": job.lr}
    if old:
        settings = {"lr": 2e-4 / (job.d_sae / 2**14) ** 0.5, "decay_fraction": 0.2}
        settings["warmup_steps"] = job.steps // 20
    sae = TopKSAE(job.rows.d_in, job.d_sae, k=job.k)
    settings |= {"steps": job.steps, "batch_size": job.batch_size, "seed": job.seed}
    start = time.perf_counter()
    trainer = Trainer(sae, job.rows, TrainConfig(progress=False, **settings))
    trainer.fit()
    return Trained(time.perf_counter() - start, sae, trainer.plan.lr)


def _dictionary_learning(job: Job) -> Trained:
    """Run trainSAE with normalize_activations: rows of mean squared norm 1.

    Its warm-up of 1000 steps has to be shorter than the run: a twentieth here. The rate falls over
    the last fifth, as in the SAEs that its authors published.
    """
    norm = float(_sample(job).square().sum(1).mean().sqrt())
    lr = _rate(job, 2e-4 / (job.d_sae / 2**14) ** 0.5)
    run: dict[str, Any] = {"lr": lr, "k": job.k, "warmup_steps": job.steps // 20}
    run["decay_start"] = int(0.8 * job.steps)
    sizes = job.rows.d_in, job.d_sae, job.steps
    trainer = dictionary_learning.make_trainer("TopKTrainer", *sizes, **run)
    seconds = _timed(job, lambda step, x: trainer.update(step, x / norm))
    return Trained(seconds, lambda x: trainer.ae(x / norm) * norm, lr)


def _sae_lens(job: Job, sparse: bool = False, centered: bool = False) -> Trained:
    """Run SAETrainer with normalize_activations expected_average_only_in: mean norm sqrt(d).

    No warm-up, and decay over the last fifth, as in its tutorials. b_dec starts at 0; centered: at
    the mean of the first batch, which is not its default.
    """
    d, lr = job.rows.d_in, _rate(job, 3e-4)
    options = {"use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": not sparse}
    sae = saelens.module("TopKTrainingSAE", d, job.d_sae, torch.float32, k=job.k, **options)
    shape = job.batch_size, job.steps, lr
    trainer = saelens.make_trainer(sae, *shape, lr_decay_steps=job.steps // 5)
    scaler = trainer.activation_scaler
    scaler.scaling_factor = d**0.5 / float(_sample(job).norm(dim=1).mean())

    def update(step: int, x: Tensor) -> None:
        if centered and step == 0:
            sae.b_dec.data = scaler(x).mean(0)
        trainer.step(x)
        trainer.n_training_steps += 1

    seconds = _timed(job, update)
    return Trained(seconds, lambda x: scaler.unscale(sae(scaler(x))), lr)


def _sparsify(job: Job, adam: bool = False) -> Trained:
    """Run what Trainer.fit does per batch, on raw rows, without its counters and logging.

    By default its optimizer is signum without a schedule, whose averaged weights are evaluated.
    adam: linear warm-up and decay; a twentieth of the run instead of 1000 steps, and a fused Adam.
    """
    device = torch.device("cpu")
    d = job.rows.d_in
    sae = sparsify.coder(d, job.d_sae, job.k, dtype=torch.float32, device=device)
    library = importlib.import_module("sparsify.trainer")
    lr = _rate(job, (2e-4 if adam else 5e-3) / (job.d_sae / 2**14) ** 0.5)
    optimizer: Any
    if adam:
        optimizer = torch.optim.Adam(sae.parameters(), lr=lr, fused=True)
        plan = library.get_linear_schedule_with_warmup(optimizer, job.steps // 20, job.steps)
    else:
        signs = library.SignSGD(sae.parameters(), lr=lr)
        optimizer, plan = library.ScheduleFreeWrapper(signs, momentum=0.95), None
        optimizer.train()

    def update(step: int, x: Tensor) -> None:
        if step == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if plan is not None:
            plan.step()

    seconds = _timed(job, update)
    if not adam:
        optimizer.eval()
    return Trained(seconds, lambda x: sae(x).sae_out, lr)


def _sample(job: Job) -> Tensor:
    return sample_rows(job.rows, 8192, job.batch_size)


# Name -> what runs it, its settings, and the module it needs.
RUNS: dict[str, tuple[Callable[..., Trained], dict[str, object], str]] = {
    "fastsae": (_fastsae, {}, "fastsae"),
    OLD: (_fastsae, {"old": True}, "fastsae"),
    "dictionary-learning": (_dictionary_learning, {}, "dictionary_learning.trainers"),
    "sae-lens": (_sae_lens, {}, "sae_lens"),
    "sae-lens centered": (_sae_lens, {"centered": True}, "sae_lens"),
    "sae-lens centered sparse": (_sae_lens, {"centered": True, "sparse": True}, "sae_lens"),
    "eai-sparsify signum": (_sparsify, {}, "sparsify"),
    "eai-sparsify adam": (_sparsify, {"adam": True}, "sparsify"),
}


def train(name: str, job: Job) -> Trained:
    """Train from scratch with the implementation called `name`."""
    run, settings, _ = RUNS[name]
    torch.manual_seed(job.seed)
    return run(job, **settings)
