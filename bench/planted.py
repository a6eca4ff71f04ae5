"""Synthetic activations with known features, and how well an SAE finds them.

    python -m bench.planted            # a table of every architecture

Three kinds: `independent` features fire on their own, `correlated` ones in groups that share a
switch, `hierarchical` ones only together with their parent. Features lie along random directions;
a token is the sum of its active ones. For transcoders and crosscoders every block of columns has
its own directions; the gradient SAE gets the gradient of |x|^2 / 2, which is x.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

from bench.architectures import ARCHITECTURES, LAYERS, OTHERS, build
from fastsae import SAE, TrainConfig, Trainer

KINDS = ("independent", "correlated", "hierarchical")


class Planted(NamedTuple):
    """Data with known features."""

    x: Tensor
    """[n, d]"""
    code: Tensor
    """[n, features]: how strongly each is in a token"""
    directions: Tensor
    """[features, d], norm 1; of what is reconstructed"""


class Recovery(NamedTuple):
    """How well the features were found, both in 0..1."""

    cosine: float
    """Mean over features of the largest cosine with a decoder row."""
    f1: float
    """Mean over features of the best F1 of a latent: token by token, fires or not."""


def planted(kind: str, n: int, features: int, d: int, active: float, seed: int) -> Planted:
    """Make `n` tokens with `active` features on average.

    Raises:
        ValueError: another kind.
    """
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(features, d, generator=g), dim=1)
    on = torch.rand(n, features, generator=g)
    if kind == "independent":
        # Frequencies that fall with the rank, as those of real features do.
        share = torch.arange(1, features + 1).float() ** -0.5
        fires = on < (share * active / share.sum()).clamp(max=0.9)
    elif kind == "correlated":
        group = torch.arange(features) // 4
        switch = torch.rand(n, int(group.max()) + 1, generator=g) < 2 * active / features
        fires = switch[:, group] & (on < 0.5)
    elif kind == "hierarchical":
        # Every fourth feature is a parent; its three children share it and exclude each other.
        parent = torch.arange(features) // 4
        awake = torch.rand(n, int(parent.max()) + 1, generator=g) < 4 * active / (2 * features)
        child = torch.randint(1, 4, awake.shape, generator=g)
        place = torch.arange(features) % 4
        fires = awake[:, parent] & ((place == 0) | (place == child[:, parent]))
    else:
        raise ValueError(f"planted: expected kind in {', '.join(KINDS)}, got {kind!r}")
    strength = 1 + torch.rand(n, features, generator=g)
    code = torch.where(fires, strength, 0.0)
    return Planted(code @ directions, code, directions)


def for_architecture(name: str, data: Planted, seed: int) -> Planted:
    """Return `data` with the columns that the architecture `name` reads."""
    blocks = len(LAYERS) if name.startswith("CrossCoder") else 2
    g = torch.Generator().manual_seed(seed + 1)
    shape = (blocks - 1, *data.directions.shape)
    others = torch.nn.functional.normalize(torch.randn(shape, generator=g), dim=2)
    if name.startswith("Gradient"):
        return data._replace(x=torch.cat([data.x, data.x], 1))
    if name.startswith("Transcoder"):
        y = data.code @ others[0]
        return Planted(torch.cat([data.x, y], 1), data.code, others[0])
    if name.startswith("CrossCoder"):
        directions = torch.cat([data.directions, *others], 1)
        return Planted(data.code @ directions, data.code, directions / blocks**0.5)
    return data


@torch.no_grad()
def recovery(sae: SAE, data: Planted) -> Recovery:
    """Compare what `sae` learned with what was planted, on the tokens of `data`."""
    rows = torch.nn.functional.normalize(sae.W_dec.float(), dim=1)
    cosine = (data.directions @ rows.t()).amax(1).mean()
    fired, true = (sae.encode(sae.columns.split(data.x).x) != 0).float(), (data.code != 0).float()
    both = true.t() @ fired
    f1 = 2 * both / (true.sum(0)[:, None] + fired.sum(0)[None]).clamp_min(1)
    return Recovery(float(cosine), float(f1.amax(1).mean()))


def main() -> None:
    """Train every architecture on every kind of data, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [*ARCHITECTURES, *(name for name in OTHERS if not name.startswith("SAE of"))]
    parser.add_argument("--only", nargs="*", default=every, help="architectures")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=30_000)
    arguments = parser.parse_args()
    features, d, active = 64, 32, 3
    print("| architecture | " + " | ".join(f"{kind}: cosine, F1" for kind in KINDS) + " |")
    print("|---" * (len(KINDS) + 1) + "|")
    for name in arguments.only:
        cells = []
        for kind in KINDS:
            found = []
            for seed in range(arguments.seeds):
                data = planted(kind, arguments.tokens + 5000, features, d, active, seed)
                data = for_architecture(name, data, seed)
                train, held_out = (
                    Planted(data[0][part], data[1][part], data.directions)
                    for part in (slice(5000, None), slice(5000))
                )
                torch.manual_seed(1000 + seed)  # the same seed would draw the features again
                sae = build(name, d, 2 * features, 4 if name == "GroupMax" else active)
                config = TrainConfig(
                    batch_size=500, epochs=15, lr=3e-3, warmup_steps=20, seed=seed, progress=False
                )
                found.append(recovery(Trainer(sae, train.x, config).fit().sae, held_out))
            cosine, f1 = (torch.tensor(v).mean() for v in zip(*found, strict=True))
            cells.append(f"{cosine:.3f}, {f1:.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
