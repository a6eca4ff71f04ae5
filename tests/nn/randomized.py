"""Modules and rows in float64, with no parameter at its starting value."""

import torch


def make(cls, *args, **kwargs):
    torch.manual_seed(0)
    sae = cls(*args, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return sae


def rows(n, d):
    return torch.randn(n, d, dtype=torch.float64)
