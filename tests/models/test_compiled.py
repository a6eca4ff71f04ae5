"""Hooks in compiled models are honored; replacements under gradient checkpointing are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastsae.data import ActivationStore, harvest, stream
from fastsae.models import ablate, check_sites, read, read_gradients, replace, resolve, splice
from fastsae.models.eager import is_compiled, uncompiled
from tests.models.tiny import DOCUMENTS, VOCAB, CharTokenizer, tiny_model

TOKENS = torch.arange(24).view(2, 12) * 7 % VOCAB
SITES = ["resid_post.1", "mlp_out.0", "attn_z.2"]


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def by_block(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def inner(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("compiled", [whole, in_place, by_block, forward])
def test_a_compiled_model_is_read_and_replaced_like_the_plain_one(compiled):
    plain, model = tiny_model(), compiled(tiny_model())
    clean = logits(model)  # compiled now, without hooks
    torch.testing.assert_close(clean, logits(plain))
    assert is_compiled(model)
    assert not is_compiled(plain)
    sites = [resolve(model, name) for name in SITES]
    wanted = read(plain, [resolve(plain, name) for name in SITES], TOKENS)
    got = read(model, sites, TOKENS)
    for name in SITES:
        torch.testing.assert_close(got[name], wanted[name])
        with replace(plain, name, lambda x: x * 0):
            gone = logits(plain)
        with replace(model, name, lambda x: x * 0):
            torch.testing.assert_close(logits(model), gone)
        assert not torch.allclose(gone, clean)
        assert torch.equal(logits(model), clean)  # and afterwards as before
    assert check_sites(model, "mlp_out.1")["mlp_out.1"].written == "exact"


def test_afterwards_compiled_code_runs_again():
    runs = []

    def backend(graph, inputs):
        def run(*args):
            runs.append(1)
            return graph(*args)

        return run

    model = tiny_model()
    model.compile(backend=backend)
    logits(model)
    once = len(runs)
    assert once > 0
    with splice(model, "resid_post.0", nn.Identity()):
        logits(model)
    assert len(runs) == once
    logits(model)
    assert len(runs) == 2 * once
    with uncompiled(model):
        with pytest.raises(KeyError), uncompiled(model):
            raise KeyError
        logits(model)
    assert len(runs) == 2 * once
    logits(model)
    assert len(runs) == 3 * once


def test_a_harvest_and_a_stream_of_a_compiled_model(tmp_path):
    rows = {}
    for name, make in (("plain", lambda m: m), ("compiled", in_place)):
        model = make(tiny_model())
        logits(model)
        harvest(
            model, CharTokenizer(), DOCUMENTS, "resid_post.1", tmp_path / name, context=20,
            val_fraction=0, dtype="float32",
        )  # fmt: skip
        rows[name] = ActivationStore(tmp_path / name).rows()
        source = stream(
            model, CharTokenizer(), DOCUMENTS, "resid_post.1", context=20, buffer_rows=100
        )
        assert torch.equal(torch.cat(list(source.batches(50, seed=None))), rows[name])
        assert len(next(source.batches(20))) == 20
    torch.testing.assert_close(rows["compiled"], rows["plain"])


def training(model, **options):
    enable = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.20 or so
    (enable or model.gradient_checkpointing_enable)(options or None)
    model.train()
    return model


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("site", ["mlp_out.0", "attn_z.2", "resid_mid.1"])
def test_checkpointing_is_refused_where_gradients_are_wanted(site, reentrant):
    model = tiny_model()
    found = resolve(model, site)
    training(model, use_reentrant=reentrant).enable_input_require_grads()
    with (
        pytest.raises(RuntimeError, match=f"{site} to lie outside of gradient checkpointing"),
        replace(model, found, lambda x: x * 2),
    ):
        model(input_ids=TOKENS)
    with (
        pytest.raises(RuntimeError, match="turn checkpointing off"),
        ablate(model, found, "zero"),
    ):
        model(input_ids=TOKENS)


def test_without_gradients_or_in_eval_mode_checkpointing_changes_nothing():
    plain, model = tiny_model(), training(tiny_model())
    with replace(plain, "mlp_out.0", lambda x: x * 2):
        wanted = logits(plain)
    with replace(model, "mlp_out.0", lambda x: x * 2):
        assert torch.equal(logits(model), wanted)
    model.eval()
    gradients = []
    for which in (plain, model):
        with replace(which, "mlp_out.0", lambda x: x * 2):
            which(input_ids=TOKENS).logits.square().sum().backward()
        gradients.append(which.model.embed_tokens.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("site", ["embed", "resid_pre.1", "resid_post.1", "final"])
def test_a_site_outside_of_what_is_checkpointed_has_right_gradients(site):
    """Hooks of a block are outside of its checkpoint in transformers 5."""
    plain, model = tiny_model(), training(tiny_model())
    gradients = []
    for which in (plain, model):
        with replace(which, site, lambda x: x * 2, drop_prefix=0):
            loss = which(input_ids=TOKENS).logits.square().sum()
        loss.backward()  # without the hooks
        gradients.append(which.model.layers[1].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*gradients)
    assert float(gradients[0].abs().max()) > 0


def test_checkpoints_of_a_block_made_by_hand_are_refused():
    model = tiny_model()
    block = model.model.layers[1]
    plain = block.forward
    block.forward = lambda *args, **kwargs: checkpoint(plain, *args, use_reentrant=False, **kwargs)
    with (
        pytest.raises(RuntimeError, match=r"mlp_out.1 to lie outside of gradient checkpointing"),
        replace(model, "mlp_out.1", lambda x: x * 2),
    ):
        model(input_ids=TOKENS)


def test_gradients_are_read_under_checkpointing_too():
    plain, model = tiny_model(), training(tiny_model())
    real = torch.ones_like(TOKENS, dtype=torch.bool)
    results = []
    for which in (plain, model):
        sites = [resolve(which, name) for name in SITES]
        results.append(read_gradients(which, sites, TOKENS, real))
    (x, g), (x_again, g_again) = results
    for name in SITES:
        torch.testing.assert_close(x_again[name], x[name])
        torch.testing.assert_close(g_again[name], g[name])
        assert float(g[name].abs().max()) > 0
