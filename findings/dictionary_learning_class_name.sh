#!/usr/bin/env bash
# A trainer of dictionary_learning writes the name of another class than it trained, which cannot be loaded.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/venv"
  python=$folder/venv/bin/python
  "$python" -m pip install -q torch==2.13.0 dictionary-learning==0.1.0
  "$python" -m pip uninstall -q -y torchvision # not needed, and not every build fits this torch
fi
cd "$folder"
"$python" -W ignore - 2>/dev/null <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.utils import load_dictionary

trainer = StandardTrainer(
    dict_class=AutoEncoderNew, activation_dim=8, dict_size=16, lr=1e-3, l1_penalty=0.1,
    warmup_steps=0, resample_steps=None, steps=10, layer=0, lm_name="gpt2", device="cpu",
    sparsity_warmup_steps=None,
)
folder = Path("ae")
folder.mkdir()
torch.save(trainer.ae.state_dict(), folder / "ae.pt")  # as trainSAE does
(folder / "config.json").write_text(json.dumps({"trainer": trainer.config, "buffer": {}}))
try:
    load_dictionary(str(folder), "cpu")
    raised = "nothing"
except Exception as e:
    raised = f"{type(e).__name__}: {str(e).splitlines()[0]}"

print("dictionary-learning", version("dictionary-learning"), "torch", torch.__version__)
print("A StandardTrainer of AutoEncoderNew writes dict_class AutoEncoder, which the weights are not.")
print("expected of dict_class: AutoEncoderNew; got:", trainer.config["dict_class"])
print("expected of load_dictionary: the dictionary; got:", raised)
sys.exit(not (trainer.config["dict_class"] == "AutoEncoder" and raised != "nothing"))
PYTHON
