#!/usr/bin/env bash
# The bytes of a safetensors file with several entries of metadata.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/venv"
  python=$folder/venv/bin/python
  "$python" -m pip install -q safetensors==0.8.0 numpy
fi
cd "$folder"
"$python" - <<'PYTHON'
import subprocess
import sys
from importlib.metadata import version

PROGRAM = """
import hashlib
import numpy
from safetensors.numpy import save
metadata = {name: name for name in NAMES}
data = save({"x": numpy.zeros(3, numpy.float32)}, metadata)
print(hashlib.sha256(data).hexdigest())
"""


def different(names: list[str]) -> int:
    """Return how many different files 20 processes write."""
    program = PROGRAM.replace("NAMES", repr(names))
    command = [sys.executable, "-c", program]
    return len({subprocess.run(command, capture_output=True, check=True).stdout for _ in range(20)})


print("safetensors", version("safetensors"))
print("Entries of metadata are written in an order that changes from process to process.")
one, four = different(["a"]), different(["a", "b", "c", "d"])
print(f"files that 20 processes write, one entry: expected 1, got {one}")
print(f"files that 20 processes write, four entries: expected 1, got {four}")
sys.exit(not (one == 1 and four > 1))
PYTHON
