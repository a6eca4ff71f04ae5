"""Writes to a parameter that do not come from its trainer: what a copy of it has to notice."""

from __future__ import annotations

import torch

from fastsae import SparseActs, ops
from fastsae.types import StepTensors


def in_place(sae, name):
    with torch.no_grad():
        getattr(sae, name).mul_(1.01)


def of_a_row(sae, name):
    with torch.no_grad():
        getattr(sae, name)[3] += 0.5


def loaded(sae, name):
    sae.load_state_dict({name: t * 1.01 for name, t in sae.state_dict().items()})


def by_an_optimizer(sae, name):
    W = getattr(sae, name)
    W.grad = torch.ones_like(W)
    torch.optim.SGD([W], lr=0.01).step()
    W.grad = None


def by_a_fused_optimizer(sae, name):
    W = getattr(sae, name)
    W.grad = torch.ones_like(W)
    torch.optim.Adam([W], lr=0.01, fused=True).step()
    W.grad = None


def other_data(sae, name):
    W = getattr(sae, name)
    W.data = W.data * 1.01


def of_a_detached_one(sae, name):
    getattr(sae, name).detach().mul_(1.01)


def by_the_op(sae, name):
    """The update itself, called by somebody else and without the copy."""
    p = StepTensors(*(t.detach() for t in (sae.W_enc_rows, sae.W_dec, sae.b_enc, sae.b_dec)))
    m, v = (StepTensors(*(torch.ones_like(t) for t in p)) for _ in range(2))
    none = torch.zeros(0, 1)
    acts = SparseActs(none, none.int(), None, sae.d_sae)
    x = torch.zeros(0, sae.d_in)
    ops.sparse_adam_step_(p, m, v, acts, none, x, x, lr=0.1, step=1)


WRITES = (
    in_place, of_a_row, loaded, by_an_optimizer, by_a_fused_optimizer, other_data,
    of_a_detached_one, by_the_op,
)  # fmt: skip
