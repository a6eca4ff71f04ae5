"""Effect curves find a planted effect, its size, none in controls, and say how sure they are."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastsae.analysis import effect_curve, firing, steer
from fastsae.analysis.bootstrap import interval
from fastsae.eval import cross_entropy
from fastsae.nn import TopKSAE
from tests.models.tiny import D, tiny_model

WIDTH, WORDS, TARGET, LATENT = 16, 24, 5, 7
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Planted(nn.Module):
    """Logits g(first token) (embedding + 0) U: a push v moves logit i by g v . U[i], exactly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.block = nn.Identity()
        self.unembed = nn.Linear(WIDTH, WORDS, bias=False)
        self.gain = torch.rand(WORDS) + 0.5
        self.eval().requires_grad_(False)
        # Tokens do not live where the unembedding of the target reads.
        axis = torch.zeros(WIDTH)
        axis[0] = 1.0
        self.unembed.weight[TARGET] = 3 * axis
        self.embed.weight[:, 0] = 0

    def forward(self, input_ids, attention_mask=None):
        x = self.block(self.embed(input_ids))
        return SimpleNamespace(logits=self.gain[input_ids[:, :1], None] * self.unembed(x))


def planted() -> tuple[Planted, TopKSAE]:
    """Return a model and an SAE whose latent writes 0.8 along the target and 0.6 across; of the
    others some write a little along it with either sign, on average nothing."""
    model = Planted()
    torch.manual_seed(3)
    sae = TopKSAE(WIDTH, 41, k=6)
    with torch.no_grad():
        sae.W_dec[:, 0] = torch.linspace(-0.05, 0.05, 41)[torch.randperm(41)]
        sae.W_dec[:, 0] -= sae.W_dec[LATENT, 0] / 41
        sae.W_dec[LATENT] = 0
        sae.W_dec[LATENT, :2] = torch.tensor([0.8, 0.6])
    return model, sae


def prompts(n: int, length: int = 5, seed: int = 0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(WORDS, (length + i % 3,), generator=g).tolist() for i in range(n)]


def test_a_planted_effect_has_the_slope_that_is_known():
    model, sae = planted()
    slope = 3 * 0.8 * float(model.gain.mean())  # over all first tokens
    strengths = [-2.0, 0.0, 1.0, 4.0]
    curve = effect_curve(
        model, sae, LATENT, prompts(60), [TARGET], strengths, site="block", contexts=prompts(40),
        controls=10, match="norm",
    )  # fmt: skip
    rows = curve.of("latent", "logit")
    assert [row.strength for row in rows] == strengths
    gains = torch.tensor([float(model.gain[ids[0]]) for ids in prompts(60)])
    for row in rows:
        exact = row.strength * 3 * 0.8 * float(gains.mean())
        assert row.value == pytest.approx(exact, rel=1e-4, abs=1e-6)
        assert row.low <= row.strength * slope <= row.high
        assert row.n == 60
    width = rows[3].high - rows[3].low
    assert width == pytest.approx(2 * 1.96 * 4 * 2.4 * float(gains.std()) / math.sqrt(60), rel=0.2)
    assert LATENT not in curve.controls
    assert len(set(curve.controls)) == 10
    for row in curve.of("control", "logit"):
        assert abs(row.value) <= 0.02 * 3 * 4
        assert row.low <= 0 <= row.high
    each = [r for r in curve.rows if r.direction == "control" and r.latent is not None]
    assert {r.latent for r in each} == set(curve.controls)
    norm = float(sae.W_dec[LATENT].detach().norm())
    for row in each:
        if row.measure == "logit":
            W = sae.W_dec[row.latent].detach()
            push = row.strength * norm * float(W[0] / W.norm())
            assert row.value == pytest.approx(push * 3 * float(gains.mean()), rel=1e-3, abs=1e-6)


def test_every_measure_of_no_change_is_zero_and_the_clean_ones_are_the_models():
    model, sae = planted()
    given, text = prompts(9), prompts(7, 6, seed=1)
    curve = effect_curve(
        model, sae, LATENT, given, [TARGET, 9], [0.0, 3.0], site="block", contexts=text, controls=3,
        match="norm", batch_size=4, contrast=(prompts(4, seed=2), prompts(4, seed=3)),
    )  # fmt: skip
    assert {row.measure for row in curve.rows} == {"logit", "log_probability", "cross_entropy"}
    for row in curve.rows:
        if row.strength == 0:
            assert (row.value, row.low, row.high) == (0, 0, 0)
    last = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in given])
    assert curve.clean["logit"] == pytest.approx(float(last[:, [TARGET, 9]].mean()), rel=1e-5)
    chance = last.softmax(1)[:, [TARGET, 9]].sum(1).log().mean()
    assert curve.clean["log_probability"] == pytest.approx(float(chance), rel=1e-5)
    clean = cross_entropy(model, "block", sae, text)
    assert curve.clean["cross_entropy"] == pytest.approx(clean.clean, rel=1e-5)
    total = 0.0
    for ids in text:
        x = torch.tensor([ids])
        with torch.no_grad(), steer(model, sae, LATENT, site="block", strength=3.0):
            got = model(x).logits[0, 1:-1]
        total += float(nn.functional.cross_entropy(got, x[0, 2:], reduction="sum"))
    steered = total / sum(len(ids) - 2 for ids in text)
    (row,) = (r for r in curve.of("latent", "cross_entropy") if r.strength == 3)
    assert row.value == pytest.approx(steered - clean.clean, rel=1e-4)
    assert row.low < row.value < row.high
    assert json.loads(json.dumps(curve.to_dict()))["rows"][0]["direction"] == "latent"


def test_the_difference_of_means_is_pushed_along_at_the_norm_of_the_latent():
    model, sae = planted()
    with torch.no_grad():
        sae.W_dec[LATENT] *= 2.5
    a, b = prompts(5, seed=4), prompts(5, seed=5)
    curve = effect_curve(
        model, sae, LATENT, prompts(6), [3], [2.0], site="block", controls=0, contrast=(a, b)
    )
    means = [model.embed.weight[[i for ids in x for i in ids[1:]]].mean(0) for x in (a, b)]
    v = (means[0] - means[1]) / (means[0] - means[1]).norm() * 2.5
    gain = sum(float(model.gain[ids[0]]) for ids in prompts(6)) / 6
    (row,) = curve.of("difference", "logit")
    assert row.value == pytest.approx(2 * gain * float(v @ model.unembed.weight[3]), rel=1e-4)
    assert row.latent is None


def test_controls_matched_by_rate_fire_as_often():
    model, sae = planted()
    text = prompts(40)
    rate = firing(model, sae, text, site="block").rate
    latent = int(rate.argsort()[len(rate) // 2])
    curve = effect_curve(
        model, sae, latent, prompts(2), [3], [1.0], site="block", contexts=text, controls=3, seed=1
    )
    far = (rate.log() - rate[latent].log()).abs()
    assert float(far[curve.controls].max()) <= float(far.sort().values[12])
    same = effect_curve(
        model, sae, latent, prompts(2), [3], [1.0], site="block", contexts=text, controls=3, seed=1
    )
    assert same == curve
    others = [
        effect_curve(model, sae, latent, prompts(2), [3], [], site="block", contexts=text,
                     controls=3, seed=seed).controls
        for seed in range(4)
    ]  # fmt: skip
    assert any(drawn != curve.controls for drawn in others)


@pytest.mark.parametrize("samples", [0, 20])
def test_rates_are_those_of_generated_tokens(samples):
    model = tiny_model()
    sae = TopKSAE(D, 40, k=6)
    with torch.no_grad():
        sae.W_dec[LATENT] = model.lm_head.weight[TARGET] / model.lm_head.weight[TARGET].norm()
    given = [[1, 9, 8, 7], [1, 30, 2, 50, 11, 3], [1, 4]]
    curve = effect_curve(
        model, sae, LATENT, given, [TARGET], [0.0, 200.0], site="resid_post.2", controls=1,
        match="norm", new_tokens=4, samples=samples, batch_size=2,
    )  # fmt: skip
    nothing, much = curve.of("latent", "rate")
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    if samples:  # so strong a push leaves nothing else of the residual stream
        with torch.no_grad():
            chances = model.lm_head(model.model.norm(sae.W_dec[LATENT])).softmax(0)
        assert 0.3 < chances[TARGET] < 0.9
        assert much.value + curve.clean["rate"] == pytest.approx(float(chances[TARGET]), abs=0.1)
        return
    shares = []
    with steer(model, sae, LATENT, site="resid_post.2", strength=200.0):
        for ids in given:
            x = torch.tensor([ids])
            out = model.generate(x, attention_mask=torch.ones_like(x), **options)[0, -4:]
            shares.append(float((out == TARGET).double().mean()))
    assert much.value == pytest.approx(sum(shares) / 3 - curve.clean["rate"])


def test_other_words_give_the_latent_and_controls_the_same_strength():
    model, sae = planted()
    text = prompts(30)
    for how in ("scale", "clamp"):
        curve = effect_curve(
            model, sae, LATENT, prompts(5), [3], [2.0], site="block", how=how, contexts=text,
            controls=2,
        )  # fmt: skip
        for row in curve.rows:
            if row.measure != "logit" or row.latent is None:
                continue
            moved = 0.0
            for ids in prompts(5):
                x = torch.tensor([ids])
                with (
                    torch.no_grad(),
                    steer(model, sae, row.latent, site="block", how=how, strength=2.0),
                ):
                    got = model(x).logits[0, -1, 3]
                moved += float(got - model(x).logits[0, -1, 3]) / 5
            assert row.value == pytest.approx(moved, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("controls", [1, 12])
def test_intervals_hold_the_truth_about_as_often_as_they_say(controls):
    """Of normal numbers, those of controls around a mean of each."""
    g = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(200):
        mean = torch.randn(controls, 1, generator=g, dtype=torch.float64) if controls > 1 else 0
        weights = torch.randint(1, 4, (40,), generator=g).double()
        noise = torch.randn(controls, 40, generator=g, dtype=torch.float64)
        low, high = interval((mean + noise) * weights, weights, 300, 0.9, seed)
        hits += low <= 0 <= high
    assert 0.8 <= hits / 200 <= 0.96


REFUSED = {
    "how": ({"how": "ablate"}, r"expected how to be add, scale or clamp, got 'ablate'"),
    "contrast": ({"how": "clamp", "contrast": ([[1, 2]], [[1, 3]])},
                 r"expected contrast only for 'add', got one for 'clamp'"),
    "prompt": ({"prompts": [[1, 2], [1]]}, r"expected prompts of at least 2 tokens, got 1"),
    "targets": ({"targets": []}, r"expected prompts and targets, got 1 and 0 of them"),
    "negative": ({"targets": [3, -1]}, r"expected targets to be token ids, got -1"),
    "strengths": ({"strengths": [math.inf]}, r"expected strengths to be finite, got \[inf\]"),
    "same": ({"contrast": ([[1, 2]], [[1, 2]])},
             r"expected contrast to differ in its means, got the same"),
    "latent": ({"latent": 41}, r"expected a latent in 0\.\.40, got 41"),
    "confidence": ({"confidence": 95}, r"expected 0 < confidence < 1, got 95"),
    "match": ({"match": "size"}, r"expected match to be rate or norm, got 'size'"),
    "contexts": ({"match": "rate", "contexts": ()},
                 r"expected contexts, or match 'norm', got match 'rate' alone"),
    "controls": ({"controls": 50}, r"expected 50 other latents of a positive norm .*, got 40"),
    "silent": ({"match": "rate"}, r"expected a latent of a positive rate, got 7 with 0"),
    "empty": ({"contrast": ([[1]], [[1, 3]])}, r"expected contrast with a token to read, got none"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_in_one_line(case):
    options, message = REFUSED[case]
    model, sae = planted()
    with torch.no_grad():
        sae.b_enc[LATENT] = -100
    given = {"latent": LATENT, "prompts": [[1, 2]], "targets": [3], "strengths": [1.0]}
    given |= {"contexts": prompts(5), "match": "norm", "site": "block", **options}
    with pytest.raises(ValueError, match=rf"^effect_curve: {message}$"):
        effect_curve(model, sae, **given)
    assert not model.block._forward_hooks
