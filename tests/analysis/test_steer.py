"""Steered latents change what the formula says, in every way of running a model, and no more."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsae.analysis import firing, steer
from fastsae.models import read, replace, resolve
from fastsae.nn import (
    BatchTopKSAE,
    CrossCoder,
    CrossLayerTranscoder,
    JumpReLUSAE,
    NormalizedSAE,
    TopKSAE,
    Transcoder,
)
from tests.models.tiny import FAMILIES, D, tiny_model

SITE = "resid_post.1"
TOKENS = torch.tensor([[1, 9, 8, 7, 22, 5], [1, 30, 2, 50, 11, 3]])
D_SAE = 40
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def make_sae(cls: type = TopKSAE, **kwargs: object) -> nn.Module:
    torch.manual_seed(1)
    sae = cls(D, D_SAE, **({"k": 6} if cls is TopKSAE else {}), **kwargs)
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_(std=0.1)
    if cls is BatchTopKSAE:
        sae.calibrate_(torch.randn(64, D, dtype=sae.W_dec.dtype))
    return sae


def active(model: nn.Module, sae: nn.Module, site: str = SITE) -> list[int]:
    """The three latents that fire most."""
    return firing(model, sae, TOKENS.tolist(), site=site).rate.topk(3).indices.tolist()


def logits(model: nn.Module, tokens: torch.Tensor = TOKENS, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False, **kwargs).logits


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", [SITE, "attn_write.1", "mlp_write.1", "embed"])
def test_a_change_of_nothing_is_the_model_to_the_bit(family, dtype, site):
    model, sae = tiny_model(family).to(dtype), make_sae()
    clean = logits(model)
    rare = int((~sae.encode_sparse(torch.zeros(1, D)).fired()).nonzero()[0])
    with steer(model, sae, [3, 5], site=site, strength=0.0):
        assert torch.equal(logits(model), clean)
    with steer(model, sae, [3, 5], site=site, how="scale", strength=1.0):
        assert torch.equal(logits(model), clean)
    with steer(model, sae, [], site=site, strength=2.0):
        assert torch.equal(logits(model), clean)
    silent = firing(model, sae, TOKENS.tolist(), site=site).rate == 0
    idle = int(silent.nonzero()[0]) if silent.any() else rare
    with steer(model, sae, idle, site=site, how="ablate"):
        assert torch.equal(logits(model), clean)
    with steer(model, sae, 3, site=site, strength=20.0):
        assert not torch.equal(logits(model), clean)


@pytest.mark.parametrize("how", ["add", "scale", "clamp"])
@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE, JumpReLUSAE])
def test_the_activation_is_what_the_formula_says(how, cls):
    model = tiny_model().double()
    sae = make_sae(cls, **({"k": 6} if cls is BatchTopKSAE else {}), dtype=torch.float64).eval()
    latents, strength = active(model, sae), torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)
    last = resolve(model, "resid_post.2")
    x = read(model, [resolve(model, SITE)], TOKENS)[SITE]
    f = sae.encode(x).detach()
    new = f.clone()
    new[..., latents] = {
        "add": f[..., latents] + strength,
        "scale": f[..., latents] * strength,
        "clamp": strength.expand(*x.shape[:-1], 3),
    }[how]
    wanted = x + (new - f) @ sae.W_dec.detach()
    wanted[:, 0] = x[:, 0]  # drop_prefix
    seen = []
    with torch.no_grad(), steer(model, sae, latents, site=SITE, how=how, strength=strength):
        handle = model.model.layers[1].register_forward_hook(lambda m, a, out: seen.append(out))
        got = read(model, [last], TOKENS)[last.name]
        handle.remove()
    (out,) = seen
    torch.testing.assert_close(
        out[0] if isinstance(out, tuple) else out, wanted, rtol=1e-12, atol=1e-12
    )
    with torch.no_grad(), replace(model, SITE, lambda rows: wanted[:, 1:].reshape(rows.shape)):
        torch.testing.assert_close(got, read(model, [last], TOKENS)[last.name])


def test_ablating_is_what_a_hook_in_plain_torch_does():
    model, sae = tiny_model(), make_sae()
    latents = active(model, sae)

    def hook(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        z = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        f = torch.zeros_like(z).scatter(-1, z.topk(sae.k).indices, z.topk(sae.k).values)
        less = torch.zeros_like(f)
        less[..., latents] = f[..., latents]
        edited = x - less @ sae.W_dec
        edited = torch.cat([x[:, :1], edited[:, 1:]], 1)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = model.model.layers[1].register_forward_hook(hook)
    wanted = logits(model)
    handle.remove()
    with steer(model, sae, latents, site=SITE, how="ablate"):
        got = logits(model)
    assert relative(got, wanted) < 1e-6
    assert relative(logits(model), wanted) > 1e-2


@pytest.mark.parametrize("how", ["add", "scale", "clamp", "ablate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_is_uncached_and_a_padded_batch_is_its_prompts(family, how):
    model, sae = tiny_model(family), make_sae()
    latents = active(model, sae)
    strength = {} if how == "ablate" else {"strength": [4.0, 2.0, -3.0]}
    padded = torch.tensor([[0, 0, 1, 9, 8, 7], [1, 30, 2, 50, 11, 3]])
    mask = (padded > 0).long()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), steer(model, sae, latents, site=SITE, how=how, **strength):
        both = model.generate(padded, attention_mask=mask, **options)
        for row, prompt in enumerate([padded[:1, 2:], padded[1:]]):
            one = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            assert both.sequences[row, 6:].tolist() == one.sequences[0, -4:].tolist()
            got, alone = torch.stack(both.logits, 1)[row], torch.stack(one.logits, 1)[0]
            whole = logits(model, one.sequences)[0, -5:-1]
            assert relative(alone, whole) < 1e-5
            assert relative(got, whole) < 1e-5
    assert relative(logits(model, one.sequences)[0, -5:-1], whole) > 1e-3


def test_kept_positions_and_the_prompt_alone_stay():
    model, sae = tiny_model(), make_sae()
    keep = torch.ones(2, 4, dtype=torch.bool)
    clean = logits(model)
    with steer(model, sae, 3, site=SITE, strength=9.0, keep=keep):
        got = logits(model)
    assert torch.equal(got[:, :4], clean[:, :4])
    assert not torch.isclose(got[:, 4:], clean[:, 4:]).all(-1).any()


def test_a_unit_multiplies_and_steering_by_several_is_steering_by_each():
    model, sae = tiny_model(), make_sae()
    largest = firing(model, sae, TOKENS.tolist(), site=SITE).largest
    pair = active(model, sae)[:2]
    with steer(model, sae, pair, site=SITE, strength=[2.0, 3.0], unit=largest[pair]):
        both = logits(model)
    with steer(model, sae, pair[0], site=SITE, strength=2 * float(largest[pair[0]])):  # noqa: SIM117
        with steer(model, sae, pair[1], site=SITE, strength=3 * float(largest[pair[1]])):
            nested = logits(model)
    assert relative(both, nested) < 1e-5


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale", "none"])
@pytest.mark.parametrize("how", ["add", "scale", "clamp", "ablate"])
def test_a_normalized_sae_changes_what_its_reconstruction_says(kind, how):
    model = tiny_model().double()
    sae = NormalizedSAE(make_sae(dtype=torch.float64), kind)
    latents = active(model, sae)
    x = read(model, [resolve(model, SITE)], TOKENS)[SITE]
    f = sae.encode(x).detach()
    new, part = f.clone(), f[..., latents]
    new[..., latents] = {"add": part + 2, "scale": part * 2, "clamp": part * 0 + 2}.get(how, 0)
    wanted = x + (sae.decode(new, x) - sae.decode(f, x)).detach()
    strength = {} if how == "ablate" else {"strength": 2.0}
    with steer(model, sae, latents, site=SITE, how=how, **strength):
        got = logits(model)
    with replace(model, SITE, lambda rows: wanted[:, 1:].reshape(rows.shape)):
        torch.testing.assert_close(got, logits(model), rtol=1e-9, atol=1e-9)


def test_a_transcoder_reads_one_site_and_writes_to_another():
    model = tiny_model().double()
    torch.manual_seed(1)
    coder = Transcoder(D, D, D_SAE, k=6, skip=True, dtype=torch.float64)
    sites = ("mlp_in.1", "mlp_out.1")
    latents = active(model, coder, sites)
    x, y = read(model, [resolve(model, name) for name in sites], TOKENS).values()
    wanted = y + (3 - coder.encode(x)[..., latents].detach()) @ coder.W_dec[latents].detach()
    with steer(model, coder, latents, site=sites, how="clamp", strength=3.0):
        got = logits(model)
    with replace(model, "mlp_out.1", lambda rows: wanted[:, 1:].reshape(rows.shape)):
        torch.testing.assert_close(got, logits(model), rtol=1e-9, atol=1e-9)


def test_gradients_reach_the_strength():
    model, sae = tiny_model("gpt2").double(), make_sae(dtype=torch.float64)
    strength = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def loss(s: torch.Tensor | float) -> torch.Tensor:
        with steer(model, sae, 3, site=SITE, how="clamp", strength=s):
            return model(input_ids=TOKENS, use_cache=False).logits[:, -1, 5].sum()

    (grad,) = torch.autograd.grad(loss(strength), strength)
    with torch.no_grad():
        slope = (loss(1 + 1e-5) - loss(1 - 1e-5)) / 2e-5
    assert float(grad) == pytest.approx(float(slope), rel=1e-5)


def test_firing_counts_the_tokens_that_are_steered():
    model, sae = tiny_model(), make_sae()
    x = read(model, [resolve(model, SITE)], TOKENS)[SITE]
    contexts = [TOKENS[0].tolist(), TOKENS[1, :4].tolist()]
    f = torch.cat([sae.encode(x[0, 1:]), sae.encode(x[1, 1:4])]).detach()
    found = firing(model, sae, contexts, site=SITE)
    assert found.tokens == 8
    assert torch.equal(found.rate, (f > 0).double().mean(0))
    torch.testing.assert_close(found.largest.float(), f.amax(0), rtol=1e-5, atol=1e-5)
    rules = {"drop_prefix": 2, "max_norm": float(x.norm(dim=-1).median())}
    acted = []
    with replace(model, SITE, lambda rows: acted.append(rows) or rows, **rules):
        logits(model)
    found = firing(model, sae, TOKENS.tolist(), site=SITE, batch_size=1, **rules)
    assert 0 < found.tokens < 8
    assert torch.equal(found.rate, (sae.encode(acted[0]) > 0).double().mean(0))
    with pytest.raises(ValueError, match=r"^firing: expected contexts with a token to encode"):
        firing(model, sae, [[1]], site=SITE)


REFUSED = {
    "out of range": ([40], {}, ValueError, r"steer: expected a latent in 0\.\.39, got 40"),
    "negative": (-1, {}, ValueError, r"steer: expected a latent in 0\.\.39, got -1"),
    "twice": ([2, 3, 2], {}, ValueError, r"steer: expected latents that differ, got 2 twice"),
    "float": ([2.0], {}, TypeError, r"steer: expected latents to be integers, got 2\.0"),
    "bool": ([True], {}, TypeError, r"steer: expected latents to be integers, got True"),
    "word": (1, {"how": "multiply"}, ValueError,
             r"steer: expected how to be add, scale, clamp or ablate, got 'multiply'"),
    "none": (1, {"strength": None}, ValueError,
             r"steer: expected a strength for 'add', got None"),
    "ablate": (1, {"how": "ablate"}, ValueError,
               r"steer: expected no strength for 'ablate', got 1\.0"),
    "shape": ([1, 2], {"strength": [1.0, 2.0, 3.0]}, ValueError,
              r"steer: expected strength to be one number or \[2\], got \[3\]"),
    "nan": (1, {"strength": float("nan")}, ValueError,
            r"steer: expected strength to be finite, got nan"),
    "unit": (1, {"how": "scale", "unit": 2.0}, ValueError,
             r"steer: expected a unit only for 'add' and 'clamp', got one for 'scale'"),
    "unit shape": ([1, 2], {"unit": [1.0]}, ValueError,
                   r"steer: expected unit to be one number or \[2\], got \[1\]"),
    "two sites": (1, {"site": ("mlp_in.1", "mlp_out.1")}, ValueError,
                  r"steer: expected one site for TopKSAE, got \('mlp_in\.1', 'mlp_out\.1'\)"),
    "no site": (1, {"site": "resid_post.9"}, ValueError, r"site resid_post\.9: expected a layer.*"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_in_one_line(case):
    latents, options, error, message = REFUSED[case]
    model = tiny_model()
    hooks = count_hooks(model)
    arguments = {"site": SITE, "strength": 1.0, **options}
    with (
        pytest.raises(error, match=rf"^{message}$"),
        steer(model, make_sae(), latents, **arguments),
    ):
        pass
    assert count_hooks(model) == hooks


def test_coders_of_several_sites_are_refused():
    model = tiny_model()
    cases = {
        CrossCoder(D, 2, D_SAE, k=4): r"expected an SAE that reads one site, got CrossCoder, which "
        r"reads 2",
        CrossLayerTranscoder(D, 3, D_SAE // 2, k=4): r"expected an SAE that writes to one site, "
        r"got CrossLayerTranscoder, whose latents write to several layers",
        Transcoder(D, D, D_SAE, k=4): r"expected \(SITE_READ, SITE_REPLACED\) for Transcoder, got "
        r"resid_post\.1",
    }
    for coder, message in cases.items():
        with (
            pytest.raises(ValueError, match=rf"^steer: {message}$"),
            steer(model, coder, 1, site=SITE, strength=1.0),
        ):
            pass
    message = r"^steer: expected an SAE or a NormalizedSAE, got Linear$"
    with (
        pytest.raises(TypeError, match=message),
        steer(model, nn.Linear(D, D), 1, site=SITE, strength=1.0),
    ):
        pass


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_come_off_and_the_mode_comes_back():
    model, sae = tiny_model(), make_sae().train()
    hooks, clean = count_hooks(model), logits(model)
    with steer(model, sae, 3, site=SITE, strength=9.0):
        assert count_hooks(model) > hooks
        assert not sae.training
    assert count_hooks(model) == hooks
    with pytest.raises(KeyError), steer(model, sae, 3, site=SITE, strength=9.0):  # noqa: PT012
        logits(model)
        raise KeyError
    assert count_hooks(model) == hooks
    assert sae.training
    assert torch.equal(logits(model), clean)
