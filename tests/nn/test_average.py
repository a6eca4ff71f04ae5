"""Averages of fine-tunes: what they hold, what is refused, and that nothing is changed."""

import copy
import math

import pytest
import torch

from fastsae.nn import BatchTopKSAE, FeatureChoiceSAE, TopKSAE
from fastsae.nn.average import average_saes


def make(cls=TopKSAE, seed=0, d_in=12, d_sae=40, k=4, **arguments):
    torch.manual_seed(seed)
    return cls(d_in, d_sae, k, **arguments)


@torch.no_grad()
def tuned(sae, seed, size=0.05):
    """A copy whose parameters have moved a little."""
    g = torch.Generator().manual_seed(seed)
    moved = copy.deepcopy(sae)
    for p in moved.parameters():
        p.add_(size * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))
    moved.normalize_decoder_()
    return moved


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE, FeatureChoiceSAE])
def test_the_average_of_one_is_that_one(cls, count):
    sae = tuned(make(cls), 1)
    sae.loss(torch.randn(50, 12))
    merged = average_saes([sae] * count)
    assert type(merged) is cls
    assert not merged.training
    assert merged.config() == sae.config()
    torch.testing.assert_close(merged.state_dict(), sae.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_are_averaged_and_decoder_rows_normalised(dtype):
    base = make(dtype=dtype)
    parts = [tuned(base, seed) for seed in (1, 2, 3)]
    merged = average_saes(parts)
    for name, p in merged.named_parameters():
        want = torch.stack([part.get_parameter(name).double() for part in parts]).mean(0)
        if name == "W_dec":
            want = want / want.norm(dim=1, keepdim=True)
        torch.testing.assert_close(p.detach(), want.to(dtype))
        assert p.stride() == base.get_parameter(name).stride()
        assert p.requires_grad


@pytest.mark.parametrize("cls", [BatchTopKSAE, FeatureChoiceSAE])
def test_thresholds_are_averaged_and_infinite_ones_stay(cls):
    base = make(cls)
    parts = [tuned(base, seed) for seed in (1, 2)]
    parts[0].threshold.fill_(1.0)
    assert (average_saes(parts).threshold == math.inf).all()
    parts[1].threshold.fill_(4.0)
    assert (average_saes(parts).threshold == 2.5).all()


def test_other_buffers_are_those_of_the_first():
    parts = [tuned(make(FeatureChoiceSAE), seed) for seed in (1, 2)]
    parts[0].batches_seen.fill_(3)
    parts[1].batches_seen.fill_(5)
    assert average_saes(parts).batches_seen == 3


def test_an_average_with_estimated_thresholds_encodes_like_any():
    base = make(BatchTopKSAE)
    x = torch.randn(600, 12)
    merged = average_saes([tuned(base, seed) for seed in (1, 2)])
    merged.estimate_threshold_(x.split(100))
    assert merged.encode_sparse(x).l0() == pytest.approx(4, rel=0.1)


def test_the_sources_stay_as_they_are():
    parts = [tuned(make(BatchTopKSAE), seed) for seed in (1, 2)]
    before = copy.deepcopy([part.state_dict() for part in parts])
    merged = average_saes(parts)
    with torch.no_grad():
        for t in merged.state_dict().values():
            t.fill_(7)
    for part, held in zip(parts, before, strict=True):
        assert part.training
        assert all(torch.equal(t, held[name]) for name, t in part.state_dict().items())


def test_what_is_no_fine_tune_of_the_same_is_refused():
    message = (
        r"^average_saes: expected fine-tunes .* > 0\.5, got -?0\.\d+ for saes\[2\]; [^\n]*order$"
    )
    sae = make()
    with pytest.raises(ValueError, match=message):
        average_saes([sae, tuned(sae, 1), make(seed=1)])
    # The same function, with its latents in another order.
    order = torch.arange(40).roll(1)
    permuted = copy.deepcopy(sae)
    permuted.W_enc, permuted.b_enc = sae.W_enc[:, order].detach(), sae.b_enc[order].detach()
    permuted.W_dec = sae.W_dec[order].detach()
    x = torch.randn(20, 12)
    torch.testing.assert_close(permuted(x), sae(x))
    with pytest.raises(ValueError, match=message):
        average_saes([sae, sae, permuted])
    permuted.W_dec.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"got nan for saes\[1\]"):
        average_saes([sae, permuted])


def test_another_class_or_config_is_refused():
    with pytest.raises(ValueError, match=r"^average_saes: expected at least one SAE, got none$"):
        average_saes([])
    with pytest.raises(
        TypeError, match=r"^average_saes: expected every item to be an SAE, got Linear$"
    ):
        average_saes([make(), torch.nn.Linear(2, 2)])
    message = r"^average_saes: expected SAEs of one class, TopKSAE, got BatchTopKSAE for saes\[1\]$"
    with pytest.raises(ValueError, match=message):
        average_saes([make(), make(BatchTopKSAE)])
    for arguments, found in (({"k": 5}, "k = 4, got 5"), ({"d_sae": 41}, "d_sae = 40, got 41")):
        with pytest.raises(
            ValueError, match=f"^average_saes: expected SAEs of one config, {found} for"
        ):
            average_saes([make(), make(**arguments)])
