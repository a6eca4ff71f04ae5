"""The loss and its gradients against dense float64 torch, and every known trap of AuxK."""

import pytest
import torch

from fastsae import ops
from fastsae.nn import BatchTopKSAE, StepContext, TopKSAE

D_IN, D_SAE, N = 12, 40, 30


def dense_loss(sae, x, target, dead):
    """Loss, fvu and aux_loss as in the papers, with every [n, d_sae] matrix in full."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    if isinstance(sae, TopKSAE):
        kept = torch.zeros_like(pre).scatter(1, pre.topk(sae.k).indices, 1.0)
    else:
        flat = pre.relu().flatten()
        kept = torch.zeros_like(flat).scatter(0, flat.topk(int(sae.k * len(x))).indices, 1.0)
        kept = kept.view_as(pre)
    error = target - ((kept * pre.relu()) @ sae.W_dec + sae.b_dec)
    fvu = error.pow(2).sum() / (target - target.mean(0)).pow(2).sum()
    aux = torch.zeros((), dtype=x.dtype)
    if dead is not None and dead.any():
        own = pre[:, dead]
        top = own.topk(min(sae.k_aux, own.shape[1]))
        code = torch.zeros_like(own).scatter(1, top.indices, top.values.relu())
        goal = error.detach()
        aux = (code @ sae.W_dec[dead] - goal).pow(2).sum() / (goal - goal.mean(0)).pow(2).sum()
    return fvu + sae.auxk_alpha * aux, fvu, aux


def make(cls, dtype=torch.float64, **arguments):
    sae = cls(D_IN, D_SAE, **{"k": 4, "k_aux": 6, "dtype": dtype, **arguments})
    sae.b_enc = 0.3 * torch.randn(D_SAE, dtype=dtype)
    sae.b_dec = torch.randn(D_IN, dtype=dtype)
    sae.W_enc = torch.randn(D_IN, D_SAE, dtype=dtype)
    return sae


def first(count):
    return torch.arange(D_SAE) < count


def gradients(loss, sae):
    return torch.autograd.grad(loss, list(sae.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("own_target", [False, True])
@pytest.mark.parametrize("n_dead", [None, 0, 1, 3, 6, 20, D_SAE])
@pytest.mark.parametrize(("cls", "k"), [(TopKSAE, 4), (TopKSAE, D_SAE), (BatchTopKSAE, 2.7)])
def test_loss_and_gradients_equal_dense_float64(cls, k, n_dead, own_target, dtype):
    sae = make(cls, dtype, k=k, auxk_alpha=0.7)
    x = torch.randn(N, D_IN, dtype=dtype)
    target = torch.randn(N, D_IN, dtype=dtype) if own_target else None
    dead = None if n_dead is None else first(n_dead)
    out = sae.loss(x, target, context=StepContext(dead=dead))
    exact = make(cls, k=k, auxk_alpha=0.7)
    exact.load_state_dict(sae.state_dict())
    goal = x if target is None else target
    loss, fvu, aux = dense_loss(exact, x.double(), goal.double(), dead)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {
        "rtol": 2e-4, "atol": 2e-5}  # fmt: skip
    for got, wanted in ((out.loss, loss), (out.fvu, fvu), (out.aux_loss, aux)):
        torch.testing.assert_close(got.double(), wanted, **tolerance)
    for got, wanted in zip(gradients(out.loss, sae), gradients(loss, exact), strict=True):
        torch.testing.assert_close(got.double(), wanted, **tolerance)


def test_output_fields():
    sae = make(TopKSAE)
    x = torch.randn(2, N // 2, D_IN, dtype=torch.float64)
    out = sae.loss(x)
    torch.testing.assert_close(out.reconstruction, sae(x))
    per_token = (x - sae(x)).square().sum(-1)
    torch.testing.assert_close(out.mse, per_token.mean().detach())
    assert torch.equal(out.acts.to_dense(), sae.encode(x).reshape(N, D_SAE))
    assert not out.mse.requires_grad


def test_loss_has_no_unit():
    sae = make(TopKSAE)
    x = torch.randn(N, D_IN, dtype=torch.float64)
    small = sae.loss(x, context=StepContext(dead=first(5)))
    sae.b_enc, sae.b_dec = sae.b_enc * 1000, sae.b_dec * 1000
    large = sae.loss(1000 * x, context=StepContext(dead=first(5)))
    torch.testing.assert_close(large.loss, small.loss)
    torch.testing.assert_close(large.aux_loss, small.aux_loss)
    torch.testing.assert_close(large.mse, 1e6 * small.mse)


def test_denominators_are_constants():
    sae = make(TopKSAE)
    x = torch.randn(N, D_IN, dtype=torch.float64, requires_grad=True)
    out = sae.loss(x)
    variance = (x - x.mean(0)).square().sum().detach()
    direct = (x - sae(x)).square().sum() / variance
    (got,), (wanted,) = torch.autograd.grad(out.loss, x), torch.autograd.grad(direct, x)
    torch.testing.assert_close(got, wanted)


def test_aux_gradient_reaches_dead_latents_only():
    """Live latents make the residual, but the target is a constant: they get no gradient."""
    sae = make(TopKSAE, k_aux=3)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[4, 11, 12, 30, 39]] = True
    x = torch.randn(N, D_IN, dtype=torch.float64)
    sae.loss(x, context=StepContext(dead=dead)).aux_loss.backward()
    for grad in (sae.W_enc_rows.grad, sae.W_dec.grad, sae.b_enc.grad.unsqueeze(1)):
        assert grad[~dead].abs().max() == 0
        assert (grad[dead].abs().amax(1) > 0).any()


def test_a_single_dead_latent_learns():
    sae = make(TopKSAE)
    dead = first(1)
    x = torch.randn(N, D_IN, dtype=torch.float64)
    sae.b_enc = torch.where(dead, 1.0, sae.b_enc.double())
    sae.loss(x, context=StepContext(dead=dead)).aux_loss.backward()
    assert sae.W_enc_rows.grad[0].abs().max() > 0
    assert sae.b_enc.grad[0].abs() > 0
    assert sae.W_dec.grad[0].abs().max() > 0


def test_dead_latents_that_are_not_among_the_aux_k_get_nothing():
    sae = make(TopKSAE, k_aux=1)
    dead = first(2)
    sae.b_enc = torch.where(torch.arange(D_SAE) == 0, 50.0, sae.b_enc.double())
    x = torch.randn(N, D_IN, dtype=torch.float64)
    sae.loss(x, context=StepContext(dead=dead)).aux_loss.backward()
    assert sae.W_dec.grad[0].abs().max() > 0
    assert sae.W_dec.grad[1].abs().max() == 0


def test_aux_reconstruction_has_no_bias():
    """With silent dead latents e_hat is 0, so the ratio is sum e^2 / sum (e - mean e)^2."""
    sae = make(TopKSAE)
    dead = first(5)
    sae.b_enc = torch.where(dead, -1e3, sae.b_enc.double())
    sae.b_dec = 5 * torch.ones(D_IN, dtype=torch.float64)
    x = torch.randn(N, D_IN, dtype=torch.float64)
    out = sae.loss(x, context=StepContext(dead=dead))
    e = (x - out.reconstruction).detach()
    torch.testing.assert_close(out.aux_loss, e.square().sum() / (e - e.mean(0)).square().sum())


@pytest.mark.parametrize("n_dead", [None, 0])
def test_nothing_is_computed_when_nothing_is_dead(n_dead, monkeypatch):
    sae = make(TopKSAE)
    x = torch.randn(N, D_IN, dtype=torch.float64)
    calls = []
    original = ops.encode_topk
    monkeypatch.setattr(ops, "encode_topk", lambda *a, **k: calls.append(1) or original(*a, **k))
    out = sae.loss(x, context=StepContext(dead=None if n_dead is None else first(n_dead)))
    assert len(calls) == 1
    assert out.aux_loss == 0
    assert torch.equal(out.loss, out.fvu)


def test_a_perfect_and_a_constant_residual_have_no_aux_loss():
    sae = make(TopKSAE)
    x = torch.randn(N, D_IN, dtype=torch.float64)
    shift = torch.randn(D_IN, dtype=torch.float64)
    for target in (sae(x).detach(), sae(x).detach() + shift):
        out = sae.loss(x, target, context=StepContext(dead=first(5)))
        assert out.aux_loss == 0
        assert all(g.isfinite().all() for g in gradients(out.loss, sae))


def test_a_batch_without_variance_stays_finite():
    sae = make(TopKSAE, torch.float32)
    out = sae.loss(torch.ones(1, D_IN), context=StepContext(dead=first(3)))
    out.loss.backward()
    assert out.loss.isfinite()
    assert sae.W_dec.grad.isfinite().all()


def test_all_negative_pre_activations_give_no_gradient():
    sae = make(TopKSAE)
    sae.b_enc = torch.full((D_SAE,), -1e3, dtype=torch.float64)
    x = torch.randn(N, D_IN, dtype=torch.float64)
    out = sae.loss(x)
    assert not out.acts.fired().any()
    W_enc, W_dec, b_enc, b_dec = torch.autograd.grad(
        out.loss, (sae.W_enc_rows, sae.W_dec, sae.b_enc, sae.b_dec)
    )
    assert W_enc.abs().max() == W_dec.abs().max() == b_enc.abs().max() == 0
    variance = (x - x.mean(0)).square().sum()
    torch.testing.assert_close(b_dec, -2 * (x - sae.b_dec).sum(0).detach() / variance)


@pytest.mark.parametrize(
    "dead", [torch.zeros(D_SAE), torch.zeros(3, dtype=torch.bool)], ids=["dtype", "shape"]
)
def test_dead_errors(dead):
    sae = make(TopKSAE)
    x = torch.randn(N, D_IN, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"TopKSAE: expected dead to be bool \[{D_SAE}\], got"):
        sae.loss(x, context=StepContext(dead=dead))
    with pytest.raises(ValueError, match="expected target to have 30 rows like x, got 29"):
        sae.loss(x, x[1:])
