"""Time what a loaded SAE is used for, encode and decode, against SAELens on the same weights.

    python -m bench.inference [--tokens 4096] [--d 2304] [--d-sae 16384] [--l0 70] [--rounds 7]

The weights are random and of the shape of a JumpReLU SAE of Gemma Scope (2B, 16k), with a threshold
for each latent such that `--l0` of them are active on a token. Both are made from one folder and
give the same code and reconstruction before anything is timed. `dense` returns [n, d_sae] as
SAELens does, `sparse` the entries alone.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import fastsae
from fastsae import JumpReLUSAE


def made(args: argparse.Namespace, x: torch.Tensor) -> JumpReLUSAE:
    """Return a JumpReLU SAE whose thresholds keep `l0` latents of a token of x."""
    torch.manual_seed(0)
    sae = JumpReLUSAE(args.d, args.d_sae, apply_b_dec_to_input=False)
    sae.b_enc = 0.1 * torch.randn(args.d_sae)
    with torch.no_grad():
        z = x[:256] @ sae.W_enc + sae.b_enc
        share = 1 - args.l0 / args.d_sae
        scale = 0.5 + torch.rand(args.d_sae)  # of the thresholds among each other
        cut = torch.quantile((z / scale).flatten()[:: max(1, z.numel() >> 22)], share)
        sae.log_threshold.copy_((cut * scale).log())
    return sae.eval()


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d", type=int, default=2304)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--l0", type=float, default=70)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(1)
    x = torch.randn(args.tokens, args.d)
    with tempfile.TemporaryDirectory() as folder:
        fastsae.save(made(args, x), folder, format="saelens")
        ours: Any = fastsae.load(folder)
        theirs = importlib.import_module("sae_lens").SAE.load_from_disk(folder)
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "sae-lens": lambda: theirs.decode(theirs.encode(x)),
            "fastsae dense": lambda: ours.decode(ours.encode(x)),
            "fastsae sparse": lambda: ours.decode(ours.encode_sparse(x)),
        }
        code, expected = theirs.encode(x), ways["sae-lens"]()
        flips = int(((ours.encode(x) != 0) != (code != 0)).sum())
        print(f"L0 {float((code != 0).sum(1).float().mean()):.1f}, {flips} other latents")
        for way in ways.values():
            difference = float((way() - expected).abs().max() / expected.abs().max())
            print(f"  largest relative difference {difference:.1e}")
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - begin)
    middle = {name: statistics.median(found) for name, found in times.items()}
    for name, seconds in middle.items():
        print(f"{name:15} {1e3 * seconds:7.0f} ms  {seconds / middle['sae-lens']:.2f}")


if __name__ == "__main__":
    main()
