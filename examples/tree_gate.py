"""A Switch SAE whose router is a tree: differentiable, and sparse by itself in the end.

    python examples/tree_gate.py

It takes a minute on one core.

A Switch SAE (Mudide et al. 2024, arXiv 2410.08201) has E small SAEs and a router that gives each
token to one of them. The usual router takes the largest of E probabilities, which hides the others
from the gradient. COMET's (Ibrahim et al. 2023, arXiv 2306.02824) is a binary tree over them:

    S(t) = 0 (t <= -1/2),  -2 t^3 + 3 t / 2 + 1/2,  1 (t >= 1/2)          a smooth step
    v_e  = product of S(t) or 1 - S(t) on the way to leaf e                for every internal node
    gate = softmax_e (logit_e + log v_e)                                   0 where v_e is 0

With k trees at most k experts are used once every tree has settled on one leaf, to which a penalty
on the entropy of v pushes it. Here k = 1, and tokens come from groups with a dictionary each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsae import ops

D, EXPERTS, FEATURES, ACTIVE, LATENTS = 32, 8, 16, 3, 24
ENTROPY = 1.0


def data(n: int, generator: torch.Generator, dictionaries: Tensor) -> Tensor:
    """Return sums of ACTIVE features out of one of the dictionaries `[groups, FEATURES, D]`."""
    group = torch.randint(len(dictionaries), (n, 1), generator=generator)
    active = torch.rand(n, FEATURES, generator=generator).topk(ACTIVE).indices
    strength = 1 + torch.rand(n, ACTIVE, generator=generator)
    return torch.einsum("nk,nkd->nd", strength, dictionaries[group, active])


class SwitchRouter(nn.Module):
    """The expert of the largest probability, times that probability."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, EXPERTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return gates `[n, EXPERTS]`, one of each row not 0, and the penalty of uneven loads."""
        p = self.linear(x).softmax(1)
        chosen = F.one_hot(p.argmax(1), EXPERTS).to(p)
        return p * chosen, 0.01 * EXPERTS * (chosen.mean(0) * p.mean(0)).sum()


class TreeRouter(nn.Module):
    """COMET's gate of one tree; node i has the children 2 i + 1 and 2 i + 2."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes, self.leaves = nn.Linear(D, EXPERTS - 1), nn.Linear(D, EXPERTS)
        for p in self.nodes.parameters():
            nn.init.uniform_(p, -0.01, 0.01)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return gates `[n, EXPERTS]`, and the penalty of the entropy of the leaves."""
        t = self.nodes(x).clamp(-0.5, 0.5)
        step = -2 * t**3 + 1.5 * t + 0.5
        levels = [x.new_ones(len(x), 1)]
        for depth in range(EXPERTS.bit_length() - 1):
            first, count = 2**depth - 1, 2**depth
            s = step[:, first : first + count]
            levels.append(torch.stack([levels[-1] * s, levels[-1] * (1 - s)], 2).flatten(1))
        v = levels[-1]
        log_v = torch.where(v > 0, v, 1).log()
        gate = torch.where(v > 0, self.leaves(x) + log_v, -torch.inf).softmax(1)
        return gate, -ENTROPY * (v * log_v).sum(1).mean()


class SwitchSAE(nn.Module):
    """TopK SAEs side by side, each with its gate."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.W_dec = nn.Parameter(F.normalize(torch.randn(EXPERTS, LATENTS, D), dim=2))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction of `x: [n, D]`, the gates and the penalty of the router."""
        gate, penalty = self.router(x)
        z = torch.einsum("nd,eld->nel", x, self.W_enc)
        values, indices = ops.topk(z.flatten(0, 1), ACTIVE)
        f = torch.zeros_like(z).flatten(0, 1).scatter(1, indices.long(), values.relu())
        written = torch.einsum("bel,eld->bed", f.view_as(z), self.W_dec)
        return (gate.unsqueeze(2) * written).sum(1), gate, penalty


def train(router: type[nn.Module], seed: int, steps: int) -> dict[str, float]:
    """Return the FVU on new tokens, and how many experts a token has."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    dictionaries = F.normalize(torch.randn(EXPERTS, FEATURES, D, generator=generator), dim=2)
    sae = SwitchSAE(router())
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        x = data(512, generator, dictionaries)
        x_hat, _, penalty = sae(x)
        loss = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum() + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x = data(4096, generator, dictionaries)
    with torch.no_grad():
        x_hat, gate, _ = sae(x)
    total = (x - x.mean(0)).square().sum()
    return {
        "fvu": float((x - x_hat).square().sum() / total),
        "experts_per_token": float((gate > 0).sum(1).float().mean()),
        "experts_used": float(gate.argmax(1).unique().numel()),
    }


def main(seeds: int = 3, steps: int = 2000) -> dict[str, list[dict[str, float]]]:
    """Return the numbers of both routers for every seed."""
    routers = {"switch": SwitchRouter, "tree": TreeRouter}
    return {
        name: [train(router, seed, steps) for seed in range(seeds)]
        for name, router in routers.items()
    }


if __name__ == "__main__":
    for name, runs in main().items():
        for key in runs[0]:
            print(f"{name:6} {key:18} {[round(run[key], 3) for run in runs]}")
