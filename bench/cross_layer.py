"""Time a training step of a cross-layer transcoder beside plain torch and decode-clt's own loop.

    python -m bench.cross_layer [--layers 6] [--d-model 256] [--latents 4096] [--k 192]
                                [--tokens 1024] [--rounds 5] [--threads 2]

fastsae        Trainer.step: TopK of the latents of all layers, AuxK off
dense torch    the same mathematics in plain torch: codes [n, latents], one matmul for each layer's
               decoder, torch's fused Adam, gradients along decoder rows removed, rows of norm 1
decode-clt     CrossLayerTranscoder and LossManager of decode-clt 0.0.1 as its trainer calls them,
               with AdamW, its penalties off; it ranks pre-activations that it has standardized, so
               its code is another. pip install --no-deps decode-clt (torch is all that is used)

Before anything is timed, one step of fastsae and of dense torch starts from the same weights, and
loss and outputs are compared. Steps run alternately, and medians are printed. Peak memory is that
of a process of its own with nothing but the way: parameters, optimizer state and steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastsae
from bench.step_limits import proc_mib
from fastsae import TrainConfig, Trainer


class Size(NamedTuple):
    """Of one comparison."""

    layers: int
    d_model: int
    latents: int
    k: int
    tokens: int


class Start(NamedTuple):
    """Weights and a batch that every way begins with."""

    W_enc: list[Tensor]
    W_dec: list[Tensor]
    x: Tensor
    y: Tensor


Step = Callable[[], tuple[Tensor, Tensor]]
"""Does one update; returns its loss and its outputs."""


def start(size: Size) -> Start:
    """Return random weights with decoder rows of norm 1, and rows of columns of variance 1."""
    torch.manual_seed(0)
    layers, d, latents, _, n = size
    W_enc = [torch.randn(latents, d) / d**0.5 for _ in range(layers)]
    rows = [torch.randn(latents, (layers - layer) * d) for layer in range(layers)]
    W_dec = [W / W.norm(dim=1, keepdim=True) for W in rows]
    return Start(W_enc, W_dec, torch.randn(n, layers * d), torch.randn(n, layers * d))


def fastsae_step(size: Size, s: Start) -> Step:
    """`Trainer.step`, as in a loop of one's own."""
    layers, d, latents, k, n = size
    clt = fastsae.CrossLayerTranscoder(d, layers, latents, k, auxk_alpha=0)
    with torch.no_grad():
        clt.W_enc_rows.copy_(torch.cat(s.W_enc))
        for own, W in zip(clt.W_decs, s.W_dec, strict=True):
            own.copy_(W)
    options: dict[str, Any] = {"normalize": False, "b_dec_init": "zeros", "weight_init": "random"}
    config = TrainConfig(
        batch_size=n,
        steps=10**6,
        lr=1e-4,
        clip_outliers=False,
        compute_dtype="float32",
        progress=False,
        **options,
    )
    batch = torch.cat([s.x, s.y], 1)
    trainer = Trainer(clt, None, config)
    trainer.prepare(batch)

    def step() -> tuple[Tensor, Tensor]:
        out = trainer.step(batch)
        return out.loss, out.reconstruction

    return step


def dense_step(size: Size, s: Start) -> Step:
    """The same in plain torch."""
    layers, d, _, k, n = size
    W_enc = [torch.nn.Parameter(W.clone()) for W in s.W_enc]
    W_dec = [torch.nn.Parameter(W.clone()) for W in s.W_dec]
    b_enc = [torch.nn.Parameter(torch.zeros(len(W))) for W in W_enc]
    b_dec = torch.nn.Parameter(torch.zeros(layers * d))
    optimizer = torch.optim.Adam([*W_enc, *W_dec, *b_enc, b_dec], lr=1e-4, fused=True)
    inputs = [part.contiguous() for part in s.x.split(d, 1)]
    variance = (s.y - s.y.mean(0)).square().sum()

    def step() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        z = torch.cat(
            [torch.addmm(b, x, W.t()) for x, W, b in zip(inputs, W_enc, b_enc, strict=True)], 1
        )
        top = z.topk(k, dim=1)
        code = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
        y_hat = b_dec.expand(n, -1).clone()
        for layer, f in enumerate(code.chunk(layers, 1)):
            y_hat[:, layer * d :] += f @ W_dec[layer]
        loss = (y_hat - s.y).square().sum() / variance
        loss.backward()
        with torch.no_grad():
            for W in W_dec:
                assert W.grad is not None
                along = (W.grad * W).sum(1, keepdim=True)
                W.grad.addcmul_(along, W, value=-1)
            optimizer.step()
            for W in W_dec:
                W.div_(W.norm(dim=1, keepdim=True))
        return loss.detach(), y_hat.detach()

    return step


def decode_clt_step(size: Size, s: Start) -> Step:
    """What the trainer of decode-clt does in a step."""
    config: Any = import_module("clt.config")
    model_of: Any = import_module("clt.models.clt").CrossLayerTranscoder
    losses_of: Any = import_module("clt.training.losses").LossManager
    layers, d, latents, k, _ = size
    about = config.CLTConfig(latents, layers, d, activation_fn="topk", topk_k=k)
    settings = config.TrainingConfig(
        learning_rate=1e-4,
        training_steps=1000,
        normalization_method="none",
        sparsity_lambda=0.0,
        preactivation_coef=0.0,
        activation_path="nowhere",
    )
    model = model_of(about, None, torch.device("cpu"))
    losses = losses_of(settings, clt_config=about)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs, targets = (dict(enumerate(t.split(d, 1))) for t in (s.x, s.y))

    def step() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        code = model.get_feature_activations(inputs)
        loss, _ = losses.compute_total_loss(
            model, inputs, targets, 0, 1000, precomputed_activations=code
        )
        loss.backward()
        optimizer.step()
        return loss.detach(), code[0].detach()

    return step


WAYS = {"fastsae": fastsae_step, "dense torch": dense_step, "decode-clt": decode_clt_step}


def peak_mib(name: str, size: Size, threads: int) -> float:
    """Return the peak memory of this process with two steps, less what it has before them."""
    torch.set_num_threads(threads)
    s = start(size)
    before = proc_mib("/proc/self/status", "VmRSS")
    step = WAYS[name](size, s)
    for _ in range(2):
        step()
    return proc_mib("/proc/self/status", "VmHWM") - before


def check(steps: dict[str, Step]) -> None:
    """Compare the first steps of fastsae and of dense torch."""
    (loss, out), (their_loss, their_out) = (steps[name]() for name in ("fastsae", "dense torch"))
    torch.testing.assert_close(loss, their_loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out, their_out, rtol=1e-3, atol=1e-3)


def main() -> int:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description="time a step of a cross-layer transcoder")
    for name, value in (("layers", 6), ("d-model", 256), ("latents", 4096), ("k", 192)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    size = Size(a.layers, a.d_model, a.latents, a.k, a.tokens)
    torch.set_num_threads(a.threads)
    names = [name for name in WAYS if name != "decode-clt" or find_spec("clt")]
    steps = {name: WAYS[name](size, start(size)) for name in names}
    check(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(a.rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    peaks = {}
    for name in names:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            peaks[name] = pool.submit(partial(peak_mib, name, size, a.threads)).result()
    for name in names:
        seconds = statistics.median(times[name][1:])
        row = {"implementation": name, **size._asdict(), "ms": round(1000 * seconds, 1)}
        row |= {"tokens_per_second": round(a.tokens / seconds), "peak_mib": round(peaks[name])}
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
