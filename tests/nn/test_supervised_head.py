"""The supervised head against dense logistic regression, and what it teaches an SAE."""

import pytest
import torch
import torch.nn.functional as F

from fastsae.nn import TopKSAE
from fastsae.nn.supervised_head import SupervisedHead
from fastsae.types import SparseActs


def code(n=30, d_sae=20, k=3, dtype=torch.float64):
    """A code in the fixed layout, with some entries inactive."""
    values = torch.randn(n, k, dtype=dtype).relu().requires_grad_()
    indices = torch.rand(n, d_sae).topk(k).indices.int()
    return SparseActs(values, indices, None, d_sae)


@torch.no_grad()
def random(head):
    for p in head.parameters():
        p.normal_()
    return head


def dense_loss(head, dense, labels, covariates=None):
    """Plain logistic regression with the weights of `head`."""
    logits = F.linear(dense, head.weight.t(), head.bias)
    if covariates is not None:
        logits = logits + F.linear(covariates, head.covariate_weight.t())
    if head.classes == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.double())
    return F.cross_entropy(logits, labels)


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("covariates", [0, 4])
def test_it_is_logistic_regression_on_the_dense_code(variable, classes, covariates):
    head = random(SupervisedHead(20, classes, covariates, dtype=torch.float64))
    acts = code()
    if variable:
        acts = SparseActs.from_dense(acts.to_dense().detach())
        acts.values.requires_grad_()
    labels = torch.randint(max(classes, 2), (30,))
    inputs, c = [acts.values, head.weight, head.bias], None
    if covariates:
        c = torch.randn(30, covariates, dtype=torch.float64, requires_grad=True)
        inputs += [head.covariate_weight, c]
    loss, want = head.loss(acts, labels, c), dense_loss(head, acts.to_dense(), labels, c)
    torch.testing.assert_close(loss, want)
    got, want = torch.autograd.grad(loss, inputs), list(torch.autograd.grad(want, inputs))
    # Inactive entries get no gradient; a dense matrix does not know which they are.
    want[0] = want[0].where(acts.values > 0, 0)
    torch.testing.assert_close(list(got), want)
    assert got[0].any()


@pytest.mark.parametrize("classes", [1, 3])
def test_without_a_code_it_is_logistic_regression_on_the_covariates(classes):
    head = random(SupervisedHead(20, classes, 4, dtype=torch.float64))
    acts = SparseActs.from_dense(torch.zeros(30, 20, dtype=torch.float64))
    c, labels = torch.randn(30, 4, dtype=torch.float64), torch.randint(max(classes, 2), (30,))
    loss = head.loss(acts, labels, c)
    loss.backward()
    logits = (c @ head.covariate_weight + head.bias).detach()
    if classes == 1:
        p, target = logits.sigmoid(), labels.double().unsqueeze(1)
        want = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    else:
        p, target = logits.softmax(1), F.one_hot(labels, classes).double()
        want = -(target * p.log()).sum(1).mean()
    torch.testing.assert_close(loss.detach(), want)
    torch.testing.assert_close(head.covariate_weight.grad, c.t() @ (p - target) / 30)
    torch.testing.assert_close(head.bias.grad, (p - target).mean(0))
    assert not head.weight.grad.any()


@pytest.mark.parametrize("classes", [1, 4])
def test_it_starts_at_chance(classes):
    head = SupervisedHead(20, classes, dtype=torch.float64)
    loss = head.loss(code(), torch.randint(max(classes, 2), (30,)))
    assert loss.item() == pytest.approx(torch.tensor(max(classes, 2)).double().log().item())


def test_no_tokens_cost_nothing():
    head = SupervisedHead(20, 3)
    loss = head.loss(code(0, dtype=torch.float32), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert not head.bias.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_reaches_the_encoder_but_not_the_decoder(dtype):
    sae, head = TopKSAE(8, 20, k=3, dtype=dtype), random(SupervisedHead(20, 3, dtype=dtype))
    x, labels = torch.randn(30, 8, dtype=dtype), torch.randint(3, (30,))
    loss = head.loss(sae.loss(x).acts, labels)
    assert loss.dtype == torch.float32
    loss.backward()
    assert sae.W_enc_rows.grad.any()
    assert sae.b_enc.grad.any()
    assert sae.W_dec.grad is None


def planted(n, g):
    """Loud noise in 14 directions and, in two faint ones, a label."""
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(9)))[0]
    labels = torch.randint(2, (n,), generator=g)
    loud = 3 * torch.randn(n, 14, generator=g)
    faint = 0.5 * F.one_hot(labels, 2).float()
    return torch.cat([loud, faint], 1) @ basis, labels


def test_labels_teach_the_sae_what_it_would_leave_out():
    """The same head on the same code, trained apart or together, on held-out tokens."""
    g = torch.Generator().manual_seed(2)
    (x, y), (held_x, held_y) = planted(2000, g), planted(2000, g)
    accuracy = {}
    for together in (False, True):
        torch.manual_seed(0)
        sae, head = TopKSAE(16, 24, k=4), SupervisedHead(24, 1)
        optimizer = torch.optim.Adam([*sae.parameters(), *head.parameters()], lr=1e-2)
        for _ in range(200):
            out = sae.loss(x)
            acts = out.acts if together else out.acts.detach()
            optimizer.zero_grad()
            (out.loss + head.loss(acts, y)).backward()
            optimizer.step()
            sae.normalize_decoder_()
        with torch.no_grad():
            guess = head(sae.encode_sparse(held_x)).squeeze(1) > 0
        accuracy[together] = (guess == held_y.bool()).float().mean().item()
    assert accuracy[True] > 0.8
    assert accuracy[True] > accuracy[False] + 0.1


def test_wrong_arguments():
    message = "expected d_sae >= 1, classes >= 1 and covariates >= 0, got 4, 0 and 0"
    with pytest.raises(ValueError, match=f"^SupervisedHead: {message}$"):
        SupervisedHead(4, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"acts": torch.zeros(30, 20)}, TypeError, "acts to be SparseActs, got Tensor"),
        ({"acts": code(d_sae=21)}, ValueError, "acts over d_sae = 20 latents, got 21"),
        (
            {"acts": code(dtype=torch.float32)},
            TypeError,
            "acts.values to be torch.float64 like weight, got torch.float32",
        ),
        ({"covariates": None}, ValueError, "covariates to be [30, 2], got None"),
        (
            {"covariates": torch.zeros(30, 3).double()},
            ValueError,
            "covariates to be [30, 2], got [30, 3]",
        ),
        (
            {"covariates": torch.zeros(30, 2)},
            TypeError,
            "covariates to be torch.float64, got torch.float32",
        ),
        ({"labels": [0] * 30}, TypeError, "labels to be a torch.Tensor, got list"),
        ({"labels": torch.zeros(30)}, TypeError, "labels to be torch.int64, got torch.float32"),
        ({"labels": torch.zeros(29).long()}, ValueError, "labels to be [30], got [29]"),
        ({"labels": torch.arange(30) - 1}, ValueError, "labels in 0..2, got -1..28"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    head = SupervisedHead(20, 3, 2, dtype=torch.float64)
    fitting = {
        "acts": code(),
        "labels": torch.zeros(30, dtype=torch.int64),
        "covariates": torch.zeros(30, 2, dtype=torch.float64),
    }
    assert head.loss(**fitting).isfinite()
    with pytest.raises(error) as raised:
        head.loss(**fitting | change)
    assert str(raised.value) == f"SupervisedHead: expected {message}"


def test_binary_labels_are_0_and_1():
    with pytest.raises(
        ValueError, match=r"^SupervisedHead: expected labels in 0\.\.1, got 0\.\.2$"
    ):
        SupervisedHead(20, 1, dtype=torch.float64).loss(code(), torch.arange(30) % 3)
