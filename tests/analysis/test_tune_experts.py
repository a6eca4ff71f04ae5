"""Experts switched off and forced on, in every family; rankings of experts and of latents."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastsae
from bench.tiny_models import build, example
from fastsae.analysis import (
    Activity,
    contrast,
    expert_activity,
    latent_activity,
    steer,
    tune_experts,
)
from fastsae.analysis.tune_experts import rerouted
from fastsae.models import read, resolve
from fastsae.models.mixture import find_mixtures, route

FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss",
    "granitemoe", "phimoe", "dbrx", "glm4_moe", "jamba",
)  # fmt: skip
REFUSED = {
    "llama4_text": "expected the experts of layer 0 .* got 1 arguments",
    "jetmoe": "expected the experts of layer 0 to be called as one module, got JetMoeMoA",
    "llama": "which has none",
}
TOKENS = torch.randint(3, 94, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def chosen(model):
    """Return what every router chose: numbers and weights by layer."""
    seen = {}

    def take(mixture, index, weights):
        seen[mixture.layer] = index.clone(), weights.clone()

    with route(model, find_mixtures(model), take):
        logits(model)
    return seen


def spoil(model, mixture, number):
    """Give one expert other parameters."""
    if isinstance(mixture.experts, nn.ModuleList):
        own = list(mixture.experts[number].parameters())
    else:
        own = [p.view(mixture.count, -1)[number] for p in mixture.experts.parameters()]
    with torch.no_grad():
        for p in own:
            p.mul_(-3).add_(0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_that_is_off_has_no_influence_and_its_weight_goes_to_the_others(family):
    model = build(family)
    before = chosen(model)
    layer = max(before)  # the first routing that a change of the last one leaves alone
    number = int(before[layer][0].flatten().mode().values)
    clean = logits(model)
    with tune_experts(model, off=[(layer, number)]):
        off, after = logits(model), chosen(model)
    index, weights = before[layer]
    assert torch.equal(after[layer][0], index)  # nobody is drafted
    silent = index == number
    assert 0 < int(silent.sum()) < silent.numel()
    assert not after[layer][1][silent].any()
    others = (~silent).any(1)
    torch.testing.assert_close(after[layer][1].sum(1)[others], weights.sum(1)[others])
    ratio = after[layer][1] / weights
    for row, quiet in zip(ratio, silent, strict=True):
        kept = row[~quiet]
        torch.testing.assert_close(kept, kept[:1].expand_as(kept))
    assert not torch.equal(off, clean)
    spoil(model, find_mixtures(model)[layer], number)
    assert not torch.allclose(logits(model), clean)
    with tune_experts(model, off=[(layer, number)]):
        assert torch.equal(logits(model), off)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_that_is_on_is_chosen_for_every_token(family):
    model = build(family)
    before = chosen(model)
    layer = max(before)
    counts = before[layer][0].flatten().bincount(minlength=find_mixtures(model)[layer].count)
    number = int(counts.argmin())
    with tune_experts(model, on=[(layer, number)]):
        on, after = logits(model), chosen(model)
    index, weights = after[layer]
    assert (index == number).any(1).all()
    torch.testing.assert_close(weights.sum(1), before[layer][1].sum(1))
    assert not torch.equal(on, logits(model))
    assert all(len(set(row)) == len(row) for row in index.tolist())


@pytest.mark.parametrize("family", REFUSED)
def test_other_models_are_refused(family):
    with pytest.raises(ValueError, match=f"mixture: .*{REFUSED[family]}"):
        find_mixtures(build(family))


def test_experts_that_are_not_linear_in_their_weights_are_refused():
    model = build("mixtral")
    experts = model.model.layers[2].mlp.experts
    linear = experts.forward
    experts.forward = lambda x, index, weights: linear(x, index, weights.square())
    with pytest.raises(ValueError, match=r"experts of layer 2 .* to be linear in their weights"):
        find_mixtures(model)


def test_bfloat16():
    model = build("deepseek_v3").bfloat16()
    clean = logits(model)
    with tune_experts(model, off=[(2, 1)]):
        assert not torch.equal(logits(model), clean)


def test_weights_by_hand():
    index = torch.tensor([[3, 1], [0, 2], [1, 3]])
    weights = torch.tensor([[0.75, 0.25], [1.5, 0.5], [0.5, 0.5]])
    new, w = rerouted(index, weights, off=[1], on=[])
    assert torch.equal(new, index)
    assert w.tolist() == [[1.0, 0.0], [1.5, 0.5], [0.0, 1.0]]
    new, w = rerouted(index, weights, off=[1, 3], on=[])
    assert w.tolist() == [[0.0, 0.0], [1.5, 0.5], [0.0, 0.0]]
    new, w = rerouted(index, weights, off=[], on=[2])
    assert new.tolist() == [[3, 2], [0, 2], [2, 3]]
    assert w[1:].tolist() == [[1.5, 0.5], [0.5, 0.5]]
    torch.testing.assert_close(w[0], torch.tensor([0.75, 0.5]) / 1.25)
    new, w = rerouted(index, weights, off=[3], on=[0, 2])
    assert sorted(new[0].tolist()) == sorted(new[2].tolist()) == [0, 2]
    assert new[1].tolist() == [0, 2]


def test_mixtral_with_an_expert_off_is_mixtral_by_hand():
    model = build("mixtral")
    layer, number = 3, 2
    mlp = model.model.layers[layer].mlp
    seen = {}
    handle = mlp.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    with tune_experts(model, off=[(layer, number)]):
        logits(model)
    handle.remove()
    x = seen["x"].flatten(0, 1)
    with torch.no_grad():
        p = F.softmax(x @ mlp.gate.weight.T, -1)
        top = p.topk(2)
        w = torch.zeros_like(p).scatter(1, top.indices, top.values)
        w[:, number] = 0
        w = w / w.sum(1, keepdim=True)
        gate, up = (x @ mlp.experts.gate_up_proj.transpose(1, 2)).chunk(2, -1)  # [experts, n, f]
        each = (F.silu(gate) * up) @ mlp.experts.down_proj.transpose(1, 2)
        wanted = torch.einsum("ne,end->nd", w, each)
    torch.testing.assert_close(seen["y"].flatten(0, 1), wanted, rtol=1e-4, atol=1e-5)


def test_generation_is_that_of_whole_passes():
    model = build("qwen3_moe")
    experts = {"off": [(3, 1), (2, 0)], "on": [(1, 2)]}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with tune_experts(model, **experts):
        made = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options)
        for at in range(TOKENS.shape[1], made.shape[1]):
            assert torch.equal(logits(model, made[:, :at])[:, -1].argmax(1), made[:, at])
    plain = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options)
    assert not torch.equal(plain, made)


def test_blocks_nest_and_leave_nothing_behind():
    model = build("mixtral")
    clean = logits(model)
    with tune_experts(model, off=[(3, 1)]), tune_experts(model, off=[(3, 2)]):
        nested = logits(model)
    with tune_experts(model, off=[(3, 1), (3, 2)]):
        torch.testing.assert_close(nested, logits(model))
    assert torch.equal(logits(model), clean)
    assert not torch.allclose(nested, clean)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({}, "expected experts to switch off or on, got none"),
        ({"off": [(9, 0)]}, r"expected a layer of experts \(0, 1, 2, 3\), got 9"),
        ({"on": [(1, 4)]}, r"expected an expert in 0\.\.3 of layer 1, got 4"),
        ({"off": [(1, 0)], "on": [(1, 0)]}, r"expected different experts, got \(1, 0\) twice"),
        ({"on": [(1, 0), (1, 1), (1, 2)]}, "expected at most 2 experts of layer 1 to be on"),
    ],
)
def test_wrong_experts(experts, message):
    with pytest.raises(ValueError, match=message), tune_experts(build("mixtral"), **experts):
        raise AssertionError


PROMPTS = [[1, 5, 9, 13], [1, 7, 7], [1, 20, 30, 40, 50], [1, 60], [1, 3, 4, 5]]


@pytest.mark.parametrize("how", ["weight", "rate"])
def test_expert_activity_is_that_of_each_prompt_alone(how):
    model = build("deepseek_v3")
    got = expert_activity(model, PROMPTS, how=how, batch_size=2)
    assert got.units[:5] == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]  # layer 0 is dense
    for row, ids in enumerate(PROMPTS):
        seen = {}

        def take(mixture, index, weights, seen=seen):
            seen[mixture.layer] = index.tolist(), weights.tolist()

        with route(model, find_mixtures(model), take):
            logits(model, torch.tensor([ids]))
        for unit, (layer, number) in enumerate(got.units):
            total = sum(
                (w if how == "weight" else 1)
                for index, weights in list(zip(*seen[layer], strict=True))[1:]
                for e, w in zip(index, weights, strict=True)
                if e == number
            )
            wanted = total / (len(ids) - 1)
            assert float(got.values[row, unit]) == pytest.approx(wanted, abs=1e-5)


def test_latent_activity_is_that_of_each_prompt_alone():
    model = build("mixtral")
    sae = fastsae.TopKSAE(d_in=32, d_sae=64, k=4).eval()
    site = "resid_post.1"
    value = latent_activity(model, sae, PROMPTS, site=site)
    rate = latent_activity(model, sae, PROMPTS, site=site, how="rate")
    for row, ids in enumerate(PROMPTS):
        x = read(model, [resolve(model, site)], torch.tensor([ids]))[site][0, 1:]
        f = sae.encode(x).detach().double()
        torch.testing.assert_close(value.values[row], f.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rate.values[row], (f > 0).double().mean(0))
    assert value.units == list(range(64))


def test_a_contrast_by_hand():
    units = ["a", "b", "c"]
    target = Activity(torch.tensor([[4.0, 1, 0], [6, 1, 0]]).double(), units)
    first = Activity(torch.tensor([[1.0, 1, 0], [3, 1, 4]]).double(), units)
    second = Activity(torch.tensor([[5.0, 0, 2], [5, 0, 2]]).double(), units)
    made = contrast(target, first, second)
    assert made.difference.tolist() == [5 - (2 + 5) / 2, 1 - 0.5, -2]
    assert made.activity.tolist() == pytest.approx([4, 2 / 3, 4 / 3])
    assert made.auroc.tolist() == [6 / 8, (2 / 2 + 2 / 2 + 2 + 2) / 8, (2 * 1 / 2) / 8]
    assert float(made.standardized[0]) == pytest.approx(1.5 / ((2 + 2 + 0) / 3) ** 0.5)
    assert float(made.standardized[1]) == float("inf")  # it never varies within a class
    assert made.top(1) == ["a"]
    assert made.top(2, by="standardized") == ["b", "a"]
    with pytest.raises(ValueError, match="expected by to be one of difference"):
        made.top(1, by="rank")
    with pytest.raises(ValueError, match="expected other classes"):
        contrast(target)
    with pytest.raises(ValueError, match="expected two or more prompts"):
        contrast(target, Activity(first.values[:1], units))


def test_controls_are_as_active_and_none_of_the_units():
    values = torch.arange(1.0, 41).double().expand(2, 40)
    made = contrast(Activity(values, list(range(40))), Activity(values, list(range(40))))
    for seed in range(10):
        drawn = made.controls([5, 6, 30], seed)
        assert len(set(drawn)) == 3
        assert not {5, 6, 30} & set(drawn)
        assert all(abs(a - b) <= 4 for a, b in zip(drawn, (5, 6, 30), strict=True))
    assert len({tuple(made.controls([5], seed)) for seed in range(20)}) > 1
    idle = contrast(
        Activity(torch.eye(2).double(), ["a", "b"]),
        Activity(torch.zeros(2, 2).double(), ["a", "b"]),
    )
    with pytest.raises(ValueError, match="expected 2 other active units"):
        idle.controls(["a", "b"], 0)


def test_latents_that_stand_out_are_suppressed_by_steer():
    model = build("mixtral")
    sae = fastsae.TopKSAE(d_in=32, d_sae=64, k=4).eval()
    site = "resid_post.1"
    halves = [latent_activity(model, sae, p, site=site) for p in (PROMPTS[:3], PROMPTS[3:])]
    top = contrast(*halves).top(3)
    with steer(model, sae, top, site=site, how="ablate"):
        assert not torch.equal(logits(model), logits(build("mixtral")))


def test_experts_that_are_modules_are_tuned_as_well():
    from tests.models.test_experts import mixtral

    model = mixtral()
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    clean = logits(model, tokens)
    with tune_experts(model, off=[(1, 2)]):
        off = logits(model, tokens)
    with torch.no_grad():
        for p in model.model.layers[1].mlp.experts[2].parameters():
            p.add_(1)
    assert not torch.equal(logits(model, tokens), clean)
    with tune_experts(model, off=[(1, 2)]):
        assert torch.equal(logits(model, tokens), off)
    assert example(model)["input_ids"].shape[0] == 2
