#!/usr/bin/env bash
# An SAE whose hook is not in the model, run with it by SAELens: the model runs without it.
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
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformerConfig

torch.manual_seed(0)
shape = HookedTransformerConfig(
    n_layers=2, d_model=16, n_ctx=8, d_head=8, d_vocab=32, act_fn="gelu", seed=0
)
model = HookedSAETransformer(shape)
tokens = torch.arange(8).unsqueeze(0)
found = {}
for name in ("blocks.1.hook_resid_post", "model.layers.1"):
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=32, metadata=SAEMetadata(hook_name=name)))
    with torch.no_grad():
        change = model.run_with_saes(tokens, saes=[sae]) - model(tokens)
    found[name] = float(change.abs().max())

print("sae-lens", version("sae-lens"), "torch", torch.__version__)
print("run_with_saes leaves out an SAE whose hook the model does not have; nothing is raised.")
print("expected of the hook of a module of transformers: an error")
print("got changes of the logits:", found)
sys.exit(not (found["model.layers.1"] == 0 and found["blocks.1.hook_resid_post"] > 0))
PYTHON
