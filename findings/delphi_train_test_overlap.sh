#!/usr/bin/env bash
# delphi scores explanations on examples that they were made from: both draws use one seed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/venv"
  python=$folder/venv/bin/python
  "$python" -m pip install -q torch==2.13.0 transformers==5.24.0 datasets jaxtyping simple_parsing \
    faiss-cpu scikit-learn sentence-transformers blobfile orjson aiofiles asyncer eindex-callum \
    dataclasses-json tabulate zstandard accelerate safetensors httpx
  "$python" -m pip install -q --no-deps eai-delphi==0.1.3
fi
cd "$folder"
"$python" -W ignore - 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from delphi.config import SamplerConfig
from delphi.latents.latents import ActivatingExample, Latent, LatentRecord
from delphi.latents.samplers import sampler


class Tokenizer:
    def batch_decode(self, tokens):
        return [str(int(token)) for token in tokens]


def shared(pool, **settings):
    """Return the share of the examples for scoring that the explainer was shown."""
    examples = [
        ActivatingExample(torch.tensor([i]), torch.tensor([float(pool - i)])) for i in range(pool)
    ]
    record = LatentRecord(Latent("layer", 0))
    record.examples = examples
    sampler(record, SamplerConfig(**settings), Tokenizer())
    train, test = ({int(e.tokens) for e in part} for part in (record.train, record.test))
    return len(train & test) / len(test)


default = {pool: shared(pool) for pool in (500, 1000, 10_000)}
alike = shared(10_000, n_examples_train=50, n_examples_test=50)
print("delphi", version("eai-delphi"), "torch", torch.__version__)
print("Examples to explain with and to score on are drawn from one pool with one seed.")
print("expected: no example twice; by chance 0.4 % of 10,000")
print("got with the defaults (40 and 50 examples), by size of the pool:", default)
print("got with 50 and 50 examples of 10,000:", alike)
sys.exit(not (min(default.values()) >= 0.1 and alike == 1))
PYTHON
