"""Numbers of latents for each entry, and the order that their gradients are added up in."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fastsae.ops import _per_entry
from fastsae.ops._per_entry import per_entry
from fastsae.types import SparseActs
from tests.ops.inputs import acts

D_SAE = 7


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_per_entry, "can_look", lambda t: False)


def numbers(device, count=2, dtype=torch.float64):
    made = [torch.randn(D_SAE, dtype=dtype, device=device) for _ in range(count)]
    return [t.requires_grad_() for t in made]


@pytest.mark.parametrize("layout", ["fixed", "variable"])
def test_numbers_and_gradients(device, layout) -> None:
    code = acts(30, D_SAE, 4, torch.float64, layout).to(device)
    tensors = numbers(device)
    found = per_entry(code, *tensors)
    size = code.values.numel() if code.offsets is None else int(code.offsets[-1])
    flat, weight = code.indices.flatten().long(), torch.randn(code.values.shape).double().to(device)
    for t, got in zip(tensors, found, strict=True):
        assert got.shape == code.values.shape
        assert torch.equal(got.flatten(), t.detach()[flat])
        (grad,) = torch.autograd.grad((got * weight).sum(), t, retain_graph=True)
        want = [weight.flatten()[:size][flat[:size] == f].sum() for f in range(D_SAE)]
        assert_close(grad, torch.stack(want), rtol=1e-12, atol=1e-12)


def test_padding_has_no_gradient(device) -> None:
    code = acts(5, D_SAE, 2, torch.float32, "variable").to(device)
    room = torch.zeros(4, device=device)
    padded = SparseActs(
        torch.cat([code.values, room]), torch.cat([code.indices, room.int()]), code.offsets, D_SAE
    )
    (t,) = numbers(device, 1, torch.float32)
    per_entry(padded, t)[0].sum().backward()
    listed = code.indices[: int(code.offsets[-1])].long()
    counts = torch.bincount(listed, minlength=D_SAE)
    assert torch.equal(t.grad, counts.float())


def test_only_what_is_asked_for_and_derivatives_of_it() -> None:
    code = acts(6, D_SAE, 2, torch.float64, "fixed")
    a, b = numbers("cpu")
    b.requires_grad_(False)
    one, two = per_entry(code, a, b)
    (grad,) = torch.autograd.grad((one + 0 * two).sum(), a)
    assert torch.equal(
        grad, torch.bincount(code.indices.flatten().long(), minlength=D_SAE).double()
    )
    assert torch.autograd.gradgradcheck(lambda t: per_entry(code, t)[0].square(), (a,))


def test_forward_mode() -> None:
    code = acts(6, D_SAE, 2, torch.float64, "fixed")
    a, b = numbers("cpu")
    moved = torch.func.jvp(lambda t: per_entry(code, t, b)[0], (a,), (b,))[1]
    assert torch.equal(moved, b[code.indices.long()])
    square = torch.func.grad(lambda t: per_entry(code, t)[0].square().sum())
    product = torch.func.jvp(square, (a,), (b,))[1]
    assert_close(product, 2 * b * torch.bincount(code.indices.flatten().long(), minlength=D_SAE))


def test_the_gradient_has_the_same_bits_every_time(device) -> None:
    n = 5000
    indices = torch.zeros(n, 1, dtype=torch.int32, device=device)
    code = SparseActs(torch.ones(n, 1, device=device), indices, None, 2)
    weight = torch.randn(n, 1, device=device)
    t = torch.zeros(2, device=device, requires_grad=True)
    found = set()
    for _ in range(5):
        (grad,) = torch.autograd.grad((per_entry(code, t)[0] * weight).sum(), t)
        found.add(float(grad[0]))
    assert len(found) == 1
    assert_close(grad[0], weight.sum(), rtol=1e-4, atol=1e-3)
