#!/usr/bin/env bash
# once_differentiable does not refuse a second derivative that is asked for with autograd.grad.
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
from torch.autograd.function import once_differentiable


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def second(square):
    x = torch.tensor(3.0, requires_grad=True)
    (first,) = torch.autograd.grad(square(x) * x, x, create_graph=True)  # 3 x^2
    return torch.autograd.grad(first, x)[0].item()


def second_by_backward():
    x = torch.tensor(3.0, requires_grad=True)
    (first,) = torch.autograd.grad(Square.apply(x) * x, x, create_graph=True)
    try:
        first.backward()
    except RuntimeError as error:
        return str(error)
    return None


print("torch", torch.__version__)
print("The node that once_differentiable puts in place of a second derivative raises only when it")
print("runs. autograd.grad(..., inputs) runs no node that leads to none of the inputs, so the term")
print("is left out and the rest is returned; backward() raises.")
print("expected:", second(lambda x: x * x), "or an error; got:", second(Square.apply))
print("backward():", second_by_backward())
changed = second(Square.apply) == second(lambda x: x * x)
sys.exit(changed or second_by_backward() is None)
PYTHON
