"""Single experts: their rows belong to the tokens routed to them; fused ones are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastsae.data import ActivationStore, harvest, stream
from fastsae.models import check_sites, describe, read, replace, resolve, splice
from fastsae.models.experts import places_of
from tests.models.tiny import DOCUMENTS, VOCAB, CharTokenizer, D

TOKENS = torch.randint(3, VOCAB, (3, 14), generator=torch.Generator().manual_seed(2))
EXPERTS, CHOSEN = 4, 2


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 24), nn.Linear(24, D)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


class ListedExperts(nn.ModuleList):
    """Experts as modules, which are called like the fused ones of transformers."""

    def forward(self, x, chosen, weights):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self):
            tokens, place = torch.where(chosen == number)
            if len(tokens):
                out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, place, None])
        return out


def mixtral(listed=True):
    import transformers as hf

    torch.manual_seed(0)
    config = hf.MixtralConfig(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    model = hf.MixtralForCausalLM(config).eval()
    if listed:
        for layer in model.model.layers:
            layer.mlp.experts = ListedExperts(Expert() for _ in range(EXPERTS))
    return model


@pytest.fixture(scope="module")
def model():
    return mixtral()


def by_hand(model, layer, tokens):
    """Return what enters the mixture of a layer, and the experts that its router chooses."""
    x = read(model, [resolve(model, f"mlp_in.{layer}")], tokens)[f"mlp_in.{layer}"].flatten(0, 1)
    logits = x @ model.model.layers[layer].mlp.gate.weight.T
    return x, logits.topk(CHOSEN).indices


@pytest.mark.parametrize("number", range(EXPERTS))
def test_rows_are_what_the_expert_makes_of_the_tokens_routed_to_it(model, number):
    name = f"expert.1.{number}"
    with torch.no_grad():
        x, chosen = by_hand(model, 1, TOKENS)
        routed = (chosen == number).any(1)
        wanted = model.model.layers[1].mlp.experts[number](x[routed])
    got = read(model, [resolve(model, name)], TOKENS)[name]
    assert got.shape == (3, 14, D)
    assert 0 < int(routed.sum()) < len(x)
    assert torch.equal(~got.flatten(0, 1).isnan().any(1), routed)
    torch.testing.assert_close(got.flatten(0, 1)[routed], wanted)
    report = check_sites(model, name)[name]
    assert report.ok
    assert report.causal
    assert report.identity


def test_all_experts_at_once_add_up_to_the_mixture(model):
    names = [f"expert.0.{i}" for i in range(EXPERTS)]
    sites = [resolve(model, name) for name in [*names, "mlp_in.0", "mlp_out.0"]]
    got = read(model, sites, TOKENS)
    logits = got["mlp_in.0"] @ model.model.layers[0].mlp.gate.weight.T
    top = logits.softmax(-1).topk(CHOSEN)
    weight = torch.zeros_like(logits).scatter(-1, top.indices, top.values)
    weight = weight / weight.sum(-1, keepdim=True)
    total = sum(weight[..., i : i + 1] * got[name].nan_to_num() for i, name in enumerate(names))
    torch.testing.assert_close(total, got["mlp_out.0"], rtol=1e-4, atol=1e-5)


def test_an_expert_that_no_token_is_routed_to(model):
    one = TOKENS[:1, :1]
    with torch.no_grad():
        _, chosen = by_hand(model, 0, one)
    for number in range(EXPERTS):
        name = f"expert.0.{number}"
        x = read(model, [resolve(model, name)], one)[name]
        assert x.shape == (1, 1, D)
        assert bool(x.isnan().all()) == (number not in chosen.tolist()[0])
        with replace(model, name, lambda rows: rows + 1, drop_prefix=0):
            model(input_ids=one)


def test_replacing_changes_the_rows_of_one_expert(model):
    name = "expert.0.2"
    site = resolve(model, name)
    seen = []

    def zero(rows):
        seen.append(rows.clone())
        return rows * 0

    with torch.no_grad():
        clean = model(input_ids=TOKENS).logits
        with replace(model, name, zero, drop_prefix=0):
            gone = model(input_ids=TOKENS).logits
        weight = model.model.layers[0].mlp.experts[2].down
        kept = [p.clone() for p in weight.parameters()]
        for p in weight.parameters():
            p.zero_()
        wanted = model(input_ids=TOKENS).logits
        for p, old in zip(weight.parameters(), kept, strict=True):
            p.copy_(old)
        with splice(model, site, nn.Identity(), drop_prefix=0):
            assert torch.equal(model(input_ids=TOKENS).logits, clean)
    torch.testing.assert_close(gone, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(gone, clean)
    x = read(model, [site], TOKENS)[name].flatten(0, 1)
    assert torch.equal(torch.cat(seen), x[~x.isnan().any(1)])


def test_harvests_and_streams_have_the_rows_of_the_expert_only(model, tmp_path):
    name = "expert.1.1"
    small = {"context": 20, "batch_size": 3}
    manifest = harvest(
        model, CharTokenizer(), DOCUMENTS, name, tmp_path, dtype="float32", val_fraction=0,
        max_norm_ratio=100.0, **small,
    )  # fmt: skip
    store = ActivationStore(tmp_path)
    assert len(store) + manifest.dropped["elsewhere"] == sum(map(len, DOCUMENTS))
    assert 0 < manifest.dropped["elsewhere"] < sum(map(len, DOCUMENTS))
    assert manifest.dropped["norm"] == 0
    rows, tokens = store.rows(), store.token_ids()
    assert rows.isfinite().all()
    first = CharTokenizer()(DOCUMENTS[0], add_special_tokens=False)["input_ids"][:19]
    ids = torch.tensor([[1, *first]])
    with torch.no_grad():
        x, chosen = by_hand(model, 1, ids)
        routed = (chosen == 1).any(1)
        routed[0] = False
        wanted = model.model.layers[1].mlp.experts[1](x[routed])
    torch.testing.assert_close(rows[: len(wanted)], wanted, rtol=1e-4, atol=1e-5)
    assert tokens[: len(wanted)].tolist() == ids[0, routed].tolist()
    source = stream(model, CharTokenizer(), DOCUMENTS, name, buffer_rows=100, **small)
    assert torch.equal(torch.cat(list(source.batches(16, seed=None))), rows)


def test_fused_experts_are_refused_with_the_reason():
    model = mixtral(listed=False)
    with pytest.raises(
        ValueError, match=r"expert.1.0: expected experts that are modules"
    ) as caught:
        resolve(model, "expert.1.0")
    message = str(caught.value)
    assert "MixtralExperts, which computes all of them from shared tensors" in message
    assert f"gate_up_proj [{EXPERTS}, 48, {D}]" in message
    assert "mlp_out.1 is that sum, router.1 says" in message
    assert "\n" not in message
    with pytest.raises(ValueError, match="expected experts that are modules"):
        harvest(model, CharTokenizer(), DOCUMENTS, "expert.1.0", "nowhere")


def test_other_refusals(model):
    from tests.models.tiny import tiny_model

    with pytest.raises(ValueError, match=r"expected an expert in 0..3, got 4"):
        resolve(model, "expert.0.4")
    with pytest.raises(ValueError, match="mixture of experts, got LlamaMLP, which has none"):
        resolve(tiny_model(), "expert.0.0")
    assert describe("expert.3.7") == "expert 7 of block 3"

    changed = mixtral()
    experts = changed.model.layers[0].mlp.experts

    def scaled(x, chosen, weights):
        return ListedExperts.forward(experts, x * 2, chosen, weights)

    experts.forward = scaled
    with pytest.raises(ValueError, match="expected an expert that takes rows of tokens"):
        resolve(changed, "expert.0.0")


def test_places_of_rows():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0]])
    assert places_of(x[[0, 2, 3]], x).tolist() == [0, 2, 3]
    assert places_of(x[[1]], x).tolist() == [1]
    assert places_of(x[:0], x).tolist() == []
    assert places_of(x[[3, 0]], x) is None  # in another order
    assert places_of(x + 1, x) is None
    assert places_of(torch.zeros(1, 3), x) is None
