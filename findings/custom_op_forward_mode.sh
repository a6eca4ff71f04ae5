#!/usr/bin/env bash
# A custom op with register_autograd: its forward-mode derivative is 0, and nothing says so.
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


@torch.library.custom_op("findings::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


square.register_autograd(
    lambda ctx, g: 2 * ctx.saved_tensors[0] * g,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)
x, ones = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
y = x.clone().requires_grad_()
square(y).sum().backward()
tangent = torch.func.jvp(square, (x,), (ones,))[1]
jacobian = torch.func.jacfwd(square)(x)

print("torch", torch.__version__)
print("A custom op with register_autograd has forward-mode tangent 0, without error or warning.")
print("gradient in reverse mode:", y.grad.tolist())
print("expected of torch.func.jvp:", y.grad.tolist(), "or an error; got:", tangent.tolist())
print("expected of the diagonal of jacfwd: the same; got:", jacobian.diag().tolist())
sys.exit(not (tangent.eq(0).all() and jacobian.eq(0).all()))
PYTHON
