"""GroupMax, AbsTopK and gradient SAEs: what they select, and the sparse gradient of it."""

import pytest
import torch

import fastsae
from fastsae import GradientSAE, GroupMaxSAE, TopKSAE, TrainConfig, Trainer
from tests.nn.randomized import make, rows


def pre_activations(sae, x):
    return (x - sae.b_dec) @ sae.W_enc + sae.b_enc


def group_max(sae, x):
    z = pre_activations(sae, x).unflatten(1, (sae.k, -1))
    return (z.relu() * (z == z.amax(2, keepdim=True))).flatten(1)


def abs_topk(sae, x):
    z = pre_activations(sae, x)
    return z * torch.zeros_like(z).scatter(1, z.abs().topk(sae.k).indices, 1.0)


def scored(g):
    def code(sae, x):
        z = pre_activations(sae, x).relu()
        a = (g @ sae.W_dec.t()).abs()
        if sae.normalize == "token":
            a = a / a.mean(1, keepdim=True)
        score = (z + sae.beta * z * a).detach()
        return z * torch.zeros_like(z).scatter(1, score.topk(sae.k).indices, 1.0)

    return code


G = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
CASES = {
    "group_max": (lambda: make(GroupMaxSAE, 6, 16, 4), {}, group_max),
    "abs_topk": (lambda: make(TopKSAE, 6, 16, 4, absolute=True), {}, abs_topk),
    "gradient": (lambda: make(GradientSAE, 6, 16, 4, beta=2), {"grad": G}, scored(G)),
    "literal": (
        lambda: make(GradientSAE, 6, 16, 4, beta=0.3, normalize="none"),
        {"grad": G},
        scored(G),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_code_and_all_gradients_are_those_of_a_dense_one(case):
    build, extra, dense = CASES[case]
    sae, x = build(), rows(20, 6).requires_grad_()
    acts = sae.encode_sparse(x, **extra)
    f = dense(sae, x)
    torch.testing.assert_close(acts.to_dense(), f)
    assert (acts.indices.diff(dim=1) > 0).all()
    weight = rows(20, 16)
    wanted = (x, sae.W_enc_rows, sae.b_enc, sae.b_dec)
    torch.testing.assert_close(
        torch.autograd.grad((acts.to_dense() * weight).sum(), wanted),
        torch.autograd.grad((f * weight).sum(), wanted),
    )


@pytest.mark.parametrize("case", CASES)
def test_save_load_and_an_empty_batch(case, tmp_path):
    build, extra, _ = CASES[case]
    sae, x = build(), rows(20, 6)
    fastsae.save(sae, tmp_path)
    again = fastsae.load(tmp_path)
    assert type(again) is type(sae)
    assert torch.equal(
        again.encode_sparse(x, **extra).to_dense(), sae.encode_sparse(x, **extra).to_dense()
    )
    assert sae.encode(rows(0, 6)).shape == (0, 16)


def test_group_max_has_one_latent_a_group():
    sae = make(GroupMaxSAE, 6, 16, 4)
    f = sae.encode(rows(50, 6)).unflatten(1, (4, 4))
    assert ((f != 0).sum(2) <= 1).all()
    for k in (3, 0, 17, 2.5):
        with pytest.raises(ValueError, match="expected k to be an integer that divides d_sae = 16"):
            GroupMaxSAE(6, 16, k)


def test_a_nan_reaches_its_own_row_only():
    sae, x = make(GroupMaxSAE, 6, 16, 4), rows(3, 6)
    clean = sae.encode(x)
    x[1, 0] = torch.nan
    assert torch.equal(sae.encode(x)[[0, 2]], clean[[0, 2]])


def test_without_weight_or_gradient_the_gradient_sae_is_topk_to_the_last_bit():
    x, g = rows(20, 6), rows(20, 6)
    plain = make(TopKSAE, 6, 16, 4)
    a, b = make(GradientSAE, 6, 16, 4, beta=0), make(GradientSAE, 6, 16, 4, beta=3)
    assert torch.equal(a.encode_sparse(x, grad=g).to_dense(), plain.encode(x))
    assert torch.equal(b.encode(x), plain.encode(x))
    assert torch.equal(a.loss(x, grad=g).loss, plain.loss(x).loss)
    silent = b.encode_sparse(x, grad=torch.zeros_like(g)).to_dense()
    torch.testing.assert_close(silent, plain.encode(x))
    assert not torch.equal(b.encode_sparse(x, grad=g).to_dense(), plain.encode(x))


def test_the_unit_of_the_gradient_does_not_matter_when_normalised():
    sae, x, g = make(GradientSAE, 6, 16, 4), rows(20, 6), rows(20, 6)
    a, b = (sae.encode_sparse(x, grad=scale * g) for scale in (1, 1e-6))
    assert torch.equal(a.indices, b.indices)


def test_the_decoder_learns_nothing_from_the_score():
    sae, x, g = make(GradientSAE, 6, 16, 4), rows(20, 6), rows(20, 6).requires_grad_()
    acts = sae.encode_sparse(x, grad=g)
    assert torch.autograd.grad(acts.values.sum(), [sae.W_dec, g], allow_unused=True) == (None, None)


def test_the_trainer_reads_activations_and_gradients_side_by_side():
    torch.manual_seed(0)
    x, g = 40 * torch.randn(600, 8) + 3, 1e-4 * torch.randn(600, 8)
    sae = GradientSAE(8, 24, 3)
    config = TrainConfig(batch_size=100, epochs=4, lr=3e-3, progress=False)
    result = Trainer(sae, torch.cat([x, g], 1), config, val=torch.cat([x, g], 1)).fit()
    assert result.final["val_l0"] == 3
    assert 0 < result.final["val_fvu"] < 0.8
    error = (x - sae(x)).square().sum(1).mean().item()
    assert result.final["val_mse"] == pytest.approx(error, rel=1e-4)
    with pytest.raises(ValueError, match=r"expected data with d_in = 8 \+ 8, got 8"):
        Trainer(sae, x, config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": -1}, "expected 0 <= beta < inf, got -1"),
        ({"normalize": "batch"}, "expected normalize to be token or none, got 'batch'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientSAE(6, 16, 4, **arguments)
    sae = GradientSAE(6, 16, 4)
    with pytest.raises(ValueError, match="expected grad to have 2 rows like x, got 3"):
        sae.encode_sparse(torch.ones(2, 6), grad=torch.ones(3, 6))
