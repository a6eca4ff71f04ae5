#!/usr/bin/env bash
# A transcoder of SAELens with layer_norm: its input is normalized, its output is not put back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/venv"
  python=$folder/venv/bin/python
  "$python" -m pip install -q torch==2.13.0 sae-lens==6.54.12
fi
cd "$folder"
"$python" -W ignore - 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from sae_lens import SAE

torch.manual_seed(0)
cfg = {"d_in": 8, "d_sae": 32, "normalize_activations": "layer_norm", "metadata": {}}
cfg |= {"dtype": "float32", "device": "cpu"}
kinds = {
    "standard": {"architecture": "standard"},
    "transcoder": {"architecture": "transcoder", "d_out": 8, "apply_b_dec_to_input": False},
}
x, ratio = torch.randn(64, 8), {}
for name, keys in kinds.items():
    sae = SAE.from_dict({**cfg, **keys})
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn_like(p))
        sae.b_dec.zero_()
        # A larger x has the same normalized x, and a reconstruction that is larger by as much.
        ratio[name] = float((sae(10 * x).norm() / sae(x).norm()))

print("sae-lens", version("sae-lens"), "torch", torch.__version__)
print("With layer_norm, outputs of an SAE follow the scale of x; those of a transcoder do not.")
print("expected of ten times the input, in both: ten times the output, or in neither")
print("got:", {name: round(value, 2) for name, value in ratio.items()})
sys.exit(not (abs(ratio["standard"] - 10) < 0.1 and abs(ratio["transcoder"] - 1) < 0.1))
PYTHON
