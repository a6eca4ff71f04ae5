"""SGD-SaI: its steps, what the scale is of, and when it is measured."""

import io

import pytest
import torch

from fastsae.nn import TopKSAE
from fastsae.train.sgd_sai import SGDSaI, gsnr


def step(optimizer, *grads):
    """Do one step in which the parameters have `grads`, None for no gradient."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g
    optimizer.step()


def reference(p, grads, lr, momentum, weight_decay, eps=1e-8):
    """The published rule, for one tensor that is scaled."""
    first = grads[0]
    scale = (first**2).sum() ** 0.5 / (first.var() ** 0.5 + eps)
    m = first
    for i, g in enumerate(grads):
        if i > 0:
            m = momentum * m + (1 - momentum) * g
        p = p * (1 - lr * weight_decay) - lr * scale * m
    return p


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_follow_the_published_rule(momentum, weight_decay):
    grads = [torch.randn(5, 7, dtype=torch.float64) + 0.3 for _ in range(6)]
    start = torch.randn(5, 7, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    optimizer = SGDSaI([p], lr=0.02, momentum=momentum, weight_decay=weight_decay)
    for g in grads:
        step(optimizer, g.clone())
    torch.testing.assert_close(p.detach(), reference(start, grads, 0.02, momentum, weight_decay))


def test_the_scale_is_that_of_the_first_gradient():
    p = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = SGDSaI([p])
    first = torch.randn(6, 4)
    for g in (first, 100 * first + 7, torch.ones(6, 4), torch.zeros(6, 4)):
        step(optimizer, g)
        assert optimizer.state[p]["gsnr"] == gsnr(first)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_without_a_mean_the_scale_is_the_root_of_the_number_of_entries(size):
    g = size * torch.randn(100, 160)
    sparse = torch.where(torch.arange(100).unsqueeze(1) < 5, g, 0)
    for found in (gsnr(g, 1e-12), gsnr(sparse, 1e-12)):
        assert found == pytest.approx((100 * 160) ** 0.5, rel=0.01)


def test_a_dominant_mean_gives_a_hundredfold_rate():
    centred = torch.randn(768)
    assert gsnr(1 + 0.01 * centred) == pytest.approx(100 * gsnr(centred), rel=0.1)


@pytest.mark.parametrize("scale_biases", [False, True])
def test_biases_are_not_scaled_by_default(scale_biases):
    bias, matrix = torch.nn.Parameter(torch.zeros(9)), torch.nn.Parameter(torch.zeros(1, 9))
    optimizer = SGDSaI([bias, matrix], lr=0.5, scale_biases=scale_biases)
    g = torch.randn(9) + 1
    step(optimizer, g.clone(), g.clone().unsqueeze(0))
    torch.testing.assert_close(matrix.detach()[0], -0.5 * gsnr(g) * g)
    torch.testing.assert_close(bias.detach(), matrix.detach()[0] if scale_biases else -0.5 * g)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_is_not_scaled(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    step(SGDSaI([p], lr=0.5, scale_biases=True), torch.full(shape, 3.0))
    assert p.item() == -1.5


@pytest.mark.parametrize("nothing", [None, torch.zeros(4, 4)])
def test_a_first_gradient_that_comes_late_is_measured_then(nothing):
    early, late = (torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    optimizer = SGDSaI([early, late], lr=0.1, momentum=0.0)
    g, other = torch.randn(4, 4), torch.randn(4, 4) + 1
    step(optimizer, g, nothing)
    assert not late.detach().any()
    step(optimizer, g, other)
    torch.testing.assert_close(late.detach(), -0.1 * gsnr(other) * other)
    torch.testing.assert_close(early.detach(), -0.2 * gsnr(g) * g)


@pytest.mark.parametrize("shape", [(4, 4), (4,)])
def test_the_first_gradient_that_is_not_zero_is_the_momentum(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = SGDSaI([p], momentum=0.75)
    optimizer.prepare()
    assert optimizer.state[p]["gsnr"] == 0
    first, second = torch.randn(shape), torch.randn(shape)
    for g, m in (
        (torch.zeros(shape), torch.zeros(shape)),
        (first, first),
        (second, 0.75 * first + 0.25 * second),
        (torch.zeros(shape), 0.75 * (0.75 * first + 0.25 * second)),
    ):
        step(optimizer, g.clone())
        torch.testing.assert_close(optimizer.state[p]["momentum"], m)
    assert optimizer.state[p]["gsnr"] == (gsnr(first) if len(shape) > 1 else 1)


def test_a_prepared_state_changes_nothing_and_is_not_replaced():
    p, q = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    plain, prepared = SGDSaI([p]), SGDSaI([q])
    prepared.prepare()
    for g in torch.randn(3, 5, 3):
        step(plain, g)
        step(prepared, g)
        prepared.prepare()
    assert torch.equal(p, q)
    assert prepared.state[q]["gsnr"] == plain.state[p]["gsnr"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_survives_a_file(dtype):
    def make():
        return torch.nn.Parameter(torch.ones(8, 6, dtype=dtype))

    grads = [torch.randn(8, 6).to(dtype) for _ in range(5)]
    p = make()
    whole = SGDSaI([p], lr=0.01)
    for g in grads[:2]:
        step(whole, g)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    q = make()
    q.data.copy_(p.data)
    resumed = SGDSaI([q], lr=1.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state[q]["gsnr"] == whole.state[p]["gsnr"]
    assert resumed.state[q]["gsnr"].dtype == torch.float64
    for g in grads[2:]:
        step(whole, g)
        step(resumed, g)
    assert torch.equal(p, q)
    assert not torch.equal(p, make())


def test_an_sae_learns_and_holds_one_state_per_weight():
    x = torch.randn(400, 24) @ torch.randn(24, 16)
    sae = TopKSAE(16, 64, k=8)
    optimizer = SGDSaI(sae.parameters(), lr=1e-2)

    def closure():
        optimizer.zero_grad()
        out = sae.loss(x)
        out.loss.backward()
        return out.fvu.item()

    fvu = [optimizer.step(closure) for _ in range(40)]
    assert fvu[-1] < 0.8 * fvu[0]
    for p, state in optimizer.state.items():
        assert state.keys() == {"momentum", "gsnr"}
        assert (state["momentum"].shape, state["momentum"].stride()) == (p.shape, p.stride())
        assert state["gsnr"].shape == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0}, "SGDSaI: expected 0 < lr < inf, got 0"),
        ({"lr": float("nan")}, "SGDSaI: expected 0 < lr < inf, got nan"),
        ({"eps": -1.0}, "SGDSaI: expected 0 < eps < inf, got -1.0"),
        ({"momentum": 1.0}, "SGDSaI: expected 0 <= momentum < 1, got 1.0"),
        ({"momentum": -0.1}, "SGDSaI: expected 0 <= momentum < 1, got -0.1"),
        ({"weight_decay": -0.5}, "SGDSaI: expected 0 <= weight_decay < inf, got -0.5"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        SGDSaI([torch.nn.Parameter(torch.zeros(2))], **arguments)
    assert str(raised.value) == message
