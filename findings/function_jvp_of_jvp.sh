#!/usr/bin/env bash
# An autograd.Function with a right jvp: its second forward-mode derivative is 0.
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


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 2 * x * tangent


x, ones = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)


def first(function):
    return lambda x: torch.func.jvp(function, (x,), (ones,))[1]


def second(function):
    return first(first(function))(x)


print("torch", torch.__version__)
print("torch.func.jvp of torch.func.jvp of an autograd.Function is 0, without error or warning.")
print("first derivative, right:", first(Square.apply)(x).tolist())
print("expected:", second(lambda x: x * x).tolist(), "got:", second(Square.apply).tolist())
sys.exit(not second(Square.apply).eq(0).all())
PYTHON
