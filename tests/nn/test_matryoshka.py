"""Matryoshka SAEs: the loss of prefixes, of the dictionary and of the code."""

import pytest
import torch

import fastsae
from fastsae import BatchTopKSAE, HierarchicalTopKSAE, MatryoshkaSAE, TopKSAE, TrainConfig, Trainer
from fastsae.nn import StepContext
from fastsae.nn.parallel import ALONE
from tests.nn.randomized import make, rows


def gradients(loss, sae):
    return torch.autograd.grad(loss, list(sae.parameters()))


def test_the_loss_and_its_gradients_are_the_written_ones():
    sae = make(MatryoshkaSAE, 6, 16, 3.5, groups=[2, 4, 10])
    x = rows(20, 6)
    out = sae.loss(x)
    f = out.acts.to_dense()
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    f = torch.where(f != 0, z, 0)
    errors = [
        (x - f[:, :end] @ sae.W_dec[:end] - sae.b_dec).square().sum() for end in (0, 2, 6, 16)
    ]
    torch.testing.assert_close(out.fvu, errors[-1] / ALONE.total_variance(x))
    expected = sum(errors) / 4 / ALONE.total_variance(x)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradients(out.loss, sae), gradients(expected, sae))


def test_one_group_is_batch_topk_and_the_error_of_the_bias():
    one = make(MatryoshkaSAE, 6, 16, 3, groups=[16])
    plain = make(BatchTopKSAE, 6, 16, 3)
    x = rows(20, 6)
    of_bias = (x - plain.b_dec).square().sum() / ALONE.total_variance(x)
    expected = (plain.loss(x).loss + of_bias) / 2
    loss = one.loss(x).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, one), gradients(expected, plain))
    assert torch.equal(one.threshold, plain.threshold)


def test_dead_latents_are_revived_on_the_full_residual():
    sae = make(MatryoshkaSAE, 6, 16, 1, groups=[4, 12])
    plain = make(BatchTopKSAE, 6, 16, 1)
    dead = torch.arange(16) % 2 == 0
    x = rows(20, 6)
    context = StepContext(dead=dead)
    wanted = plain.loss(x, context=context).aux_loss
    torch.testing.assert_close(sae.loss(x, context=context).aux_loss, wanted)
    difference = sae.loss(x, context=context).loss - sae.loss(x).loss
    torch.testing.assert_close(difference, sae.auxk_alpha * wanted)


def test_inference_can_leave_out_later_groups_after_the_selection():
    sae = make(MatryoshkaSAE, 6, 16, 3, groups=[2, 4, 10])
    x = rows(20, 6)
    sae.loss(x)
    sae.eval()
    whole = sae.encode(x)
    for groups, end in ((3, 16), (2, 6), (1, 2), (0, 0)):
        sae.active_groups = groups
        assert torch.equal(sae.encode(x)[:, :end], whole[:, :end])
        assert (sae.encode(x)[:, end:] == 0).all()


def test_prefixes_are_better_than_those_of_batch_topk():
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(32, 16), dim=1)
    share = 1 / torch.arange(1, 33).float()
    code = (torch.rand(6000, 32) < share) * (1 + torch.rand(6000, 32))
    x = code @ directions
    errors = []
    for cls, options in ((MatryoshkaSAE, {"groups": [8, 24]}), (BatchTopKSAE, {})):
        torch.manual_seed(1)  # not that of the directions: it would draw them again
        sae = cls(16, 32, 4, **options)
        config = TrainConfig(batch_size=250, epochs=10, lr=3e-3, progress=False)
        Trainer(sae, x[:5000], config).fit()
        f = sae.encode(x[5000:])
        x_hat = (f[:, :8] @ sae.W_dec[:8] + sae.b_dec).detach()
        errors.append(float((x[5000:] - x_hat).square().sum()))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    ("d_sae", "groups"), [(64, [2, 4, 8, 16, 34]), (16, [1, 2, 4, 9]), (1, [1])]
)
def test_default_groups(d_sae, groups):
    assert MatryoshkaSAE(4, d_sae, 1).groups == groups


@pytest.mark.parametrize("groups", [[], [16, 0], [8, 9]])
def test_bad_groups(groups):
    with pytest.raises(
        ValueError, match="MatryoshkaSAE: expected groups of at least 1 that sum to"
    ):
        MatryoshkaSAE(4, 16, 1, groups=groups)


def test_hierarchical_loss_and_gradients_are_the_written_ones():
    sae = make(HierarchicalTopKSAE, 6, 16, 5)
    x = rows(20, 6)
    out = sae.loss(x)
    z = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    total = 0
    for j in range(1, 6):
        kept = torch.zeros_like(z).scatter(1, z.topk(j).indices, 1.0)
        total = total + (x - (z * kept) @ sae.W_dec - sae.b_dec).square().sum()
    expected = total / 5 / ALONE.total_variance(x)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradients(out.loss, sae), gradients(expected, sae))
    torch.testing.assert_close(out.fvu, make(TopKSAE, 6, 16, 5).loss(x).fvu)


def test_hierarchical_with_one_latent_is_topk():
    a, b = make(HierarchicalTopKSAE, 6, 16, 1), make(TopKSAE, 6, 16, 1)
    x = rows(20, 6)
    context = StepContext(dead=torch.arange(16) < 5)
    torch.testing.assert_close(a.loss(x, context=context).loss, b.loss(x, context=context).loss)


@pytest.mark.parametrize("cls", [MatryoshkaSAE, HierarchicalTopKSAE])
def test_save_and_load(cls, tmp_path):
    sae = make(cls, 6, 16, 3)
    x = rows(20, 6)
    sae.loss(x)
    fastsae.save(sae, tmp_path)
    again = fastsae.load(tmp_path)
    assert type(again) is cls
    assert again.config() == sae.config()
    assert torch.equal(again.encode(x), sae.eval().encode(x))
