"""Attributions of a cross-layer transcoder add up to what its encoders really compute."""

from __future__ import annotations

import re

import pytest
import torch

from fastsae import BatchTopKCrossLayerTranscoder, CrossLayerTranscoder, TopKSAE, reference
from fastsae.analysis import cross_layer_attribution, virtual_weights
from fastsae.nn.layer_decoders import DECODERS
from fastsae.types import SparseActs
from tests.nn.randomized import make, rows

L, D, F, N = 4, 6, 9, 25


def coder(decoders="full", cls=CrossLayerTranscoder):
    rank = 2 if decoders == "low_rank" else None
    sae = make(cls, D, L, F, 5, decoders=decoders, rank=rank)
    if decoders == "tied":
        sae.output_scale.uniform_(0.5, 2)
    return sae


def run(sae, rest, scale):
    """A model whose residual stream is what the transcoder writes, and `rest: [L, n, d]` on top:
    the inputs of all layers, and the code, computed layer by layer."""
    code = torch.zeros(len(rest[0]), L, F, dtype=torch.float64)
    inputs = []
    for m in range(L):
        x = rest[m].clone()
        for j in range(m):
            for l_ in range(j + 1):
                x = x + code[:, l_] @ sae.written(l_)[:, j - l_].detach()
            x = x + sae.layers(sae.b_dec)[j].detach()
        inputs.append(x / scale.unsqueeze(1))
        z = inputs[-1] @ sae.dictionaries[m].W_enc.t().detach() + sae.dictionaries[m].b_enc.detach()
        code[:, m] = z.relu() * (torch.rand(z.shape) < 0.5)  # whatever selects
    return inputs, code


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("decoders", DECODERS)
def test_attributions_and_the_rest_add_up_to_the_pre_activation(decoders, norm):
    sae = coder(decoders)
    rest = [rows(N, D) for _ in range(L)]
    scale = 1 + torch.rand(N, dtype=torch.float64) if norm else torch.ones(N, dtype=torch.float64)
    inputs, code = run(sae, rest, scale)
    acts = SparseActs.from_dense(code.flatten(1))
    for layer in range(L):
        own, biases = sae.dictionaries[layer], sae.layers(sae.b_dec)[:layer].sum(0)
        for latent in (0, 4, F - 1):
            got = cross_layer_attribution(sae, acts, layer, latent, scale if norm else None)
            assert not got.values.requires_grad
            elsewhere = (rest[layer] + biases) @ own.W_enc[latent] / scale + own.b_enc[latent]
            z = inputs[layer] @ own.W_enc[latent] + own.b_enc[latent]
            summed = got.to_dense().sum(1)
            torch.testing.assert_close(summed + elsewhere, z, rtol=1e-11, atol=1e-11)
            assert (summed.std() > 0.01) == (layer > 0)


@pytest.mark.parametrize("decoders", DECODERS)
def test_virtual_weights_are_the_written_sum(decoders):
    sae = coder(decoders)
    W_dec = reference.cross_layer_decoder(
        list(sae.W_decs),
        decoders,
        list(sae.W_maps) if decoders == "low_rank" else None,
        sae.output_scale if decoders == "tied" else None,
    )
    latents = torch.tensor([3, 0, F - 1])
    for layer in range(L):
        got = virtual_weights(sae, layer, latents)
        assert got.shape == (3, L * F)
        assert not got.requires_grad
        read = sae.dictionaries[layer].W_enc[latents]
        expected = torch.einsum("lfmd,ad->alf", W_dec[:, :, :layer], read)
        torch.testing.assert_close(got, expected.flatten(1).detach(), rtol=1e-12, atol=1e-12)
        assert not got[:, layer * F :].any()


def test_a_code_of_batch_topk_has_padding():
    sae = coder(cls=BatchTopKCrossLayerTranscoder)
    acts = sae.encode_sparse(rows(N, L * D)).detach()
    acts = SparseActs(
        torch.cat([acts.values, acts.values.new_zeros(3)]),
        torch.cat([acts.indices, acts.indices.new_zeros(3)]),
        acts.offsets,
        acts.d_sae,
    )
    got = cross_layer_attribution(sae, acts, 3, 2, torch.full((N,), 2.0).double())
    weight = virtual_weights(sae, 3, torch.tensor([2]))[0]
    torch.testing.assert_close(got.to_dense(), acts.to_dense() * weight / 2)
    assert not got.values[-3:].any()


def test_bfloat16_is_added_up_in_float32():
    sae = coder()
    exact = virtual_weights(sae.bfloat16(), 2, torch.arange(F))
    assert exact.dtype == torch.float32
    torch.testing.assert_close(
        exact.double(), virtual_weights(sae.double(), 2, torch.arange(F)), rtol=1e-5, atol=1e-5
    )


ACTS = SparseActs(torch.ones(3, 2).double(), torch.zeros(3, 2, dtype=torch.int32), None, L * F)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layer": L}, ValueError, "expected a layer in 0..3, got 4"),
        ({"layer": -1}, ValueError, "expected a layer in 0..3, got -1"),
        ({"latent": F}, ValueError, "expected a latent in 0..8, got 9"),
        ({"scale": torch.ones(4)}, ValueError, "expected scale to be [n] with n = 3, got [4]"),
        ({"acts": SparseActs(ACTS.values, ACTS.indices, None, F)}, ValueError,
         "expected acts to be [n, d_sae] with d_sae = 36, got [3, 9]"),
        ({"acts": ACTS.to("meta")}, ValueError, "expected acts on cpu, got meta"),
        ({"transcoder": TopKSAE(D, F, 2)}, TypeError,
         "expected a cross-layer transcoder, got TopKSAE"),
    ],
)  # fmt: skip
def test_errors_of_attributions_say_what_was_expected(changes, error, message):
    given = {"transcoder": coder(), "acts": ACTS, "layer": 2, "latent": 0, **changes}
    with pytest.raises(error, match=f"^{re.escape(f'cross_layer_attribution: {message}')}$"):
        cross_layer_attribution(**given)


@pytest.mark.parametrize(
    ("latents", "error", "message"),
    [
        (torch.tensor([0, F]), ValueError, "expected a latent in 0..8, got 9"),
        (torch.tensor(3), ValueError, "expected latents to be [a], got []"),
        (torch.arange(2).int(), TypeError, "expected latents to be int64, got torch.int32"),
        (torch.arange(2, device="meta"), ValueError, "expected latents on cpu, got meta"),
    ],
)
def test_errors_of_virtual_weights_say_what_was_expected(latents, error, message):
    with pytest.raises(error, match=f"^{re.escape(f'virtual_weights: {message}')}$"):
        virtual_weights(coder(), 1, latents)
