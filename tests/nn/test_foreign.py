"""What SAEs of other libraries need: biases that are not subtracted, normalized activations,
selection by what a latent writes, matching pursuit."""

import pytest
import torch

from fastsae import TrainConfig, Trainer, nn
from fastsae.eval import evaluate
from fastsae.models import splice
from tests.models.tiny import tiny_model
from tests.nn.randomized import make, rows


def topk(z, k):
    return z * torch.zeros_like(z).scatter(1, z.topk(k).indices, 1.0)


@pytest.mark.parametrize(
    "cls", [nn.TopKSAE, nn.BatchTopKSAE, nn.JumpReLUSAE, nn.GatedSAE, nn.ReLUSAE, nn.GroupMaxSAE]
)
def test_without_b_dec_at_the_input_b_enc_does_the_same(cls):
    plain = make(cls, 6, 16, 4)
    other = make(cls, 6, 16, 4, apply_b_dec_to_input=False)
    other.b_enc = plain.b_enc - plain.b_dec @ plain.W_enc
    if cls is nn.GatedSAE:  # the magnitudes see the same shift
        other.b_mag = plain.b_mag - (plain.b_dec @ plain.W_enc) * plain.r_mag.exp()
    x = rows(30, 6)
    torch.testing.assert_close(other.encode(x), plain.encode(x))
    torch.testing.assert_close(other(x), plain(x))
    assert other.config()["apply_b_dec_to_input"] is False


def test_gradients_without_b_dec_at_the_input():
    sae, x = make(nn.TopKSAE, 6, 16, 3, apply_b_dec_to_input=False), rows(20, 6)
    f = topk((x @ sae.W_enc + sae.b_enc).relu(), 3)
    expected = (x - f @ sae.W_dec - sae.b_dec).square().sum() / (x - x.mean(0)).square().sum()
    found = sae.loss(x).loss
    torch.testing.assert_close(found, expected)
    parameters = list(sae.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters)
    )


def test_a_run_without_b_dec_at_the_input_starts_at_the_center(caplog):
    torch.manual_seed(0)
    x = torch.randn(2000, 8) + 3
    sae = nn.TopKSAE(8, 32, 4, apply_b_dec_to_input=False)
    trainer = Trainer(sae, x, TrainConfig(steps=60, batch_size=256, progress=False))
    result = trainer.fit()
    assert result.final["fvu"] < 0.35
    Trainer(sae, x, TrainConfig(steps=1, update="fused", progress=False)).fit()


def test_a_transcoder_has_no_b_dec_at_the_input():
    with pytest.raises(ValueError, match="apply_b_dec_to_input to be False"):
        nn.Transcoder(6, 6, 16, 3, apply_b_dec_to_input=True)


def test_selection_by_what_a_latent_writes():
    sae = make(nn.TopKSAE, 6, 16, 3, select_by_decoder_norm=True)
    x, norm = rows(30, 6), sae.W_dec.detach().norm(dim=1)
    z = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    chosen = torch.zeros_like(z).scatter(1, (z * norm).topk(3).indices, 1.0)
    torch.testing.assert_close(sae.encode(x), z * chosen)
    assert not torch.equal(chosen, torch.zeros_like(z).scatter(1, z.topk(3).indices, 1.0))
    expected = (x - (z * chosen) @ sae.W_dec - sae.b_dec).square().sum()
    expected = expected / (x - x.mean(0)).square().sum()
    parameters = list(sae.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(sae.loss(x).loss, parameters), torch.autograd.grad(expected, parameters)
    )
    with pytest.raises(ValueError, match="absolute or select_by_decoder_norm, got both"):
        nn.TopKSAE(6, 16, 3, absolute=True, select_by_decoder_norm=True)


def layer_norm(x):
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return (x - mean) / (std + 1e-5), mean, std


def constant_norm(x):
    c = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
    return x * c, 0, 1 / c


@pytest.mark.parametrize(
    ("kind", "by_hand"), [("layer_norm", layer_norm), ("constant_norm_rescale", constant_norm)]
)
def test_normalized_activations(kind, by_hand):
    inner = make(nn.TopKSAE, 6, 16, 3)
    sae, x = nn.NormalizedSAE(inner, kind), 4 * rows(20, 6) + 2
    u, mean, scale = by_hand(x)
    torch.testing.assert_close(sae.normalize(x), u)
    torch.testing.assert_close(sae.encode(x), inner.encode(u))
    expected = (inner(u) * scale + mean).detach()
    torch.testing.assert_close(sae(x), expected)
    torch.testing.assert_close(sae.decode(sae.encode(x), x), expected)
    torch.testing.assert_close(sae(x.view(4, 5, 6)), expected.view(4, 5, 6))
    torch.testing.assert_close(sae.loss(x).loss, inner.loss(u).loss)
    with pytest.raises(ValueError, match=r"NormalizedSAE: expected decode\(acts, x\) with x"):
        sae.decode(sae.encode(x))
    measured = evaluate(sae, x)
    fvu = (x - expected).square().sum() / (x - x.mean(0)).square().sum()
    assert measured.fvu == pytest.approx(fvu.item())


def test_the_output_of_a_transcoder_is_not_put_back():
    inner = make(nn.Transcoder, 6, 4, 16, 3)
    sae, x = nn.NormalizedSAE(inner, "layer_norm"), rows(20, 6)
    torch.testing.assert_close(sae(x), inner(layer_norm(x)[0]))


def test_heads_are_one_row():
    inner = make(nn.TopKSAE, 6, 16, 3)
    sae, x = nn.NormalizedSAE(inner, reshape_activations="hook_z"), rows(20, 6)
    torch.testing.assert_close(sae(x.view(4, 5, 2, 3)), inner(x).view(4, 5, 2, 3))
    torch.testing.assert_close(sae.encode(x.view(20, 2, 3)), inner.encode(x))
    torch.testing.assert_close(sae(x), inner(x))
    with pytest.raises(ValueError, match=r"x \[..., heads, d_head\] with 6 numbers, got \[20, 5\]"):
        sae(rows(20, 5))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"normalize_activations": "batch_norm"}, "normalize_activations in none, layer_norm"),
        ({"reshape_activations": "hook_q"}, "reshape_activations in none, hook_z"),
    ],
)
def test_other_names_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=f"NormalizedSAE: expected {message}"):
        nn.NormalizedSAE(make(nn.TopKSAE, 6, 16, 3), **kwargs)


def test_a_normalized_sae_is_spliced():
    model = tiny_model()
    d = model.config.hidden_size
    sae = nn.NormalizedSAE(nn.TopKSAE(d, 32, 4), "layer_norm")
    tokens = torch.arange(10).unsqueeze(0)
    before = model(tokens).logits
    with splice(model, "resid_post.0", sae):
        assert not torch.allclose(model(tokens).logits, before)


def pursuit(x, W_dec, b_dec, iterations, threshold, stop):
    """The algorithm one token at a time."""
    code = torch.zeros(len(x), len(W_dec), dtype=x.dtype)
    for i, row in enumerate(x):
        r = row - b_dec
        for _ in range(iterations):
            scores = (W_dec @ r).relu()
            j = int(scores.argmax())
            new = code[i, j] == 0 and scores[j] > 0
            code[i, j] += scores[j]
            r = r - scores[j] * W_dec[j]
            if (stop and not new) or (threshold and r.norm() < threshold):
                break
    return code


@pytest.mark.parametrize("iterations", [1, 3, 6])
@pytest.mark.parametrize("threshold", [0, 0.8])
@pytest.mark.parametrize("stop", [True, False])
def test_matching_pursuit_is_the_loop_over_tokens(iterations, threshold, stop):
    torch.manual_seed(0)
    sae = nn.MatchingPursuitSAE(
        6, 16, iterations, residual_threshold=threshold, stop_on_duplicate_support=stop,
        dtype=torch.float64,
    )  # fmt: skip
    sae.b_dec = torch.randn(6)
    x = rows(40, 6)
    expected = pursuit(x, sae.W_dec.detach(), sae.b_dec.detach(), iterations, threshold, stop)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), expected)
        torch.testing.assert_close(sae(x), expected @ sae.W_dec + sae.b_dec)


def test_matching_pursuit_has_the_gradients_of_its_loop():
    sae = nn.MatchingPursuitSAE(4, 8, 3, residual_threshold=0, dtype=torch.float64)
    x = rows(5, 4)

    def loss(W_dec, b_dec):
        with torch.nn.utils.parametrize.cached():
            held = dict(sae.named_parameters())
            held |= {"W_dec": W_dec, "b_dec": b_dec, "W_enc_rows": W_dec}
            return torch.func.functional_call(sae, held, (x,)).square().sum()

    inputs = [p.detach().clone().requires_grad_() for p in (sae.W_dec, sae.b_dec + 0.1)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_matching_pursuit_trains():
    torch.manual_seed(0)
    basis = torch.nn.functional.normalize(torch.randn(16, 8), dim=1)
    code = torch.rand(4000, 16) * (torch.rand(4000, 16) < 0.1)
    sae = nn.MatchingPursuitSAE(8, 16, 3)
    before = evaluate(sae.eval(), code @ basis).fvu
    Trainer(sae, code @ basis, TrainConfig(steps=200, batch_size=256, progress=False)).fit()
    after = evaluate(sae, code @ basis).fvu
    assert after < 0.6 * before
    assert sae.W_enc_rows is sae.W_dec
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(16))
