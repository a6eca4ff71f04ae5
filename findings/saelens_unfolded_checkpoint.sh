#!/usr/bin/env bash
# A checkpoint of SAELens from the middle of a run, loaded as an SAE: the scale of its activations is ignored.
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
from sae_lens import SAE, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler

torch.manual_seed(0)
x = 50 * torch.randn(512, 16)
cfg = StandardTrainingSAEConfig(
    d_in=16, d_sae=64, normalize_activations="expected_average_only_in"
)
sae = StandardTrainingSAE(cfg)
scaler = ActivationScaler(scaling_factor=float(16**0.5 / x.norm(dim=1).mean()))
with torch.no_grad():  # of scaled activations: a latent for each direction and its opposite
    sae.W_dec.copy_(torch.cat([torch.eye(16), -torch.eye(16), torch.zeros(32, 16)]))
    sae.W_enc.copy_(sae.W_dec.t())
    sae.b_enc.zero_()
    sae.b_dec.copy_(0.5 * torch.ones(16))
    folded = StandardTrainingSAE(cfg)
    folded.load_state_dict(sae.state_dict())
    folded.fold_activation_norm_scaling_factor(scaler.scaling_factor)
# What a run writes at a checkpoint.
sae.save_model("checkpoint")
scaler.save("checkpoint/activation_scaler.json")
loaded = SAE.load_from_disk("checkpoint")

with torch.no_grad():
    code, right = loaded.encode(x), folded.encode_with_hidden_pre(x)[0]
wrong = float((code - right).norm() / right.norm())
print("sae-lens", version("sae-lens"), "torch", torch.__version__)
print("SAE.load_from_disk ignores the activation_scaler.json beside a checkpoint's weights.")
print("expected: the code of the folded SAE, or an error")
print(f"got: code off by {100 * wrong:.0f} %, with the scale {scaler.scaling_factor:.4f} left out")
sys.exit(not wrong > 0.5)
PYTHON
