#!/usr/bin/env bash
# A package of AOTInductor, run at a size that a guard of the exported program excludes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/venv"
  python=$folder/venv/bin/python
  "$python" -m pip install -q torch==2.13.0 numpy setuptools
fi
cd "$folder"
"$python" -W ignore - <<'PYTHON'
import sys

import torch
from torch.export import Dim, export


class Scale(torch.nn.Module):
    def forward(self, x):
        return x * (2.0 if x.shape[0] <= 400 else 3.0)


program = export(Scale(), (torch.ones(40, 4),), dynamic_shapes=({0: Dim.AUTO},))
package = torch._inductor.aoti_compile_and_package(program, package_path="scale.pt2")
run = torch._inductor.aoti_load_package(package)
large = torch.ones(4000, 4)
try:
    program.module()(large)
    refused = "nothing"
except AssertionError as e:
    refused = str(e).splitlines()[0]
got = float(run(large)[0, 0])

print("torch", torch.__version__)
print("A package does not check the guards of the program that it was compiled from.")
print("the exported program at 4,000 rows raises:", refused)
print("expected of the package: 3.0 or an error; got:", got)
sys.exit(not (refused != "nothing" and got == 2.0))
PYTHON
