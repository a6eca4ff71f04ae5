"""A linear autoencoder trained on sampled prefixes finds principal components, in order.

    python examples/ordered_dropout.py

It takes a few seconds on one core.

    |x - D[:, :r] E[:r] x|^2,   r drawn anew for every update

Whole, the same autoencoder finds the span of the principal components and nothing more: any basis
of it has the same error. With ordered dropout (Rippel et al. 2014, arXiv 1402.0915; Horvath et al.
2024, "Maestro", arXiv 2308.14929) every prefix has to be as good as it can be, so unit i is
component i.
A Matryoshka SAE puts its latents into an order in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

D, UNITS = 24, 8


def data(n: int, generator: torch.Generator, basis: Tensor) -> Tensor:
    """Return rows whose variance along column i of `basis` is 0.7^i."""
    scale = 0.7 ** (torch.arange(D) / 2)
    return (torch.randn(n, D, generator=generator) * scale) @ basis.t()


def train(prefixes: bool, seed: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return the decoder `[D, UNITS]`, and the basis `[D, D]` with the components as columns."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    E = torch.randn(UNITS, D, generator=generator).mul_(0.1).requires_grad_()
    decoder = torch.randn(D, UNITS, generator=generator).mul_(0.1).requires_grad_()
    optimizer = torch.optim.Adam([E, decoder], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        x = data(256, generator, basis)
        r = int(torch.randint(1, UNITS + 1, (), generator=generator)) if prefixes else UNITS
        loss = (x - x @ E[:r].t() @ decoder[:, :r].t()).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return decoder.detach(), basis


def aligned(decoder: Tensor, basis: Tensor) -> Tensor:
    """Return |cosine| of each unit and the component of its place: `[UNITS]`."""
    units = torch.nn.functional.normalize(decoder, dim=0)
    return (units * basis[:, :UNITS]).sum(0).abs()


def spanned(decoder: Tensor, basis: Tensor) -> float:
    """Return the smallest cosine between the span of the units and that of the components."""
    q = torch.linalg.qr(decoder).Q
    return float(torch.linalg.svdvals(q.t() @ basis[:, :UNITS])[-1])


def main(seeds: int = 3, steps: int = 3000) -> dict[str, tuple[Tensor, Tensor]]:
    """Return cosines of units with components, `[seeds, UNITS]`, and of the spans, `[seeds]`."""
    found = {}
    for name, prefixes in (("prefixes", True), ("whole", False)):
        runs = [train(prefixes, seed, steps) for seed in range(seeds)]
        cosines = torch.stack([aligned(*run) for run in runs])
        found[name] = cosines, torch.tensor([spanned(*run) for run in runs])
    return found


if __name__ == "__main__":
    for name, (cosines, spans) in main().items():
        print(f"{name:9} unit i and component i: mean |cosine| {float(cosines.mean()):.3f}", end="")
        print(f", smallest {float(cosines.min()):.3f}; spans {float(spans.min()):.3f}")
