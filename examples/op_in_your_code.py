"""Use fastsae's ops in your own module; the rest of the code stays plain PyTorch.

python examples/op_in_your_code.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsae import SparseActs, ops


class TopKAutoencoder(nn.Module):
    """TopK, relu, decode, as you would write them, but without a [tokens, latents] matrix."""

    def __init__(self, d: int, latents: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.W_dec = nn.Parameter(nn.functional.normalize(torch.randn(latents, d)))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.b_dec = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct `x: [n, d]`."""
        values, indices = ops.encode_topk(x, self.W_enc, self.b_enc, self.k, b_dec=self.b_dec)
        acts = SparseActs(values.relu(), indices, None, len(self.W_dec))
        return ops.sparse_decode(acts, self.W_dec, self.b_dec)


def main() -> tuple[float, float]:
    """Train briefly; return the first and the last error."""
    torch.manual_seed(0)
    x = torch.randn(512, 64).relu() @ torch.randn(64, 64)
    model = TopKAutoencoder(64, 256, k=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    errors = []
    for _ in range(100):
        error = (model(x) - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    return errors[0], errors[-1]


if __name__ == "__main__":
    first, last = main()
    print(f"mean squared error {first:.2f} -> {last:.2f}")
