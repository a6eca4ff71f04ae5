"""An SAE of which every latent fires exactly on one token."""

from __future__ import annotations

import torch

from fastsae.nn import TopKSAE
from tests.interpret.stores import documents, write_store

WORDS, ROWS, WIDTH = 24, 8000, 8


def decode(ids):
    """Return words such as ` w07`."""
    return "".join(f" w{i:02}" for i in ids)


def planted(folder):
    """Return the SAE and a store of random words."""
    torch.manual_seed(0)
    docs, places = documents(ROWS, [200], 64)
    ids = torch.randint(WORDS, (ROWS,))
    strength = 0.5 + torch.rand(ROWS)
    x = torch.nn.functional.one_hot(ids, WORDS) * strength.unsqueeze(1)
    store = write_store(folder, x + 0.01 * torch.rand(ROWS, WORDS), ids, docs, places)
    sae = TopKSAE(WORDS, WORDS, k=1)
    with torch.no_grad():
        sae.W_enc, sae.W_dec = torch.eye(WORDS), torch.eye(WORDS)
    return sae, store
