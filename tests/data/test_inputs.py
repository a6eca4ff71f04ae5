"""Harvests of images and sound: rows of a plain forward pass, of known kinds, no padding."""

from __future__ import annotations

import pytest
import torch

from fastsae import TopKSAE, TrainConfig, Trainer, verify
from fastsae.data import ActivationStore, ModelInputs, harvest
from fastsae.models.kinds import KINDS
from tests.data.test_harvest import content
from tests.models.sensing import FRONT, image_model, wav2vec2, whisper_encoder
from tests.models.tiny import DOCUMENTS, CharTokenizer, tiny_model

SITE = "resid_post.1"
ALL = {"dtype": torch.float32, "val_fraction": 0}
IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def images(size=5):
    """Batches as an image processor gives them."""
    return [{"pixel_values": part} for part in IMAGES.split(size)]


def hidden(model, index, **inputs):
    """Entry `index` of the hidden states of a plain forward pass."""
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states[index]


@pytest.mark.parametrize("family", FRONT)
def test_rows_are_those_of_a_forward_pass_and_their_kinds_are_known(family, tmp_path):
    model = image_model(family)
    manifest = harvest(model, None, ModelInputs(images()), SITE, tmp_path, **ALL)
    x = hidden(model, 2, pixel_values=IMAGES)
    kinds = FRONT[family] + ["patch"] * 16
    store = ActivationStore(tmp_path)
    assert x.shape == (12, len(kinds), 16)
    torch.testing.assert_close(store.rows(), x.flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert [manifest.kinds[code] for code in store.kinds().tolist()] == kinds * 12
    assert store.doc_ids().tolist() == [i for i in range(12) for _ in kinds]
    assert store.positions().tolist() == [*range(len(kinds))] * 12
    assert set(store.token_ids().tolist()) == {-1}
    assert manifest.documents == {"train": 12, "val": 0}
    assert verify(tmp_path).ok


def test_registers_are_the_parameters_of_that_name():
    """Independent of the config: what enters the first block are the learned rows themselves."""
    model = image_model("dinov3_vit")
    with torch.no_grad():
        first = model.embeddings(IMAGES[:1])[0]
    for place, kind in enumerate(FRONT["dinov3_vit"]):
        is_register = (first[place] == model.embeddings.register_tokens[0]).all(-1).any()
        assert bool(is_register) == (kind == "register")


def test_only_some_kinds_or_rows_are_stored(tmp_path):
    model = image_model("dinov2_with_registers")
    x = hidden(model, 2, pixel_values=IMAGES)
    for kinds, wanted in (("patch", x[:, 5:]), (["class", "register"], x[:, :5])):
        out = tmp_path / str(kinds)
        manifest = harvest(model, None, ModelInputs(images(), kinds), SITE, out, **ALL)
        torch.testing.assert_close(
            ActivationStore(out).rows(), wanted.flatten(0, 1), rtol=1e-5, atol=1e-5
        )
        assert manifest.dropped["skipped"] == 12 * 21 - wanted[..., 0].numel()
    keep = torch.rand(12, 21, generator=torch.Generator().manual_seed(0)) < 0.3
    batches = [{**batch, "keep": part} for batch, part in zip(images(), keep.split(5), strict=True)]
    harvest(model, None, ModelInputs(batches, drop_prefix=1), SITE, tmp_path / "keep", **ALL)
    keep[:, 0] = False
    torch.testing.assert_close(
        ActivationStore(tmp_path / "keep").rows(), x[keep], rtol=1e-5, atol=1e-5
    )


def test_a_model_whose_kinds_nobody_knows(tmp_path):
    """A tower without blocks that could be found: kinds are unknown, and nothing is made up."""

    class Tower(torch.nn.Module):
        main_input_name = "pixel_values"

        def __init__(self):
            super().__init__()
            self.patch = torch.nn.Conv2d(3, 16, 4, 4)
            self.mix = torch.nn.Linear(16, 16)

        def forward(self, pixel_values):
            return self.mix(self.patch(pixel_values).flatten(2).mT)

    torch.manual_seed(0)
    model = Tower()
    manifest = harvest(model, None, ModelInputs(images()), "mix:in", tmp_path / "a", **ALL)
    store = ActivationStore(tmp_path / "a")
    assert {manifest.kinds[code] for code in store.kinds().tolist()} == {"unknown"}
    with torch.no_grad():
        torch.testing.assert_close(store.rows(), model.patch(IMAGES).flatten(2).mT.flatten(0, 1))
    with pytest.raises(ValueError, match="expected kinds of Tower that can be told"):
        harvest(model, None, ModelInputs(images(), "patch"), "mix:in", tmp_path / "b", **ALL)


def test_padding_of_sound_is_not_stored(tmp_path):
    """Rows of Wav2Vec2 are those of each clip alone; the model counts them."""
    model = wav2vec2()
    lengths = [400, 700, 250]
    clips = torch.randn(3, 700, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(700) < torch.tensor(lengths).unsqueeze(1)).long()
    clips *= mask
    batches = [{"input_values": clips, "attention_mask": mask}]
    manifest = harvest(model, None, ModelInputs(batches), SITE, tmp_path, **ALL)
    store = ActivationStore(tmp_path)
    counts = [((n - 10) // 5 + 1 - 3) // 4 + 1 for n in lengths]
    assert store.doc_ids().tolist() == [i for i, n in enumerate(counts) for _ in range(n)]
    alone = [
        hidden(model, 2, input_values=clip[:n].unsqueeze(0))[0]
        for clip, n in zip(clips, lengths, strict=True)
    ]
    assert [len(x) for x in alone] == counts
    torch.testing.assert_close(store.rows(), torch.cat(alone), rtol=1e-3, atol=1e-4)
    assert {manifest.kinds[code] for code in store.kinds().tolist()} == {"frame"}


def test_frames_of_whisper(tmp_path):
    model = whisper_encoder()
    features = torch.randn(4, 8, 100, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(100) < torch.tensor([[100], [60], [31], [2]])).long()
    batches = [{"input_features": features, "attention_mask": mask}]
    harvest(model, None, ModelInputs(batches), SITE, tmp_path, **ALL)
    store = ActivationStore(tmp_path)
    counts = [50, 30, 16, 1]
    assert store.doc_ids().tolist() == [i for i, n in enumerate(counts) for _ in range(n)]
    x = hidden(model, 2, input_features=features)
    wanted = torch.cat([rows[:n] for rows, n in zip(x, counts, strict=True)])
    torch.testing.assert_close(store.rows(), wanted, rtol=1e-5, atol=1e-5)
    bad = [{"input_features": features, "attention_mask": torch.ones(4, 70)}]
    with pytest.raises(ValueError, match=r"expected attention_mask \[4, 50\], or \[4, m\]"):
        harvest(model, None, ModelInputs(bad), SITE, tmp_path / "bad", **ALL)


def llava():
    import transformers as hf

    torch.manual_seed(0)
    text = hf.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.3,
    )  # fmt: skip
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=7)
    return hf.LlavaForConditionalGeneration(config).eval()


def test_text_with_images_keeps_ids_kinds_and_masks(tmp_path):
    model = llava()
    ids = torch.tensor([[1, 7, 7, 7, 7, 20, 21, 22], [0, 0, 1, 7, 7, 7, 7, 30]])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": IMAGES[:2]}
    harvest(model, None, ModelInputs([batch], drop_prefix=1), "resid_post.0", tmp_path, **ALL)
    store = ActivationStore(tmp_path)
    with torch.no_grad():
        x = model(**batch, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(store.rows(), torch.cat([x[0, 1:], x[1, 3:]]), rtol=1e-5, atol=1e-5)
    assert store.token_ids().tolist() == [7, 7, 7, 7, 20, 21, 22, 7, 7, 7, 7, 30]
    assert store.positions().tolist() == [*range(1, 8), *range(1, 6)]
    names = [KINDS[code] for code in store.kinds().tolist()]
    assert names == ["patch"] * 4 + ["text"] * 3 + ["patch"] * 4 + ["text"]
    assert store.manifest.dropped["prefix"] == 2


def test_it_is_resumed_appended_to_split_and_trained_on(tmp_path):
    model = image_model("vit")
    small = {"dtype": "int8", "val_fraction": 0.25, "shard_rows": 40}

    def call(out, batches, **more):
        return harvest(model, None, ModelInputs(batches, "patch"), SITE, out, **small, **more)

    def cut():
        yield from images(2)[:4]
        raise KeyboardInterrupt

    manifest = call(tmp_path / "whole", lambda: images(2))
    assert manifest.documents == {"train": 9, "val": 3}
    short = call(tmp_path / "short", images(2), max_norm_ratio=1.5)
    norm = hidden(model, 2, pixel_values=IMAGES)[:, 1:].norm(dim=-1)
    assert short.max_norm[SITE] == pytest.approx(1.5 * float(norm.median()), rel=1e-4)
    assert short.dropped["norm"] == int((norm > 1.5 * norm.median()).sum()) > 0
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path / "cut", cut)
    with pytest.raises(ValueError, match="expected the documents of the interrupted harvest"):
        call(tmp_path / "cut", [{"pixel_values": batch["pixel_values"] + 1} for batch in images(2)])
    call(tmp_path / "cut", images(2))
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    more = [{"pixel_values": IMAGES[:3].flip(0)}]
    call(tmp_path / "cut", more, append=True)
    docs = ActivationStore(tmp_path / "cut").doc_ids().unique().tolist()
    held = ActivationStore(tmp_path / "cut", split="val").doc_ids().unique().tolist()
    assert sorted(docs + held) == [*range(15)]
    with pytest.raises(ValueError, match=r"expected kinds = \['patch'\] as in the harvest"):
        harvest(model, None, ModelInputs(images()), SITE, tmp_path / "cut", append=True, **small)
    store = ActivationStore(tmp_path / "cut")
    config = TrainConfig(steps=30, batch_size=50, progress=False)
    assert 0 < Trainer(TopKSAE(16, 64, k=4), store, config).fit().final["fvu"] < 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 128}, "expected no context with ModelInputs, which are whole .*, got 128"),
        ({"batch_size": 2}, "expected no batch_size with ModelInputs"),
        ({"drop_prefix": 0}, "expected no drop_prefix .*; give it to ModelInputs"),
        ({"gradients": True, "dtype": torch.float32}, "expected no gradients with ModelInputs"),
        ({"tokenizer": CharTokenizer()}, "expected no tokenizer .* got CharTokenizer"),
        ({"sites": [SITE, SITE]}, "expected one or more different sites"),
        ({"sites": "resid_post.9"}, "expected a layer in 0..2, got 9"),
        ({"texts": ModelInputs([])}, "expected at least one batch of inputs, got none"),
        ({"texts": ModelInputs(images(), "frame")}, "expected at least one row, the documents"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    given = {"tokenizer": None, "texts": ModelInputs(images()), "sites": SITE, **arguments}
    with pytest.raises(ValueError, match=message) as caught:
        harvest(image_model("vit"), out=tmp_path, **given)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_bad_inputs(tmp_path):
    model = image_model("vit")
    with pytest.raises(ValueError, match=r"expected kinds of text, class, .* got 'cls'"):
        ModelInputs([], "cls")
    with pytest.raises(ValueError, match="expected drop_prefix >= 0, got -1"):
        ModelInputs([], drop_prefix=-1)
    for batches, message in (
        ([IMAGES], "expected batch 0 to be a mapping of names to tensors, got Tensor"),
        ([*images(), {"labels": 3}], "expected pixel_values in batch 3 to be a tensor .* labels"),
        ([{"pixel_values": IMAGES[0, 0, 0]}], r"to be a tensor \[n, ...\], got \[16\]"),
    ):
        with pytest.raises(TypeError, match=message):
            harvest(model, None, ModelInputs(batches), SITE, tmp_path / "a", **ALL)
    bad = [{**images()[0], "keep": torch.ones(5, 3, dtype=torch.bool)}]
    with pytest.raises(ValueError, match=r"expected keep to be bool \[5, 17\], got torch.bool"):
        harvest(model, None, ModelInputs(bad), SITE, tmp_path / "b", **ALL)
    with pytest.raises(ValueError, match=r"ViTModel, which takes pixel_values; .*ModelInputs"):
        harvest(model, CharTokenizer(), DOCUMENTS, SITE, tmp_path / "c")
    harvest(tiny_model(), CharTokenizer(), DOCUMENTS, SITE, tmp_path / "d")
    with pytest.raises(ValueError, match=r"expected kinds in .*, got rows of texts"):
        ActivationStore(tmp_path / "d").kinds()
