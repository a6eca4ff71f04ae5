"""Find out from how full a code dense matmuls are faster than the sparse kernels.

    python -m bench.crossover [--n 1024] [--d 576] [--d-sae 9216] [--rounds 7]

For codes with a growing share of active entries, the time of each op with the kernels over that
with dense matmuls (`fastsae.ops._dense`), medians of alternating rounds after both gave the same.
The shares at which it crosses 1 are what `_dense.SHARE` should hold on this machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.ops import _dense
from fastsae.types import SparseActs, StepTensors

SHARES = (1 / 32, 1 / 16, 1 / 12, 1 / 8, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 1 / 2)


@contextmanager
def dense(wanted: bool) -> Any:
    """Have every call be dense, or none."""
    least, share = _dense.LEAST, _dense.SHARE
    _dense.LEAST = 1 if wanted else 1 << 60
    _dense.SHARE = dict.fromkeys(share, 0.0)
    try:
        yield
    finally:
        _dense.LEAST, _dense.SHARE = least, share


def calls(args: argparse.Namespace, acts: SparseActs) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed, by the name of its share."""
    W, g = torch.randn(args.d_sae, args.d), torch.randn(args.n, args.d)
    grad_values = torch.randn_like(acts.values)
    sizes = ((args.d_sae, args.d), (args.d_sae, args.d), (args.d_sae,), (args.d,))

    def step() -> Tensor:
        torch.manual_seed(0)
        p, m, v = (StepTensors(*(torch.full(s, 0.1) for s in sizes)) for _ in range(3))
        ops.sparse_adam_step_(p, m, v, acts, grad_values, g, g, lr=1e-3, step=1)
        return p.W_dec

    return {
        "sparse_decode": lambda: ops.sparse_decode(acts, W),
        "sparse_decode_values_grad": lambda: ops.sparse_decode_values_grad(g, acts, W),
        "sparse_weight_grad": step,  # two of them and the update
    }


def ratio(call: Callable[[], Tensor], rounds: int) -> float:
    """Return the time of the kernels over that of dense matmuls."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for round_ in range(rounds + 1):
        found = []
        for wanted in (True, False):
            with dense(wanted):
                start = time.perf_counter()
                found.append(call())
            if round_:
                times[wanted].append(time.perf_counter() - start)
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    return statistics.median(times[False]) / statistics.median(times[True])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=9216)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"{'share':>8} {'L0':>6}  " + "  ".join(_dense.SHARE))
    for share in SHARES:
        torch.manual_seed(0)
        chosen = torch.rand(args.n, args.d_sae) < share
        acts = SparseActs.from_dense(torch.where(chosen, torch.rand(args.n, args.d_sae) + 0.1, 0))
        found = {name: ratio(call, args.rounds) for name, call in calls(args, acts).items()}
        shown = "  ".join(f"{found[name]:>{len(name)}.2f}" for name in _dense.SHARE)
        print(f"{share:8.3f} {share * args.d_sae:6.0f}  {shown}", flush=True)


if __name__ == "__main__":
    main()
