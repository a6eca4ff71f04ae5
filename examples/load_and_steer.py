"""Train an SAE on a language model, save and load it, splice it back in, and steer.

    python examples/load_and_steer.py

The model is tiny and random, so this runs anywhere in seconds but says nothing about language.
"""

from __future__ import annotations

import tempfile

import torch
import transformers

import fastsae
from fastsae.models import read, replace, resolve, splice

SITE = "resid_post.0"


def tiny_llama() -> torch.nn.Module:
    """Return a Llama of two blocks with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def main() -> dict[str, float]:
    """Return how far splicing and steering move the logits, relative to their norm."""
    model = tiny_llama()
    tokens = torch.randint(64, (128, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = read(model, [resolve(model, SITE)], tokens)[SITE][:, 1:].flatten(0, 1)

    sae = fastsae.TopKSAE(d_in=32, d_sae=128, k=8)
    config = fastsae.TrainConfig(epochs=20, batch_size=256, lr=3e-3, progress=False)
    fastsae.Trainer(sae, x, config).fit()
    with tempfile.TemporaryDirectory() as folder:
        fastsae.save(sae, folder)
        sae = fastsae.load(folder)

    acts = sae.encode_sparse(x)
    latent = int(acts.counts().argmax())  # the one that fires most
    strength = acts.values.max()

    def steer(rows: torch.Tensor) -> torch.Tensor:
        return rows + strength * sae.W_dec[latent]

    with torch.no_grad():
        clean = model(tokens).logits
        with splice(model, SITE, sae):
            spliced = model(tokens).logits
        with replace(model, SITE, steer):
            steered = model(tokens).logits
    moved = {"spliced": spliced, "steered": steered}
    return {name: float((y - clean).norm() / clean.norm()) for name, y in moved.items()}


if __name__ == "__main__":
    for name, share in main().items():
        print(f"{name}: logits move by {100 * share:.0f}%")
