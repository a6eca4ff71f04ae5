"""What an installed wheel must do: run with plain python, outside the source folder."""

import tempfile
from pathlib import Path

import torch

import fastsae
from fastsae import _host, _library

assert "site-packages" in str(_library.cpu_library), _library.cpu_library
assert _library.find("libfastsae_emulated.so") is None, "test code in the wheel"

sae = fastsae.TopKSAE(16, 64, k=4)
x = torch.randn(256, 16)
optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
first = sae.loss(x).fvu.item()
for _ in range(50):
    optimizer.zero_grad()
    sae.loss(x).loss.backward()
    optimizer.step()
assert sae.loss(x).fvu.item() < 0.8 * first

with tempfile.TemporaryDirectory() as folder:
    fastsae.save(sae, Path(folder) / "sae")
    again = fastsae.load(Path(folder) / "sae")
assert torch.equal(again(x), sae(x))
print("wheel ok:", _host.build_info(), _host.isa())
