"""Strengths, effects and scores of interventions against passes made by hand."""

from __future__ import annotations

import pytest
import torch

from fastsae.interpret import Effect, Intervention, effect_explainer
from fastsae.interpret.intervention import ASKED
from fastsae.interpret.scores import log_probability
from fastsae.models import replace
from fastsae.nn import TopKSAE
from tests.models.tiny import VOCAB, D, tiny_model

SITE = "resid_post.1"
PROMPTS = [[1, 5, 9, 20], [1, 7], [1, 30, 31, 32, 33, 34]]


@pytest.fixture(scope="module")
def made():
    model = tiny_model("llama")
    torch.manual_seed(3)
    return model, TopKSAE(D, 32, k=4)


def next_tokens(model, sae, latent, strength):
    """Return log-probabilities after each prompt, one pass each, without padding."""
    out = []
    for ids in PROMPTS:
        keep = torch.ones(1, len(ids), dtype=torch.bool)
        keep[0, -1] = False
        push = strength * sae.W_dec[latent]
        with torch.no_grad(), replace(model, SITE, lambda x, push=push: x + push, keep=keep):
            out.append(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(0))
    return torch.stack(out)


@pytest.mark.parametrize("kl", [0.05, 0.5])
def test_the_strength_gives_the_divergence(made, kl):
    model, sae = made
    for latent in (0, 9):
        found = Intervention(model, sae, SITE, PROMPTS, kl=kl, batch_size=2).effect(latent, n=5)
        clean = next_tokens(model, sae, latent, 0.0)
        steered = next_tokens(model, sae, latent, found.strength)
        true = float((clean.exp() * (clean - steered)).sum(1).mean())
        assert true == pytest.approx(kl, rel=0.11)
        assert found.kl == pytest.approx(true, rel=1e-3)
        rise = steered.exp() - clean.exp()
        assert found.raised == rise.topk(5, dim=1).indices.tolist()


def test_a_latent_that_does_nothing_has_no_effect(made):
    model, _ = made
    sae = TopKSAE(D, 32, k=4)
    with torch.no_grad():
        sae.W_dec[2] = 0
    assert Intervention(model, sae, SITE, PROMPTS).effect(2) is None


def test_a_token_that_a_model_rules_out_does_not_matter(made):
    model, sae = made
    never = model.lm_head.register_forward_hook(
        lambda _, args, out: out.index_fill(-1, torch.tensor([3]), -torch.inf)
    )
    try:
        found = Intervention(model, sae, SITE, PROMPTS, kl=0.2).effect(9)
        clean, steered = (next_tokens(model, sae, 9, by) for by in (0.0, found.strength))
    finally:
        never.remove()
    rest = torch.arange(VOCAB) != 3
    kl = torch.nn.functional.kl_div(
        steered[:, rest], clean[:, rest], log_target=True, reduction="none"
    )
    assert found.kl == pytest.approx(float(kl.sum(1).mean()), rel=1e-3)
    assert found.kl == pytest.approx(0.2, rel=0.11)


class Tokens:
    """Words of one character each."""

    def __call__(self, text, add_special_tokens=True):
        ids = [3 + ord(c) % (VOCAB - 3) for c in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def decode(ids):
    return "".join(chr(97 + i % 26) for i in ids)


def test_the_score_is_what_steered_texts_say_more_of(made):
    model, sae = made
    scorer = tiny_model("gpt2")
    intervention = Intervention(model, sae, SITE, PROMPTS, new_tokens=3, batch_size=2)
    strength = intervention.effect(0).strength
    got = intervention.score(0, "fox", strength, scorer, Tokens(), decode)
    gains = []
    for ids in PROMPTS:
        texts = []
        for by in (0.0, strength):
            out = list(ids)
            for step in range(3):
                keep = torch.ones(1, len(out), dtype=torch.bool)
                keep[0, len(ids) - 1 :] = False
                push = by * sae.W_dec[0]
                with torch.no_grad(), replace(model, SITE, lambda x, p=push: x + p, keep=keep):
                    out.append(int(model(torch.tensor([out])).logits[0, -1].argmax()))
                assert len(out) == len(ids) + step + 1
            texts.append(decode(out[len(ids) :]) + ASKED)
        clean, steered = (log_probability(scorer, Tokens(), text, "fox") for text in texts)
        gains.append(steered - clean)
    assert got == pytest.approx(sum(gains) / len(gains), abs=1e-4)
    assert any(gains)


def test_log_probability_is_a_sum_over_tokens():
    scorer = tiny_model("gpt2")
    ids = [1, *Tokens()("ab", add_special_tokens=False)["input_ids"]]
    more = Tokens()("cd", add_special_tokens=False)["input_ids"]
    total = 0.0
    for token in more:
        with torch.no_grad():
            total += float(scorer(torch.tensor([ids])).logits[0, -1].double().log_softmax(0)[token])
        ids.append(token)
    assert log_probability(scorer, Tokens(), "ab", "cd") == pytest.approx(total, abs=1e-5)


def test_an_effect_is_explained_by_what_becomes_likelier():
    asked = []

    def client(messages):
        asked.append(messages[1]["content"])
        return "EXPLANATION: more of it"

    explain = effect_explainer(client)
    effect = Effect(1.0, 0.5, [[0, 1], [2, 3]])
    assert explain(effect, [[5, 6], [7]], decode) == "more of it"
    assert asked == [
        "Prompt ends: fg\nMore likely: 'a', 'b'\n\nPrompt ends: h\nMore likely: 'c', 'd'"
    ]


def test_what_is_wrong_is_one_line(made):
    with pytest.raises(ValueError, match="expected prompts of two or more tokens"):
        Intervention(*made, SITE, [[1]])
    with pytest.raises(ValueError, match="expected kl > 0, got 0"):
        Intervention(*made, SITE, PROMPTS, kl=0)
