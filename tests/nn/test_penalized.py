"""ReLU, Gated and JumpReLU SAEs: their equations, their gradients, and how they reach an L0."""

import math

import pytest
import torch

import fastsae
from fastsae import GatedSAE, JumpReLUSAE, ReLUSAE, StepContext, TrainConfig, Trainer
from fastsae.nn import ActivationScaler
from fastsae.nn.parallel import ALONE

CLASSES = (ReLUSAE, GatedSAE, JumpReLUSAE)


def make(cls, d_in=5, d_sae=9, **arguments):
    """A module in float64 with nothing at its starting value."""
    torch.manual_seed(0)
    sae = cls(d_in, d_sae, dtype=torch.float64, **arguments)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return sae


def pre_activations(sae, x):
    return (x - sae.b_dec) @ sae.W_enc + sae.b_enc


def error(x, x_hat):
    return (x - x_hat).square().sum() / ALONE.total_variance(x)


@pytest.mark.parametrize("penalty", ["l1", "tanh", "p_anneal"])
def test_relu_loss_is_the_written_one(penalty):
    sae = make(ReLUSAE, penalty=penalty, coefficient=0.7, p_end=0.5)
    x = 3 * torch.randn(20, 5, dtype=torch.float64)
    out = sae.loss(x, context=StepContext(progress=0.4))
    f = pre_activations(sae, x).relu()
    unit = (ALONE.total_variance(x) / x.numel()).sqrt()
    assert sae.unit == pytest.approx(float(unit), rel=1e-6)
    u = f / sae.unit.double()
    if penalty == "tanh":
        u = u.tanh()
    if penalty == "p_anneal":
        power = u[u > 0] ** (1 + (0.5 - 1) * 0.4)
        u = power * (u.sum() / power.sum()).detach()
    expected = error(x, f @ sae.W_dec + sae.b_dec) + sae.coefficient.double() * u.sum() / 20 / 5
    torch.testing.assert_close(out.loss, expected)
    grads = torch.autograd.grad(out.loss, list(sae.parameters()))
    wanted = torch.autograd.grad(expected, list(sae.parameters()))
    torch.testing.assert_close(grads, wanted)


def test_gated_loss_is_the_written_one_and_its_last_term_spares_the_decoder():
    sae = make(GatedSAE, coefficient=0.7)
    x = torch.randn(20, 5, dtype=torch.float64)
    out = sae.loss(x)
    pi = pre_activations(sae, x)
    f = (pi > 0) * ((pi - sae.b_enc) * sae.r_mag.exp() + sae.b_mag).relu()
    penalty = sae.coefficient.double() * (pi.relu() / sae.unit.double()).sum() / 20 / 5
    by_gate = pi.relu() @ sae.W_dec.detach() + sae.b_dec.detach()
    expected = error(x, f @ sae.W_dec + sae.b_dec) + penalty + error(x, by_gate)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.acts.to_dense(), f)
    names = [name for name, _ in sae.named_parameters()]
    grads = dict(zip(names, torch.autograd.grad(out.loss, list(sae.parameters())), strict=True))
    wanted = torch.autograd.grad(expected, list(sae.parameters()))
    torch.testing.assert_close(list(grads.values()), list(wanted))
    # The decoder learns from the reconstruction alone, and the magnitudes do too.
    alone = torch.autograd.grad(
        error(x, f.detach() @ sae.W_dec + sae.b_dec), [sae.W_dec, sae.b_dec], retain_graph=True
    )
    torch.testing.assert_close(grads["W_dec"], alone[0])
    through_input = torch.autograd.grad(sae.loss(x).loss, sae.b_dec, retain_graph=True)[0]
    torch.testing.assert_close(through_input, grads["b_dec"])


def test_the_gate_learns_from_its_own_terms_only():
    sae = make(GatedSAE, coefficient=0.0)
    x = torch.randn(20, 5, dtype=torch.float64)
    with torch.no_grad():
        sae.b_mag.fill_(-100)  # no magnitude is positive, so only the last term moves anything
    sae.loss(x).loss.backward()
    assert sae.b_enc.grad.abs().sum() > 0
    assert sae.W_dec.grad.abs().sum() == 0


def jump_reference(sae, x):
    """The loss with the straight-through estimates as surrogates, on dense matrices."""
    z, theta = pre_activations(sae, x), sae.threshold
    eps = sae.bandwidth * sae.unit.double()
    on = (z > theta).double()
    near = ((z - theta).abs() < eps / 2).double()
    # Values of the true function, slopes of the estimates.
    slope = -(theta.detach() / eps) * near
    f = on * z + slope * (theta - theta.detach())
    step = on - near / eps * (theta - theta.detach())
    l0 = step.sum() / len(x)
    return error(x, f @ sae.W_dec + sae.b_dec) + sae.coefficient.double() * l0 / sae.d_in


def test_jumprelu_loss_and_estimates_are_the_written_ones():
    sae = make(JumpReLUSAE, coefficient=0.7, bandwidth=1.0, threshold=0.3)
    x = torch.randn(50, 5, dtype=torch.float64)
    out = sae.loss(x)
    expected = jump_reference(sae, x)
    torch.testing.assert_close(out.loss, expected)
    grads = torch.autograd.grad(out.loss, list(sae.parameters()))
    wanted = torch.autograd.grad(expected, list(sae.parameters()))
    torch.testing.assert_close(grads, wanted)
    z = pre_activations(sae, x)
    torch.testing.assert_close(out.acts.to_dense(), torch.where(z > sae.threshold, z, 0))
    torch.testing.assert_close(sae.eval().encode(x), out.acts.to_dense())


def test_jumprelu_estimates_the_derivative_of_the_expected_l0():
    # z uniform with a density of 50: dE[H(z - theta)]/dtheta = -50 for every theta inside.
    density, eps, n = 50.0, 1e-3, 400_000
    z = (torch.rand(n, dtype=torch.float64) - 0.5) / density
    for theta in (0.0004, 0.001, 0.005):
        t = torch.full((n,), theta, dtype=torch.float64, requires_grad=True)
        fastsae.nn.jumprelu.Step.apply(z, t, torch.tensor(eps).double()).mean().backward()
        assert t.grad.sum() == pytest.approx(-density, rel=0.2)
        f = fastsae.nn.jumprelu.JumpReLU.apply(z, t, torch.tensor(eps).double())
        slope = torch.autograd.grad(f.mean(), t)[0].sum()
        assert slope == pytest.approx(-theta * density, rel=0.2)


def test_a_narrow_bandwidth_at_the_start_still_reaches_thresholds_through_silent_entries():
    sae = make(JumpReLUSAE, bandwidth=1.0, threshold=0.6)
    x = torch.randn(200, 5, dtype=torch.float64)
    z = pre_activations(sae, x)
    sae.loss(x).loss.backward()
    eps = sae.bandwidth * float(sae.unit)
    below = ((z < sae.threshold) & (z > sae.threshold - eps / 2)).any(0)
    above = ((z > sae.threshold) & (z < sae.threshold + eps / 2)).any(0)
    assert (below & ~above).any() or below.any()
    assert (sae.log_threshold.grad[below] != 0).all()


def test_jumprelu_starts_where_the_first_batch_keeps_k():
    sae = make(JumpReLUSAE, k=2)
    with torch.no_grad():
        sae.log_threshold.zero_()
    x = 3 * torch.randn(100, 5, dtype=torch.float64)
    out = sae.loss(x)
    assert int(out.acts.row_counts().sum()) in (199, 200)  # the smallest lies on the threshold


def test_every_batch_moves_the_thresholds_of_jumprelu_towards_k():
    sae = make(JumpReLUSAE, k=2, threshold=0.5)
    x = 3 * torch.randn(100, 5, dtype=torch.float64)
    for rows in (x, 0.01 * x, 30 * x):
        before = sae.log_threshold.detach().clone()
        out = sae.loss(rows)  # the first batch measures the unit, so look after it
        l0 = float((pre_activations(sae, rows) > sae.unit * before.exp()).sum()) / 100
        assert l0 == pytest.approx(float(out.acts.l0()))
        excess = min(1.0, max(-1.0, math.log(max(l0, 1e-3) / 2)))
        torch.testing.assert_close(sae.log_threshold.detach(), before + 0.1 * excess)
    assert out.acts.l0() > 2
    for still in (make(JumpReLUSAE, threshold=0.5), sae.eval()):
        before = still.log_threshold.detach().clone()
        still.loss(x)
        assert torch.equal(still.log_threshold, before)


def test_jumprelu_comes_to_its_target_without_a_gradient_on_thresholds():
    sae = make(JumpReLUSAE, d_in=16, d_sae=64, k=5, threshold=0.01)
    x = torch.randn(400, 16, dtype=torch.float64)
    for _ in range(120):
        out = sae.loss(x)
    assert float(out.acts.l0()) == pytest.approx(5, rel=0.03)


def test_jumprelu_starts_on_given_data_before_any_batch():
    sae = make(JumpReLUSAE, k=2)
    x = 3 * torch.randn(100, 5, dtype=torch.float64) + 4
    sae.initialize_from_data_(x)
    before = sae.log_threshold.clone()
    assert before.unique().numel() == 1
    out = sae.loss(x)
    assert int(out.acts.row_counts().sum()) in (199, 200)


def test_jumprelu_reconstructs_with_the_estimate_while_training():
    """Any loss of `forward` trains the thresholds, also through entries that are silent."""
    sae = make(JumpReLUSAE, bandwidth=1.0, threshold=0.3)
    x, weight = (torch.randn(50, 5, dtype=torch.float64) for _ in range(2))
    z, theta, eps = pre_activations(sae, x), sae.threshold, sae._eps.double()
    near = ((z - theta).abs() < eps / 2).double()
    slope = -(theta.detach() / eps) * near
    f = torch.where(z > theta, z, 0) + slope * (theta - theta.detach())
    x_hat = f @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae(x), x_hat)
    torch.testing.assert_close(sae.encode(x), f)
    assert (near * (z < theta)).any()
    parameters = list(sae.parameters())
    wanted = torch.autograd.grad((x_hat * weight).sum(), parameters)
    got = torch.autograd.grad((sae(x) * weight).sum(), parameters)
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():  # no estimate: only what is active, then padding
        active = sae.encode_sparse(x)
    evaluated = sae.eval().encode_sparse(x)
    for acts in (active, evaluated):
        assert int(acts.offsets[-1]) == int((z > theta).sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_threshold_of_jumprelu_is_float32_whatever_the_dtype(dtype):
    sae = JumpReLUSAE(5, 9, dtype=dtype, threshold=0.3)
    assert sae.b_enc.dtype == dtype
    assert sae.threshold.dtype == sae.log_threshold.dtype == torch.float32
    cast = JumpReLUSAE(5, 9, threshold=0.3).to(dtype)
    assert cast.W_dec.dtype == dtype
    assert torch.equal(cast.log_threshold, sae.log_threshold)
    out = sae.loss(torch.randn(30, 5).to(dtype))
    out.loss.backward()
    assert sae.log_threshold.grad.dtype == torch.float32
    assert sae.b_enc.grad.dtype == dtype


def test_jumprelu_calibration_gives_k_on_the_rows_it_is_given():
    sae = make(JumpReLUSAE, d_in=16, d_sae=64, k=3, threshold=0.01)
    x = torch.randn(10, 50, 16, dtype=torch.float64)
    ratios = sae.threshold / sae.threshold[0]
    sae.calibrate_(x)
    assert float(sae.encode_sparse(x).l0()) == pytest.approx(3, rel=0.01)
    torch.testing.assert_close(sae.threshold / sae.threshold[0], ratios)
    with pytest.raises(ValueError, match="expected a target k, got None"):
        make(JumpReLUSAE).calibrate_(torch.ones(2, 5, dtype=torch.float64))
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    with pytest.raises(ValueError, match="expected x to have positive pre-activations, got none"):
        sae.calibrate_(x)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_unit_makes_the_loss_free_of_units(cls):
    a, b = make(cls), make(cls)
    x = torch.randn(30, 5, dtype=torch.float64)
    ActivationScaler(b.columns, [1 / 8]).fold_(b)  # for inputs 8 times as large
    torch.testing.assert_close(a.loss(x).loss, b.loss(8 * x).loss)
    torch.testing.assert_close(8 * a.encode(x), b.encode(8 * x))


@pytest.mark.parametrize("cls", CLASSES)
def test_the_first_batch_measures_the_unit_and_no_other(cls):
    sae = make(cls)
    x = torch.randn(30, 5, dtype=torch.float64)
    sae.eval()
    sae.loss(9 * x)
    assert sae.unit == 1
    sae.train()
    sae.loss(4 * x)
    first = sae.unit.clone()
    sae.loss(x)
    assert sae.unit == first
    assert first == pytest.approx(float((ALONE.total_variance(4 * x) / x.numel()).sqrt()), rel=1e-6)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_coefficient_follows_the_wanted_l0(cls):
    x = torch.randn(30, 5, dtype=torch.float64)
    start = {"threshold": 0.1, "coefficient": 1.0} if cls is JumpReLUSAE else {}
    low, high, fixed = make(cls, k=0.1, **start), make(cls, k=8.9, **start), make(cls, **start)
    for sae in (low, high, fixed):
        sae.loss(x)
    assert low.coefficient > 1 > high.coefficient
    assert fixed.coefficient == 1
    waiting = make(cls, k=0.1, **start)
    waiting.loss(x, context=StepContext(sparsity_scale=0.5))
    assert waiting.coefficient == 1


@pytest.mark.parametrize("cls", CLASSES)
def test_training_reaches_the_wanted_l0_on_new_tokens(cls):
    torch.manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(24, 16), dim=1)
    code = (torch.rand(12_000, 24) < 0.1) * (1 + torch.rand(12_000, 24))
    x = 50 * code @ directions + 7
    sae = cls(16, 32, k=3)
    config = TrainConfig(batch_size=250, epochs=15, lr=3e-3, progress=False)
    Trainer(sae, x[:10_000], config).fit()
    acts = sae.encode_sparse(x[10_000:])
    assert float(acts.l0()) == pytest.approx(3, rel=0.15)
    fvu = fastsae.eval.metrics.fvu(x[10_000:], sae.decode(acts))
    assert fvu < (0.8 if cls is ReLUSAE else 0.25)  # L1 shrinks what it keeps


@pytest.mark.parametrize("cls", CLASSES)
def test_save_and_load(cls, tmp_path):
    sae = make(cls, k=2)
    x = torch.randn(30, 5, dtype=torch.float64)
    sae.loss(3 * x).loss.backward()
    fastsae.save(sae, tmp_path)
    again = fastsae.load(tmp_path)
    assert type(again) is cls
    assert again.config() == sae.config()
    for name, tensor in sae.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)
    torch.testing.assert_close(again.encode(x), sae.eval().encode(x))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_cast_does_not_round_what_was_measured(cls):
    sae = make(cls)
    sae.loss(torch.randn(30, 5, dtype=torch.float64))
    unit = sae.unit.clone()
    sae.to(torch.bfloat16)
    assert sae.unit.dtype == torch.float32
    assert torch.equal(sae.unit, unit)
    assert sae.loss(torch.randn(8, 5, dtype=torch.bfloat16)).loss.isfinite()


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (ReLUSAE, {"k": 0}, "0 < k <= d_sae = 9 or None, got k = 0"),
        (GatedSAE, {"coefficient": -1}, "coefficient >= 0 and control_lr >= 0, got -1"),
        (ReLUSAE, {"coefficient": math.inf}, "coefficient >= 0 and control_lr >= 0, got inf"),
        (ReLUSAE, {"penalty": "l2"}, "penalty in l1, tanh, p_anneal, got 'l2'"),
        (ReLUSAE, {"p_end": 0}, "0 < p_end <= 1, got 0"),
        (JumpReLUSAE, {"bandwidth": 0}, "bandwidth > 0 and threshold > 0, got 0 and None"),
    ],
)
def test_bad_arguments(cls, arguments, message):
    with pytest.raises(ValueError, match=f"{cls.__name__}: expected {message}"):
        cls(5, 9, **arguments)


@pytest.mark.parametrize("cls", CLASSES)
def test_odd_batches_change_nothing_for_the_worse(cls):
    sae = make(cls, k=2)
    for x in (torch.ones(4, 5), torch.zeros(0, 5)):
        assert sae.loss(x.double()).loss.isfinite() or len(x) == 0
    assert sae.unit == 1
    assert sae.coefficient.isfinite()
