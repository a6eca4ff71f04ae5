"""Attributions to upstream latents add up to what the encoder of a coder really computes."""

from __future__ import annotations

import re

import pytest
import torch

from fastsae.analysis.circuits import connections, latent_attribution
from fastsae.nn import SAE, BatchTopKSAE, TopKSAE, Transcoder
from fastsae.types import SparseActs

N, D, D_UP, D_SAE = 40, 10, 30, 24


def randomised(sae: SAE) -> SAE:
    """Encoder and decoder differ and no bias is zero."""
    for name in ("W_enc", "b_enc", "b_dec"):
        setattr(sae, name, torch.randn_like(getattr(sae, name)))
    return sae.eval()


def topk_sae(d_sae: int = D_UP, k: int = 4, d_in: int = D, **kwargs: object) -> SAE:
    return randomised(TopKSAE(d_in, d_sae, k, **{"dtype": torch.float64, **kwargs}))


def batch_topk_sae() -> SAE:
    sae = BatchTopKSAE(D, D_UP, k=4, dtype=torch.float64)
    sae.threshold.fill_(1.5)
    return randomised(sae)


def transcoder(d_in: int = D, d_out: int = 7, d_sae: int = D_SAE, k: int = D_SAE) -> SAE:
    """With k = d_sae its code is relu of every pre-activation."""
    return randomised(Transcoder(d_in, d_out, d_sae, k, dtype=torch.float64))


UPSTREAM = pytest.mark.parametrize(
    "upstream", [topk_sae, batch_topk_sae, lambda: transcoder(6, D, D_UP, 4)]
)
CODERS = pytest.mark.parametrize("coder", [transcoder, lambda: topk_sae(D_SAE, D_SAE)])


def example(upstream: SAE) -> tuple[SparseActs, torch.Tensor, torch.Tensor]:
    """A code, the residual stream that it is part of, and what else is in there."""
    acts = upstream.encode_sparse(torch.randn(N, upstream.d_in, dtype=torch.float64)).detach()
    rest = torch.randn(N, D, dtype=torch.float64) + upstream.b_dec.detach()
    return acts, (acts.to_dense() @ upstream.W_dec + rest).detach(), rest


def constants(coder: SAE, latent: int) -> torch.Tensor:
    bias, w = coder._input_bias(), coder.W_enc[:, latent]
    return (coder.b_enc[latent] - (0 if bias is None else bias @ w)).detach()


@CODERS
@UPSTREAM
@pytest.mark.parametrize("norm", [False, True])
def test_latents_and_the_rest_add_up_to_the_pre_activation(upstream, coder, norm):
    upstream, coder = upstream(), coder()
    acts, resid, rest = example(upstream)
    scale = resid.square().mean(1).sqrt() if norm else None
    divisor = torch.ones(N, 1, dtype=torch.float64) if scale is None else scale.unsqueeze(1)
    code = coder.encode(resid / divisor).detach()
    for f in (0, 11, D_SAE - 1):
        got = latent_attribution(upstream, acts, coder, f, scale)
        assert got.values.shape == acts.values.shape
        assert got.indices is acts.indices
        assert got.offsets is acts.offsets
        assert got.d_sae == D_UP
        assert not got.values.requires_grad
        summed = got.to_dense().sum(1)
        elsewhere = (rest / divisor) @ coder.W_enc[:, f].detach() + constants(coder, f)
        torch.testing.assert_close((summed + elsewhere).relu(), code[:, f], atol=1e-11, rtol=1e-11)
        assert summed.std() > 0.1
    assert 0.2 < (code > 0).double().mean() < 0.8


def test_a_gain_is_folded_into_the_coder_and_a_layer_norm_centres():
    upstream, coder = topk_sae(), transcoder()
    acts, resid, rest = example(upstream)
    norm = torch.nn.LayerNorm(D, dtype=torch.float64).requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    code = coder.encode(norm(resid)).detach()
    with torch.no_grad():
        coder.b_enc += norm.bias @ coder.W_enc
        centre = torch.eye(D, dtype=torch.float64) - 1 / D
        coder.W_enc = centre @ (norm.weight.unsqueeze(1) * coder.W_enc)
    scale = (resid.var(1, correction=0) + norm.eps).sqrt()
    for f in range(D_SAE):
        summed = latent_attribution(upstream, acts, coder, f, scale).to_dense().sum(1)
        elsewhere = (rest @ coder.W_enc[:, f].detach()) / scale + constants(coder, f)
        torch.testing.assert_close((summed + elsewhere).relu(), code[:, f])
    assert 0.2 < (code > 0).double().mean() < 0.8


@UPSTREAM
def test_every_entry_is_the_formula(upstream):
    upstream, coder, f = upstream(), transcoder(), 3
    acts, _, _ = example(upstream)
    scale = torch.rand(N, dtype=torch.float64) + 0.5
    dense = latent_attribution(upstream, acts, coder, f, scale).to_dense()
    code = acts.to_dense()
    assert (code != 0).sum() > N
    for t, j in code.nonzero().tolist():
        expected = code[t, j] * (upstream.W_dec[j] @ coder.W_enc[:, f]) / scale[t]
        torch.testing.assert_close(dense[t, j], expected.detach())
    assert (dense[code == 0] == 0).all()


def test_padding_stays_empty():
    """Entries past the last offset belong to no row, so they have no scale."""
    upstream, coder = topk_sae(), transcoder()
    acts = SparseActs(
        torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0]).double(),
        torch.tensor([4, 9, 2, 0, 0], dtype=torch.int32),
        torch.tensor([0, 2, 2, 3], dtype=torch.int32),
        D_UP,
    )
    scale = torch.tensor([2.0, 5.0, 4.0]).double()
    got = latent_attribution(upstream, acts, coder, 1, scale).values
    weight = connections(upstream, coder, torch.tensor([1]))[0]
    expected = torch.stack([weight[4] / 2, weight[9], weight[2] * 3 / 4])
    torch.testing.assert_close(got[:3], expected)
    assert got[3:].tolist() == [0, 0]


def test_no_tokens_have_no_attribution():
    upstream = topk_sae()
    for acts in (
        upstream.encode_sparse(torch.zeros(0, D).double()),
        batch_topk_sae().encode_sparse(torch.zeros(0, D).double()),
    ):
        got = latent_attribution(upstream, acts, transcoder(), 0, torch.ones(0).double())
        assert got.shape == (0, D_UP)


@CODERS
def test_connections_are_a_product(coder):
    upstream, coder = topk_sae(), coder()
    latents = torch.tensor([7, 0, D_SAE - 1, 7])
    got = connections(upstream, coder, latents)
    assert got.shape == (4, D_UP)
    assert not got.requires_grad
    torch.testing.assert_close(got, (coder.W_enc[:, latents].t() @ upstream.W_dec.t()).detach())
    assert connections(upstream, coder, latents[:0]).shape == (0, D_UP)


def test_bfloat16_is_added_up_in_float32():
    upstream, coder = topk_sae(dtype=torch.bfloat16), transcoder().bfloat16()
    acts = upstream.encode_sparse(torch.randn(N, D, dtype=torch.bfloat16))
    weight = connections(upstream, coder, torch.arange(D_SAE))
    got = latent_attribution(upstream, acts, coder, 2, torch.full((N,), 3.0))
    exact = latent_attribution(
        upstream.double(), acts.to(torch.float64), coder.double(), 2, torch.full((N,), 3.0)
    )
    assert weight.dtype == got.values.dtype == torch.float32
    torch.testing.assert_close(got.values.double(), exact.values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        weight.double(), connections(upstream, coder, torch.arange(D_SAE)), atol=1e-5, rtol=1e-5
    )


ACTS = SparseActs(torch.ones(3, 2).double(), torch.zeros(3, 2, dtype=torch.int32), None, D_UP)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": D_SAE}, "expected a latent in 0..23, got 24"),
        ({"latent": -1}, "expected a latent in 0..23, got -1"),
        ({"upstream": topk_sae(d_in=D + 1)},
         "expected upstream to write d_in = 10 numbers, got 11"),
        ({"upstream": topk_sae(D_UP + 1)},
         "expected acts to be [n, d_sae] with d_sae = 31 like upstream, got [3, 30]"),
        ({"scale": torch.ones(3, 1)}, "expected scale to be [n] with n = 3, got [3, 1]"),
        ({"scale": torch.ones(3, device="meta")},
         "expected scale on cpu like the coder, got meta"),
        ({"acts": ACTS.to("meta")}, "expected acts on cpu like the coder, got meta"),
        ({"upstream": topk_sae(device="meta")},
         "expected upstream on cpu like the coder, got meta"),
    ],
)  # fmt: skip
def test_errors_of_attributions_say_what_was_expected(changes, message):
    arguments = {"upstream": topk_sae(), "acts": ACTS, "coder": transcoder(), "latent": 0}
    with pytest.raises(ValueError, match=f"^{re.escape(f'latent_attribution: {message}')}$"):
        latent_attribution(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("latents", "error", "message"),
    [
        (torch.tensor([0, D_SAE]), ValueError, "expected a latent in 0..23, got 24"),
        (torch.tensor(3), ValueError, "expected latents to be [m], got []"),
        (torch.arange(2).int(), TypeError, "expected latents to be int64, got torch.int32"),
        (torch.arange(2, device="meta"), ValueError,
         "expected latents on cpu like the coder, got meta"),
    ],
)  # fmt: skip
def test_errors_of_connections_say_what_was_expected(latents, error, message):
    with pytest.raises(error, match=f"^{re.escape(f'connections: {message}')}$"):
        connections(topk_sae(), transcoder(), latents)


def test_widths_fit_in_connections():
    message = "connections: expected upstream to write d_in = 10 numbers, got 7"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        connections(transcoder(), transcoder(), torch.arange(2))
