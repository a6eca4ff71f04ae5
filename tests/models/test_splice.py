"""Splicing: what is replaced, what passes through, and what it does to the loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastsae
from fastsae.eval import CrossEntropy, ablate, cross_entropy, replace, splice
from fastsae.models import read, resolve
from tests.models.tiny import FAMILIES, VOCAB, D, tiny_model

SITES = ("resid_post.1", "mlp_in.0", "mlp_out.2", "attn_z.1")
TOKENS = torch.arange(24).view(2, 12) * 7 % VOCAB
CONTEXTS = [[1, *range(5, 20)], [1, 9, 8, 7], [1, 30, 31], [1]]


class Scale(nn.Module):
    """An "SAE" that returns `scale * x` and remembers what it saw."""

    def __init__(self, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=dtype))
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        assert not self.training
        assert x.dtype == self.scale.dtype
        self.seen.append(x.clone())
        return self.scale * x


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_the_identity_changes_nothing(family, site):
    model = tiny_model(family)
    clean = logits(model)
    with splice(model, site, Scale(), drop_prefix=0):
        assert torch.equal(logits(model), clean)
    sae = Scale(2.0)
    with splice(model, site, sae):
        assert not torch.allclose(logits(model), clean)
    assert torch.equal(logits(model), clean)
    assert len(torch.cat(sae.seen)) == 2 * 11


@pytest.mark.parametrize("site", SITES)
def test_prefix_outliers_and_kept_positions_pass_through(site):
    model = tiny_model()
    found = resolve(model, site)
    x = read(model, [found], TOKENS)[site]
    norms = x.norm(dim=-1)
    keep = torch.zeros(2, 12, dtype=torch.bool)
    keep[1, 7] = True
    limit = float(norms.median())
    sae = Scale(3.0)
    with splice(model, found, sae, drop_prefix=2, max_norm=limit, keep=keep):
        logits(model)
    touched = (norms <= limit) & ~keep
    touched[:, :2] = False
    assert 0 < int(touched.sum()) < 20
    torch.testing.assert_close(torch.cat(sae.seen), x[touched])


def test_the_replacement_reaches_the_rest_of_the_model():
    model = tiny_model()
    with replace(model, "resid_post.0", lambda x: x * 0 + 5, drop_prefix=1):
        x = read(model, [resolve(model, "model.layers.1:in")], TOKENS)["model.layers.1:in"]
    assert (x[:, 1:] == 5).all()
    assert not (x[:, :1] == 5).any()


def test_ablations():
    model = tiny_model()
    after = resolve(model, "model.layers.1:in")
    mean = torch.arange(D).float()
    with ablate(model, "resid_post.0", "mean", mean=mean, drop_prefix=0):
        assert torch.equal(read(model, [after], TOKENS)[after.name], mean.expand(2, 12, D))
    with ablate(model, "resid_post.0", "zero", drop_prefix=0):
        assert not read(model, [after], TOKENS)[after.name].any()
    with (
        pytest.raises(ValueError, match="expected 'mean' or 'zero', got 'noise'"),
        ablate(model, "resid_post.0", "noise"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"expected mean \[d\] for 'mean', got None"),
        ablate(model, "resid_post.0", "mean"),
    ):
        pass


def test_an_error_inside_takes_the_hook_off_and_restores_the_mode():
    model, sae = tiny_model(), Scale().train()
    with pytest.raises(KeyError), splice(model, "resid_post.0", sae):
        raise KeyError
    assert sae.training
    assert not model.model.layers[0]._forward_hooks


def test_an_sae_of_another_dtype():
    model = tiny_model()
    with splice(model, "resid_post.0", Scale(1.0, torch.float64)):
        torch.testing.assert_close(logits(model), logits(model))


def by_hand(model):
    """Return the mean loss over predictions made from position 1 on, one context at a time."""
    losses = []
    for ids in CONTEXTS:
        if len(ids) > 2:
            with torch.no_grad():
                out = model(input_ids=torch.tensor([ids])).logits[0].double()
            losses.append(F.cross_entropy(out[1:-1], torch.tensor(ids[2:]), reduction="none"))
    return float(torch.cat(losses).mean()), len(torch.cat(losses))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_cross_entropy_equals_the_loss_by_hand(batch_size):
    model = tiny_model()
    ce = cross_entropy(model, "resid_post.1", Scale(), CONTEXTS, batch_size=batch_size)
    clean, tokens = by_hand(model)
    assert ce.tokens == tokens == 14 + 2 + 1
    assert ce.clean == pytest.approx(clean, rel=1e-6)
    assert ce.sae == pytest.approx(ce.clean, abs=1e-6)
    assert ce.delta == pytest.approx(0, abs=1e-6)
    assert ce.fraction_recovered_mean == pytest.approx(1, abs=1e-5)
    with ablate(model, "resid_post.1", "zero"):
        zero, _ = by_hand(model)
    assert ce.zero == pytest.approx(zero, rel=1e-6)
    rows = [
        read(model, [resolve(model, "resid_post.1")], torch.tensor([ids]))["resid_post.1"][0, 1:]
        for ids in CONTEXTS
    ]
    with ablate(model, "resid_post.1", "mean", mean=torch.cat(rows).mean(0)):
        mean, _ = by_hand(model)
    assert ce.mean == pytest.approx(mean, rel=1e-5)


def test_a_given_mean_is_used_and_progress_counts_contexts():
    model, seen = tiny_model(), []
    mean = torch.zeros(D)
    ce = cross_entropy(
        model, "resid_post.1", Scale(0.0), CONTEXTS, mean=mean, batch_size=3, progress=seen.append
    )
    assert sum(seen) == 4 * len(CONTEXTS)
    assert ce.mean == pytest.approx(ce.zero)
    assert ce.sae == pytest.approx(ce.zero)
    assert ce.fraction_recovered_zero == pytest.approx(0, abs=1e-6)


def test_outliers_pass_through_in_every_intervention():
    model = tiny_model()
    site, sae = "resid_post.1", Scale(9.0)
    ce = cross_entropy(model, site, sae, CONTEXTS, max_norm=0.0, mean=torch.ones(D))
    assert ce.sae == ce.mean == ce.zero == pytest.approx(ce.clean)
    with pytest.raises(ValueError, match=r"of at most max_norm = 0\.0 at resid_post\.1, got none"):
        cross_entropy(model, site, sae, CONTEXTS, max_norm=0.0)


def test_fractions():
    ce = CrossEntropy(clean=2.0, sae=3.0, mean=6.0, zero=12.0, tokens=9)
    assert ce.delta == 1.0
    assert ce.fraction_recovered_mean == 0.75
    assert ce.fraction_recovered_zero == 0.9
    assert ce.to_dict() == {
        "clean": 2.0, "sae": 3.0, "mean": 6.0, "zero": 12.0, "tokens": 9, "delta": 1.0,
        "fraction_recovered_mean": 0.75, "fraction_recovered_zero": 0.9,
    }  # fmt: skip


def test_contexts_too_short_to_predict_are_an_error():
    with pytest.raises(ValueError, match="a context of at least 3 tokens, got none"):
        cross_entropy(tiny_model(), "resid_post.1", Scale(), [[1, 2], [1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transcoder_replaces_the_mlp(family):
    """What two hooks set by hand do: the MLP's output is the transcoder of its input."""
    model = tiny_model(family)
    torch.manual_seed(1)
    coder = fastsae.Transcoder(16, 16, 64, k=4, skip=True).eval()
    with torch.no_grad():
        for p in coder.parameters():
            p.normal_()
    mlp = resolve(model, "mlp_out.1").module

    def by_hand(module, args, output):
        new = output.clone()
        new[:, 1:] = coder(args[0][:, 1:])
        return new

    with torch.no_grad():
        clean = model(input_ids=TOKENS).logits
        handle = mlp.register_forward_hook(by_hand)
        wanted = model(input_ids=TOKENS).logits
        handle.remove()
        with splice(model, ("mlp_in.1", "mlp_out.1"), coder):
            got = model(input_ids=TOKENS).logits
    torch.testing.assert_close(got, wanted)
    assert not torch.allclose(got, clean)


def test_what_cannot_be_spliced_is_refused():
    model, coder = tiny_model(), fastsae.Transcoder(16, 16, 64, k=4)
    message = r"expected \(SITE_READ, SITE_REPLACED\) for Transcoder, got mlp_out.1"
    with pytest.raises(ValueError, match=message), splice(model, "mlp_out.1", coder):
        pass
    sae = fastsae.TopKSAE(16, 64, k=4)
    two = ("mlp_in.1", "mlp_out.1")
    with pytest.raises(ValueError, match="expected one site for TopKSAE"), splice(model, two, sae):
        pass
    crosscoder = fastsae.TopKCrossCoder(16, 2, 64, 4)
    message = "expected an SAE that reads one site, got TopKCrossCoder, which reads 2"
    with pytest.raises(ValueError, match=message), splice(model, two, crosscoder):
        pass
    narrow = fastsae.Transcoder(16, 8, 64, k=4)
    message = r"expected \[22, 16\] for the rows of mlp_out.1, got \[22, 8\]"
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=message),
        splice(model, two, narrow),
    ):
        model(input_ids=TOKENS)
    message = "expected mlp_in.2 to be reached before mlp_out.1"
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=message),
        splice(model, ("mlp_in.2", "mlp_out.1"), coder),
    ):
        model(input_ids=TOKENS)


def test_cross_entropy_of_a_transcoder_is_that_of_hooks_set_by_hand():
    model = tiny_model()
    torch.manual_seed(1)
    coder = fastsae.Transcoder(16, 16, 64, k=4).eval()
    sites = ("mlp_in.1", "mlp_out.1")
    result = cross_entropy(model, sites, coder, TOKENS.tolist(), drop_prefix=1)
    mlp = resolve(model, "mlp_out.1").module
    rows = read(model, [resolve(model, "mlp_out.1")], TOKENS)["mlp_out.1"][:, 1:]
    mean = rows.reshape(-1, 16).mean(0)

    def loss(change):
        handle = mlp.register_forward_hook(
            lambda module, args, out: torch.cat([out[:, :1], change(args[0], out)[:, 1:]], 1)
        )
        with torch.no_grad():
            logits = model(input_ids=TOKENS).logits[:, 1:-1]
        handle.remove()
        return float(F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 2:].flatten()))

    assert result.sae == pytest.approx(loss(lambda x, out: coder(x)), rel=1e-5)
    assert result.mean == pytest.approx(loss(lambda x, out: mean.expand_as(out)), rel=1e-5)
    assert result.zero == pytest.approx(loss(lambda x, out: 0 * out), rel=1e-5)
    assert result.clean == pytest.approx(loss(lambda x, out: out), rel=1e-5)
