#!/usr/bin/env bash
# CPU Adam(fused=True) with a gradient whose strides are not those of the parameter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/venv"
  python=$folder/venv/bin/python
  "$python" -m pip install -q torch==2.13.0 numpy
fi
cd "$folder"
"$python" -W ignore - <<'PYTHON'
import sys

import torch

torch.manual_seed(0)
start, gradient = torch.randn(5, 3), torch.randn(5, 3)


def step(strided: bool, fused: bool) -> torch.Tensor:
    p = torch.nn.Parameter(start.t().contiguous().t() if strided else start.clone())
    p.grad = gradient.clone()
    torch.optim.Adam([p], lr=0.1, fused=fused).step()
    return p.detach() - start


print("torch", torch.__version__)
print("CPU Adam(fused=True) pairs parameter and gradient by place in memory, not by index.")
for strided in (False, True):
    strides = (1, 5) if strided else (3, 1)
    off = float((step(strided, True) - step(strided, False)).abs().max())
    print(f"strides of the parameter {strides}, of the gradient (3, 1):")
    print(f"  fused=True and fused=False differ by: expected 0, got {off:.3f}")
right = float((step(False, True) - step(False, False)).abs().max()) < 1e-5
sys.exit(not (right and off > 0.1))
PYTHON
