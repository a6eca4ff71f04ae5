"""Training finds the directions that data were made of."""

import pytest
import torch

from fastsae.nn import BatchTopKSAE, TopKSAE
from fastsae.train import TrainConfig, Trainer


@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE])
def test_planted_directions_are_recovered(cls):
    d_in, atoms, active = 32, 48, 3
    directions = torch.nn.functional.normalize(torch.randn(atoms, d_in), dim=1)
    code = torch.zeros(20_000, atoms)
    chosen = torch.rand(code.shape).topk(active).indices
    code.scatter_(1, chosen, 1 + torch.rand(chosen.shape))
    x = 30 * (code @ directions) + 100  # any unit, any offset
    sae = cls(d_in, 2 * atoms, k=active)
    config = TrainConfig(batch_size=500, epochs=20, lr=3e-3, warmup_steps=20, progress=False)
    result = Trainer(sae, x[:19_000], config, val=x[19_000:]).fit()
    best = (directions @ sae.W_dec.detach().t()).amax(1)
    assert (best > 0.95).float().mean() > 0.95
    assert result.final["val_fvu"] < 0.05
    assert result.final["val_l0"] == pytest.approx(active, rel=0.1)
