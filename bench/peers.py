"""One TopK training step in fastsae, in plain torch and in other libraries.

All implementations start from the same weights, keep their own memory layout, train on the same
batch with Adam at the same learning rate, and are called through their library's interface. No
latent is dead in so few steps, so none computes an auxiliary loss.

The other libraries are optional: pip install eai-sparsify dictionary-learning sae-lens
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae import BatchTopKSAE, TopKSAE, TrainConfig, Trainer
from parity import dictionary_learning, saelens, sparsify
from parity.problem import NAMES, fill

STEPS = 100_000  # length of the runs whose first steps are timed


def import_error(module: str) -> str:
    """Return why a module cannot be imported, or an empty string."""
    # Read by sparsify at import: its Triton decoder takes no CPU tensors.
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(module)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return ""


@dataclass
class Start:
    """What every implementation starts from: a batch, unit rows for both matrices, and biases."""

    x: Tensor
    W: Tensor
    b_enc: Tensor
    b_dec: Tensor
    k: int
    lr: float

    @property
    def weights(self) -> dict[str, Tensor]:
        """Keyed by fastsae's names."""
        return {"W_enc": self.W.t(), "W_dec": self.W, "b_enc": self.b_enc, "b_dec": self.b_dec}


@dataclass
class Way:
    """One implementation: its update, its reconstruction and loss before that, and which loss."""

    step: Callable[[], object]
    forward: Callable[[], tuple[Tensor, Tensor]]
    loss: str = "fvu"  # or mse: squared error summed over d, mean over tokens


def start(n: int, d: int, d_sae: int, k: int, device: str = "cpu") -> Start:
    """Return tokens made of k random latents of very unequal frequency (log-normal), and noise."""
    made: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    W = F.normalize(torch.randn(d_sae, d, **made), dim=1)
    popularity = (1.5 * torch.randn(d_sae, **made)).exp()
    latents = torch.multinomial(popularity.expand(n, d_sae), k, generator=made["generator"])
    values = torch.rand(n, k, **made) + 0.1
    x = F.embedding_bag(latents, W, per_sample_weights=values, mode="sum")
    x += 0.1 * torch.randn(n, d, **made)
    b_enc, b_dec = (0.03 * torch.randn(size, **made) for size in (d_sae, d))
    # The default of fastsae, dictionary-learning and (with Adam) sparsify.
    return Start(x, W, b_enc, b_dec, k, lr=2e-4 / (d_sae / 2**14) ** 0.5)


def trainer(s: Start, update: str, compute_dtype: str, batch: bool = False) -> Trainer:
    """Return fastsae's trainer, prepared; it refuses an update that does not apply."""
    cls = BatchTopKSAE if batch else TopKSAE
    sae = cls(s.W.shape[1], s.W.shape[0], k=s.k).to(s.x.device).train()
    sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec = s.W.t(), s.W, s.b_enc, s.b_dec
    run: dict[str, Any] = {
        "lr": s.lr,
        "batch_size": len(s.x),
        "steps": STEPS,
        "warmup_steps": 0,
        "progress": False,
    }
    run |= {"dead_after_tokens": 10**7, "normalize": False}
    found = Trainer(sae, None, TrainConfig(**run, update=update, compute_dtype=compute_dtype))
    found.prepare(s.x)  # keeps the biases, which are not zero
    return found


def _fastsae(s: Start, **settings: Any) -> Way:
    """Run Trainer's step; its forward is that of the first step, before the update."""
    run, found = trainer(s, **settings), attrgetter("reconstruction", "fvu")
    return Way(lambda: run.step(s.x), lambda: found(run.step(s.x)))


def _dense_torch(
    s: Start, autocast: bool = False, batch: bool = False, compiled: bool = False
) -> Way:
    """Run the same equations in autograd, with [n, d_sae] latents and a fused Adam.

    batch: keep the k n largest of the batch instead of k of each token. compiled: forward and
    backward by torch.compile.
    """
    parameters = [torch.nn.Parameter(p.clone()) for p in (s.W, s.W, s.b_enc, s.b_dec)]
    W_enc, W_dec, b_enc, b_dec = parameters
    adam = torch.optim.Adam(parameters, lr=s.lr, fused=True)

    def forward() -> tuple[Tensor, Tensor]:
        with torch.autocast(s.x.device.type, torch.bfloat16, enabled=autocast):
            z = F.linear(s.x - b_dec, W_enc, b_enc)
            choices = z.flatten().unsqueeze(0) if batch else z
            top = choices.topk(s.k * (len(z) if batch else 1), sorted=False)
            acts = torch.zeros_like(choices).scatter_(1, top.indices, top.values.relu())
            guess = acts.view_as(z) @ W_dec + b_dec
        error = (s.x - guess.float()).square().sum()
        return guess, error / (s.x - s.x.mean(0)).square().sum()

    run = torch.compile(forward) if compiled else forward

    def step() -> None:
        run()[1].backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            along = torch.einsum("fd,fd->f", W_dec.grad, W_dec)
            W_dec.grad.addcmul_(along.unsqueeze(1), W_dec, value=-1)
            adam.step()
            adam.zero_grad()
            W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))

    return Way(step, forward)


def _sparsify(s: Start) -> Way:
    """Run what Trainer.fit of eai-sparsify does per batch, without its counters and logging.

    Decoder rows are normalized before the forward. Adam is fused, which is not its default.
    """
    d_sae, d = s.W.shape
    sae = sparsify.coder(d, d_sae, s.k, dtype=torch.float32, device=s.x.device)
    fill(sae, sparsify.NAMES, s.weights)
    adam = torch.optim.Adam(sae.parameters(), lr=s.lr, fused=True)

    def step() -> None:
        sae.set_decoder_norm_to_unit_norm()
        sae(s.x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return Way(step, lambda: attrgetter("sae_out", "fvu")(sae(s.x)))


def _dictionary_learning(s: Start) -> Way:
    """Run TopKTrainer.update: mse loss, gradient clipped to norm 1, its own Adam (not fused)."""
    d_sae, d = s.W.shape
    run = {"lr": s.lr, "warmup_steps": 0, "k": s.k}
    trainer = dictionary_learning.make_trainer("TopKTrainer", d, d_sae, STEPS, **run)
    fill(trainer.ae, dictionary_learning.LINEAR_TOPK, s.weights)

    def forward() -> tuple[Tensor, Tensor]:
        out = trainer.loss(s.x, step=1, logging=True)
        return out.x_hat, torch.tensor(out.losses["l2_loss"])

    # Step 0 would set b_dec to the geometric median of the batch.
    return Way(lambda: trainer.update(1, s.x), forward, "mse")


def _sae_lens(s: Start, sparse: bool = False) -> Way:
    """Run SAETrainer.step: mse loss, gradient clipped to norm 1, its own Adam (not fused).

    Decoder rows keep their norms; latents are scaled by them, except with a sparse code.
    """
    options = {"use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": not sparse}
    d_sae, d = s.W.shape
    sae = saelens.module("TopKTrainingSAE", d, d_sae, torch.float32, k=s.k, **options)
    fill(sae, NAMES, s.weights)
    trainer = saelens.make_trainer(sae, len(s.x), STEPS, s.lr)
    batch, found = saelens.step_input(s.x), attrgetter("sae_out", "loss")

    def step() -> None:
        trainer.step(s.x)
        trainer.n_training_steps += 1

    return Way(step, lambda: found(sae.training_forward_pass(batch)), "mse")


# Name -> what builds it, its settings, and the module it needs.
WAYS: dict[str, tuple[Callable[..., Way], dict[str, object], str]] = {
    "fastsae": (_fastsae, {"update": "fused", "compute_dtype": "float32"}, "fastsae"),
    "fastsae bf16": (_fastsae, {"update": "fused", "compute_dtype": "bfloat16"}, "fastsae"),
    "fastsae autograd": (_fastsae, {"update": "autograd", "compute_dtype": "float32"}, "fastsae"),
    "dense torch": (_dense_torch, {}, "torch"),
    "dense torch bf16": (_dense_torch, {"autocast": True}, "torch"),
    "eai-sparsify": (_sparsify, {}, "sparsify"),
    "dictionary-learning": (_dictionary_learning, {}, "dictionary_learning.trainers"),
    "sae-lens": (_sae_lens, {}, "sae_lens"),
    "sae-lens sparse": (_sae_lens, {"sparse": True}, "sae_lens"),
}


def build(name: str, s: Start, batch: bool = False) -> Way:
    """Return the implementation called `name`, ready for its first step.

    batch: with BatchTopK instead of TopK; fastsae and dense torch only.
    """
    builder, settings, _ = WAYS[name]
    return builder(s, **settings, **({"batch": True} if batch else {}))


def compiled(s: Start) -> Way:
    """Return the dense step in bfloat16 with its forward and backward by torch.compile."""
    return _dense_torch(s, autocast=True, compiled=True)


def check(ways: dict[str, Way], s: Start) -> None:
    """Raise where a reconstruction or a loss differs from fastsae's before the first step.

    Tokens whose k-th and next latent nearly tie are skipped: rounding decides which one is kept.
    bfloat16 makes many more ties, so there only the loss is compared.
    """
    top = ((s.x - s.b_dec) @ s.W.t() + s.b_enc).topk(s.k + 1).values
    clear = top[:, -2] - top[:, -1] > 1e-4
    expected, fvu = (answer.detach() for answer in ways["fastsae"].forward())
    squared = (s.x - expected).square().sum()
    losses = {"fvu": squared / (s.x - s.x.mean(0)).square().sum(), "mse": squared / len(s.x)}
    for name, way in ways.items():
        guess, loss = (expected, fvu) if name == "fastsae" else way.forward()
        exact = "bf16" not in name
        rtol = 1e-3 if exact else 5e-2
        try:
            if exact:
                torch.testing.assert_close(guess[clear], expected[clear], rtol=rtol, atol=1e-4)
            torch.testing.assert_close(loss, losses[way.loss], rtol=rtol, atol=0)
        except AssertionError as e:
            raise AssertionError(f"{name} differs from fastsae: {e}") from e
