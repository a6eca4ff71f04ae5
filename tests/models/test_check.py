"""What `check_sites` says of families whose blocks differ, as their source code has them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bench.tiny_models import build
from fastsae.data import harvest
from fastsae.models import check_sites, find_blocks, read, read_gradients, replace, resolve, splice
from tests.models.tiny import CharTokenizer

TOKENS = torch.arange(5, 19).view(2, 7)
SUMS = ("llama", "gpt2", "gpt_neox", "gemma2", "olmo2", "granite", "bloom", "falcon", "opt")
SUMS += ("mixtral", "cohere", "dbrx", "gpt_neo", "phi", "xglm", "llama4_text", "biogpt")


@pytest.fixture(scope="module")
def models():
    built: dict[str, nn.Module] = {}
    return lambda name: built.setdefault(name, build(name))


@pytest.mark.parametrize("family", SUMS)
def test_block_input_and_what_is_written_add_up_to_its_output(models, family):
    model = models(family)
    names = ["resid_pre.1", "attn_write.1", "mlp_write.1", "resid_post.1"]
    got = read(model, [resolve(model, name) for name in names], TOKENS)
    before, attention, mlp, after = (got[name] for name in names)
    assert_close(before + attention + mlp, after, rtol=1e-5, atol=1e-5)
    assert mlp.norm() > 0.01 * after.norm()
    assert attention.norm() > 0.001 * after.norm()


@pytest.mark.parametrize("family", SUMS)
def test_a_written_value_can_be_replaced(models, family):
    model = models(family)
    new = torch.randn(2, 6, 32)
    names = ["resid_pre.1", "attn_write.1", "resid_post.1"]
    with replace(model, "mlp_write.1", lambda rows: new.reshape(-1, 32)):
        sites = [resolve(model, name) for name in names]
        seen: dict[str, torch.Tensor] = {}
        handles = [s.hook(lambda x, s=s: seen.__setitem__(s.name, x.clone())) for s in sites]
        with torch.no_grad():
            model(input_ids=TOKENS)
        for handle in handles:
            handle.remove()
    wanted = (seen["resid_pre.1"] + seen["attn_write.1"])[:, 1:] + new
    assert_close(seen["resid_post.1"][:, 1:], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "bloom", "opt"])
def test_the_stream_between_attention_and_mlp(models, family):
    model = models(family)
    names = ["resid_pre.1", "attn_write.1", "resid_mid.1", "mlp_write.1", "resid_post.1"]
    got = read(model, [resolve(model, name) for name in names], TOKENS)
    assert_close(got["resid_pre.1"] + got["attn_write.1"], got["resid_mid.1"])
    wanted = got["resid_mid.1"] + got["mlp_write.1"]
    assert_close(wanted, got["resid_post.1"], rtol=1e-5, atol=1e-5)
    sites = {name: resolve(model, name) for name in names}
    seen: dict[str, torch.Tensor] = {}
    with replace(model, "resid_mid.1", lambda rows: 0.5 * rows, drop_prefix=0):
        handles = [
            sites[name].hook(lambda x, name=name: seen.__setitem__(name, x.clone()))
            for name in ("mlp_write.1", "resid_post.1")
        ]
        with torch.no_grad():
            model(input_ids=TOKENS)
        for handle in handles:
            handle.remove()
    wanted = 0.5 * got["resid_mid.1"] + seen["mlp_write.1"]
    assert_close(seen["resid_post.1"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "site", "written", "scale", "between"),
    [
        ("llama", "mlp_out.1", "exact", 1.0, ()),
        ("llama", "attn_out.1", "exact", 1.0, ()),
        ("gpt_neox", "mlp_out.1", "exact", 1.0, ()),
        ("gemma2", "mlp_out.1", "indirect", None, ("post_feedforward_layernorm",)),
        ("gemma2", "attn_out.1", "indirect", None, ("post_attention_layernorm",)),
        ("glm4", "mlp_out.1", "indirect", None, ("post_mlp_layernorm",)),
        ("openai-gpt", "mlp_out.1", "indirect", None, ("ln_2",)),
        ("granite", "mlp_out.1", "scaled", 0.22, ()),
        ("granitemoeshared", "mlp_out.1", "partial", 0.22, ("shared_mlp",)),
        ("dinov2:vision", "mlp_out.1", "scaled", None, ()),
    ],
)
def test_how_a_site_is_written(models, family, site, written, scale, between):
    report = check_sites(models(family), site)[site]
    assert report.ok
    assert report.written == written
    assert report.between == between
    assert report.scale == (scale if scale is None else pytest.approx(scale, rel=1e-5))


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_a_module_that_adds_the_residual_itself_is_refused(models, family):
    model = models(family)
    report = check_sites(model, "mlp_out.1")["mlp_out.1"]
    assert report.written == "residual inside"
    assert not report.ok
    message = r"site mlp_out.1: .* which adds the stream itself; mlp_write.1 is what it adds"
    with pytest.raises(ValueError, match=message):
        resolve(model, "mlp_out.1")
    got = read(model, [resolve(model, f"{x}.1") for x in ("mlp_write", "resid_post")], TOKENS)
    assert not torch.allclose(got["mlp_write.1"], got["resid_post.1"])


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("jamba", "model.layers"),
        ("zamba", "model.layers"),
        ("gemma3", "model.language_model.layers"),
        ("bart", "model.decoder.layers"),
        ("vit:vision", "layers"),
    ],
)
def test_lists_of_blocks(models, family, path):
    found, blocks = find_blocks(models(family))
    assert found.endswith(path)
    assert len(blocks) == 4


@pytest.mark.parametrize("family", ["xlm", "hrm_text", "bart:seq2seq", "albert:masked"])
def test_what_has_no_one_list_of_blocks_is_refused(models, family):
    with pytest.raises(ValueError, match="to have one list of blocks"):
        find_blocks(models(family))


def test_blocks_that_text_alone_does_not_reach_are_refused(models):
    path, blocks = find_blocks(models("mllama:vlm"))
    (cross,) = (i for i, block in enumerate(blocks) if "Cross" in type(block).__name__)
    with pytest.raises(
        ValueError, match=rf"{path}\.{cross} .*, which does not run on tokens alone"
    ):
        resolve(models("mllama:vlm"), f"resid_post.{cross}")
    assert check_sites(models("mllama:vlm"), "resid_post.0")["resid_post.0"].ok


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma3n_text", r"expected \[2, 8, d\] in floating point, got \[4, 2, 8, 32\]"),
        ("xlnet", r"expected \[2, 8, d\] in floating point, got \[8, 2, 32\]"),
    ],
)
def test_other_shapes_are_refused_before_the_first_batch(models, family, message, tmp_path):
    with pytest.raises(ValueError, match=f"site resid_post.1: {message}"):
        harvest(
            models(family), CharTokenizer(), ["some text"], "resid_post.1", tmp_path, context=32
        )


def test_a_tensor_that_is_changed_in_place_is_read_as_it_was(models):
    """Falcon adds the output of attention to that of the MLP in place."""
    model = models("falcon")
    mlp, stream = resolve(model, "mlp_out.1"), resolve(model, "resid_post.1")
    by_path = resolve(model, "transformer.h.1.mlp")
    alone = read(model, [mlp], TOKENS)["mlp_out.1"]
    assert torch.equal(read(model, [mlp, stream], TOKENS)["mlp_out.1"], alone)
    assert torch.equal(read(model, [by_path, stream], TOKENS)[by_path.name], alone)
    real = torch.ones_like(TOKENS, dtype=torch.bool)
    acts, grads = read_gradients(model, [mlp, stream], TOKENS, real)
    assert_close(acts["mlp_out.1"], alone)
    assert_close(grads["mlp_out.1"], grads["resid_post.1"])  # it is added as it is


@pytest.mark.parametrize("family", ["bert:masked", "modernbert:masked", "distilbert:masked"])
def test_rows_of_an_encoder_do_not_depend_on_padding(models, family, tmp_path):
    model = models(family)
    report = check_sites(model, "resid_post.1")["resid_post.1"]
    assert (report.ok, report.causal, report.masked) == (True, False, True)
    texts = ["a short one", "and a longer text, after which the first is padded", "tiny"]
    for size in (1, 3):
        harvest(
            model, CharTokenizer(), texts, "resid_post.1", tmp_path / str(size), batch_size=size,
            context=64, val_fraction=0, dtype=torch.float32,
        )  # fmt: skip
    from fastsae.data import ActivationStore

    alone, padded = (ActivationStore(tmp_path / str(size)) for size in (1, 3))
    assert_close(padded.rows(), alone.rows(), rtol=1e-4, atol=1e-4)
    assert alone.manifest.checks["resid_post.1"]["causal"] is False


def test_an_sae_of_a_vision_model(models, tmp_path):
    """Class token and patches of images, read by the model's own inputs."""
    import fastsae

    model = models("vit:vision")
    images = torch.randn(40, 3, model.config.image_size, model.config.image_size)
    site = resolve(model, "resid_post.2")
    x = read(model, [site], {"pixel_values": images})[site.name]
    with torch.no_grad():
        out = model(pixel_values=images, output_hidden_states=True)
    assert torch.equal(x, out.hidden_states[3])
    patches = x[:, 1:].flatten(0, 1)
    sae = fastsae.TopKSAE(32, 128, k=8)
    config = fastsae.TrainConfig(steps=150, batch_size=64, progress=False)
    final = fastsae.Trainer(sae, patches, config).fit().final
    assert final["fvu"] < 0.5
    with torch.no_grad(), splice(model, "resid_post.2", sae, drop_prefix=1):
        spliced = model(pixel_values=images, output_hidden_states=True)
    got = spliced.last_hidden_state
    by_hand = x.clone()
    by_hand[:, 1:] = sae(x[:, 1:])
    with torch.no_grad():
        for block in find_blocks(model)[1][3:]:
            out = block(by_hand)
            by_hand = out[0] if isinstance(out, tuple) else out
        wanted = model.layernorm(by_hand)
    assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="takes tokens, got ViTModel, which takes pixel_values"):
        harvest(model, CharTokenizer(), ["text"], "resid_post.2", tmp_path)


def test_heads_are_columns_of_what_is_projected(models):
    model = models("llama")
    names = ["attn_z.1", *(f"head.1.{i}" for i in range(4))]
    got = read(model, [resolve(model, name) for name in names], TOKENS)
    heads = torch.cat([got[name] for name in names[1:]], -1)
    assert torch.equal(heads, got["attn_z.1"])
    projection = model.model.layers[1].self_attn.o_proj
    size = got["head.1.2"].shape[-1]
    with replace(model, "head.1.2", torch.zeros_like, drop_prefix=0):
        out = read(model, [resolve(model, "attn_out.1")], TOKENS)["attn_out.1"]
    weight = projection.weight[:, 2 * size : 3 * size]
    wanted = projection(got["attn_z.1"]) - got["head.1.2"] @ weight.t()
    assert_close(out, wanted, rtol=1e-4, atol=1e-5)


def test_router_logits_embedding_and_final(models):
    model = models("mixtral")
    names = ["embed", "router.1", "final"]
    got = read(model, [resolve(model, name) for name in names], TOKENS)
    with torch.no_grad():
        out = model(input_ids=TOKENS, output_router_logits=True, output_hidden_states=True)
    assert_close(got["router.1"].flatten(0, 1), out.router_logits[1])
    assert torch.equal(got["embed"], out.hidden_states[0])
    assert torch.equal(got["final"], out.hidden_states[-1])
    with (
        pytest.raises(ValueError, match=r"router.1: expected one that can be replaced"),
        replace(model, "router.1", torch.zeros_like),
    ):
        pass


def test_a_model_that_is_not_deterministic_is_refused():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(64, 4)
            self.layers = nn.ModuleList([Noise(), nn.Linear(4, 4)])

        def forward(self, input_ids):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = layer(x)
            return (x,)

    model, state = Model(), torch.get_rng_state()
    with pytest.raises(ValueError, match="gives the same output for the same tokens"):
        resolve(model, "resid_post.1")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_verdicts_are_those_of_float32(dtype):
    """Padding matters in an encoder, and scales of columns are not 1, at any resolution."""
    for family, site in (
        ("bert:masked", "resid_post.1"),
        ("dinov2:vision", "mlp_out.1"),
        ("gemma2", "mlp_out.1"),
        ("llama", "attn_out.1"),
    ):
        exact = check_sites(build(family), site)[site]
        coarse = check_sites(build(family).to(dtype), site)[site]
        for name in ("ok", "causal", "masked", "written", "between", "path"):
            assert getattr(coarse, name) == getattr(exact, name), (family, name)


@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("gemma4_text", "resid_mid.1"),  # the output of the block is scaled as a whole
        ("gemma4_text", "attn_write.1"),
        ("beam", "resid_mid.1"),
        ("falcon_h1", "resid_mid.1"),  # a second branch is added beside attention
        ("gpt_neox_japanese", "resid_mid.3"),  # a bias is added with the residual
    ],
)
def test_what_does_not_add_up_is_refused(models, family, site):
    report = check_sites(models(family), site)[site]
    assert not report.ok
    assert f"site {site}: expected" in report.why


def test_a_probe_does_not_see_the_hooks_of_others():
    model = build("llama")
    seen = []
    with replace(model, "resid_post.1", lambda x: seen.append(len(x)) or 0 * x, drop_prefix=0):
        assert check_sites(model, "mlp_out.2")["mlp_out.2"].written == "exact"
        resolve(model, "resid_post.0")
        assert not seen
        with torch.no_grad():
            model(input_ids=TOKENS)
    assert seen == [TOKENS.numel()]
    with torch.inference_mode():
        assert resolve(build("llama"), "mlp_write.1")
    with torch.autocast("cpu", torch.bfloat16):
        assert resolve(build("llama"), "mlp_write.1")


def test_modes_of_modules_come_back_each_as_it_was(tmp_path):
    model = build("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    check_sites(model, "mlp_out.1")
    harvest(model, CharTokenizer(), ["some text"], "mlp_out.1", tmp_path, context=32)
    assert [module.training for module in model.modules()] == modes


def test_rows_without_positions_and_calls_by_position_are_refused():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(64, 16), nn.Linear(16, 16)

        def forward(self, input_ids):
            x = self.embed(input_ids)
            return self.fc(x.reshape(-1, 16)).reshape(x.shape)

    model = Flat()
    message = r"expected an activation \[n, t, d\] at fc, got \[14, 16\]"
    with pytest.raises(ValueError, match=message), replace(model, "fc", lambda x: x):
        model(TOKENS)
    wrapped = nn.DataParallel(build("llama"))
    message = "expected DataParallel to be called with arguments by name, got 2 by position"
    with pytest.raises(TypeError, match=message), replace(wrapped, "resid_post.1", lambda x: x):
        wrapped(TOKENS, torch.ones_like(TOKENS))
