"""Run the table of calls in one namespace and compare with the CPU: for sanitizers, which want a
process of their own.

    python -m tests.cuda_emulation.run_calls [--library FILE] [--namespace N] [--device D]

An operator that has no kernel there is passed over and named. Ends with 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import sys

import torch

import fastsae  # noqa: F401  (the operators of the CPU)
from tests.ops.calls import NAMES, calls, check, has_kernel


def main() -> int:
    """Parse arguments, run, say what ran."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", help="load the operators from here")
    parser.add_argument("--namespace", default="fastsae")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", default="", choices=["", *NAMES])
    parser.add_argument("--dtype", choices=["float32"], help="calls of this dtype")
    a = parser.parse_args()
    torch.set_num_threads(1)
    # Fills what torch.empty returns with NaN and the largest integers: what a kernel forgets to
    # write is not right by what was there before.
    torch.use_deterministic_algorithms(True, warn_only=True)
    if a.library:
        torch.ops.load_library(a.library)
    if hasattr(ctypes.CDLL(None), "__tsan_init"):
        print("under ThreadSanitizer")
    passed_over = [op for op in NAMES if not has_kernel(op, a.namespace, a.device)]
    ran, wrong = 0, 0
    for call in calls(only=a.only, dtype=getattr(torch, a.dtype) if a.dtype else None):
        if call.op in passed_over:
            continue
        ran += 1
        try:
            check(call, call.to(a.device)(a.namespace), call())
        except (AssertionError, RuntimeError) as e:
            wrong += 1
            print(f"wrong: {call}: {e}")
    print(f"ran {ran} calls, {wrong} wrong; without a kernel: {' '.join(passed_over) or 'none'}")
    return 1 if wrong or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
