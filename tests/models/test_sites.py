"""Sites are the modules one would hook by hand, in three model families."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsae.models import describe, find_blocks, read, read_gradients, resolve
from tests.models.tiny import FAMILIES, LAYERS, VOCAB, tiny_model

TOKENS = torch.arange(14).view(2, 7) % VOCAB
BY_HAND = {
    "llama": lambda m: (m.model.layers, "mlp", "self_attn.o_proj"),
    "gpt2": lambda m: (m.transformer.h, "mlp", "attn.c_proj"),
    "neox": lambda m: (m.gpt_neox.layers, "mlp", "attention.dense"),
}


def hooked(model: nn.Module, module: nn.Module, side: str) -> torch.Tensor:
    """Return an activation with nothing but a torch hook and a full forward pass."""
    got = []

    def hook(module, args, output):
        x = args[0] if side == "in" else output
        got.append(x[0] if isinstance(x, tuple) else x)

    handle = module.register_forward_hook(hook)
    with torch.no_grad():
        model(input_ids=TOKENS)
    handle.remove()
    return got[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_sites_equal_hooks_set_by_hand(family, layer):
    model = tiny_model(family)
    blocks, mlp, attn_out = BY_HAND[family](model)
    block = blocks[layer]
    expected = {
        f"resid_post.{layer}": hooked(model, block, "out"),
        f"mlp_in.{layer}": hooked(model, block.get_submodule(mlp), "in"),
        f"mlp_out.{layer}": hooked(model, block.get_submodule(mlp), "out"),
        f"attn_z.{layer}": hooked(model, block.get_submodule(attn_out), "in"),
    }
    got = read(model, [resolve(model, name) for name in expected], TOKENS)
    for name, x in expected.items():
        assert torch.equal(got[name], x), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_ends_at_the_last_site(family):
    model = tiny_model(family)
    blocks, site = find_blocks(model)[1], resolve(model, "resid_post.1")
    ran = []
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    x = read(model, [site], TOKENS)["resid_post.1"]
    assert ran == [0, 1]
    assert torch.equal(x, hooked(model, blocks[1], "out"))
    assert not site.module._forward_pre_hooks
    assert len(site.module._forward_hooks) == 1  # the one of this test


def test_a_plain_path_is_its_output_unless_said_otherwise():
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    names = ["model.layers.1.mlp", "model.layers.1.mlp:out", "model.layers.1.mlp:in"]
    got = read(model, [resolve(model, name) for name in names], TOKENS)
    assert torch.equal(got[names[0]], hooked(model, mlp, "out"))
    assert torch.equal(got[names[0]], got[names[1]])
    assert torch.equal(got[names[2]], hooked(model, mlp, "in"))


@pytest.mark.parametrize("name", ["resid_post.1", "mlp_in.1", "mlp_out.1", "attn_z.1"])
def test_what_a_hook_returns_replaces_the_activation(name):
    model = tiny_model()
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
        handle = resolve(model, name).hook(lambda x: x + 1)
        changed = model(input_ids=TOKENS).logits
        handle.remove()
        after = model(input_ids=TOKENS).logits
    assert not torch.allclose(before, changed)
    assert torch.equal(before, after)


class Toy(nn.Module):
    """Blocks, run one after the other; `times` says how often each runs."""

    def __init__(self, blocks, times=1, spare=0):
        super().__init__()
        self.embed = nn.Embedding(64, 2)
        self.spare = nn.ModuleList(nn.Linear(2, 2) for _ in range(spare))
        self.layers = nn.ModuleList(blocks)
        self.times = times

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for _ in range(self.times):
            for layer in self.layers:
                x = layer(x)
        return (x,)


class Experts(nn.Module):
    def __init__(self, n=9):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(n))

    def forward(self, x):
        return x + sum(expert(x) for expert in self.experts)


def test_blocks_are_not_the_experts_inside_them():
    assert find_blocks(Toy([Experts() for _ in range(4)]))[0] == "layers"


def test_blocks_may_be_of_several_classes_and_fewer_than_what_does_not_run():
    model = Toy([Experts(), nn.Linear(2, 2), nn.Identity()], spare=7)
    assert find_blocks(model) == ("layers", model.layers)


def test_blocks_that_run_twice_are_refused():
    with pytest.raises(ValueError, match=r"layers: entry 0 runs several times"):
        find_blocks(Toy([Experts(2), Experts(2)], times=2))


def test_a_list_whose_entries_do_not_follow_each_other_is_refused():
    class Side(Toy):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            return (sum(layer(x) for layer in self.layers),)

    with pytest.raises(ValueError, match="layers: entry 1 does not take what the one before gave"):
        find_blocks(Side([Experts(2), Experts(2)]))


def test_blocks_are_looked_for_again_when_the_model_has_changed():
    model = Toy([Experts(2), Experts(2)])
    assert len(find_blocks(model)[1]) == 2
    model.layers.append(Experts(2))
    assert len(find_blocks(model)[1]) == 3
    model.layers = nn.ModuleList([Experts(2)])
    assert find_blocks(model)[1] is model.layers


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resid_post.3", r"expected a layer in 0\.\.2, got 3 .*has 3 layers in model\.layers"),
        ("resid_pos.1", "expected resid_pre.L, .*has no 'resid_pos', it has model, lm_head"),
        ("head.1", "expected resid_pre.L, .*head.L.H, .*has no 'head', it has model, lm_head"),
        ("head.1.2", r"site head.1.2: expected a head in 0\.\.1, got 2"),
        ("router.1", "expected a router named gate, router in LlamaMLP"),
        ("model.layers.1.nope", "model.layers.1 has no 'nope', it has self_attn, mlp"),
        ("model.layers.1:up", "expected PATH:in or PATH:out, got :up"),
    ],
)
def test_a_wrong_site_says_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        resolve(tiny_model(), name)


def test_a_block_without_mlp_says_what_it_has():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(2, 2)

        def forward(self, x):
            return x + self.fc1(x)

    with pytest.raises(ValueError, match=r"expected an MLP named mlp, .* in Block, which has fc1"):
        resolve(Toy([Block(), Block()]), "mlp_out.0")
    with pytest.raises(ValueError, match="keep its blocks in a ModuleList, found none"):
        resolve(nn.Linear(2, 2), "resid_post.0")


def test_a_module_that_never_runs_is_an_error():
    model = tiny_model()
    model.spare = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="site spare: its module is not reached"):
        read(model, [resolve(model, "spare")], TOKENS)
    assert not model.spare._forward_hooks


def test_sites_in_words():
    assert describe("resid_post.15") == "the residual stream after block 15"
    assert describe("model.norm:in") == "the input of model.norm"
    assert describe("model.norm") == "the output of model.norm"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_summed_next_token_loss(family):
    model = tiny_model(family)
    found = [resolve(model, name) for name in ("resid_post.0", "mlp_in.1")]
    real = torch.ones_like(TOKENS, dtype=torch.bool)
    real[1, 4:] = False
    acts, grads = read_gradients(model, found, TOKENS, real)
    plain = read(model, found, TOKENS)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for site in found:
        assert torch.equal(acts[site.name], plain[site.name])
        assert not acts[site.name].requires_grad
        step = torch.zeros_like(acts[site.name]).double()
        step[:, 2] = torch.randn(step.shape[-1], generator=torch.Generator().manual_seed(0))

        def loss(scale, site=site, step=step):
            handle = site.hook(lambda x: x + scale * step.to(x.dtype))
            with torch.no_grad():
                logits = model.double()(input_ids=TOKENS).logits.log_softmax(-1)
            handle.remove()
            total = 0
            for row in range(2):
                for t in range(6):
                    if real[row, t + 1]:
                        total -= float(logits[row, t, TOKENS[row, t + 1]])
            return total

        slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
        assert float((grads[site.name] * step).sum()) == pytest.approx(slope, rel=1e-2, abs=1e-3)
        model.float()


def test_gradients_need_a_site_that_takes_part():
    model = tiny_model()
    model.unused = nn.Linear(2, 2)
    real = torch.ones_like(TOKENS, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="site unused: its module is not reached"):
        read_gradients(model, [resolve(model, "unused")], TOKENS, real)
    assert all(p.requires_grad for p in model.parameters())
