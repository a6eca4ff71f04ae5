"""A harvest holds what a plain forward pass gives, and survives being stopped."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest
import torch

from fastsae.data import ActivationStore, harvest
from fastsae.data.shards import Manifest, ShardWriter
from fastsae.models import read, read_gradients, resolve
from fastsae.models.chunks import chunks, held_out, pad
from tests.models.tiny import DOCUMENTS, CharTokenizer, D, tiny_model

SITE = "resid_post.1"
TOKENIZER = CharTokenizer()
TOTAL = sum(map(len, DOCUMENTS))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def by_hand(model, context, drop_prefix=1):
    """Return [(doc, position, token, activation)] from one unpadded full forward per chunk."""
    rows = []
    for doc, text in enumerate(DOCUMENTS):
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), context - 1):
            chunk = [1, *ids[start : start + context - 1]]
            with torch.no_grad():
                out = model(input_ids=torch.tensor([chunk]), output_hidden_states=True)
            x = out.hidden_states[2][0]
            rows += [(doc, p, chunk[p], x[p]) for p in range(drop_prefix, len(chunk))]
    return rows


@pytest.mark.parametrize("drop_prefix", [0, 1, 3])
def test_rows_equal_a_full_forward(model, tmp_path, drop_prefix):
    harvest(
        model, TOKENIZER, iter(DOCUMENTS), SITE, tmp_path, context=20, batch_size=3,
        drop_prefix=drop_prefix, dtype=torch.float32, val_fraction=0, shard_rows=37,
    )  # fmt: skip
    store = ActivationStore(tmp_path)
    doc, position, token, x = zip(*by_hand(model, 20, drop_prefix), strict=True)
    assert store.doc_ids().tolist() == list(doc)
    assert store.positions().tolist() == list(position)
    assert store.token_ids().tolist() == list(token)
    torch.testing.assert_close(store.rows(), torch.stack(x), rtol=1e-5, atol=1e-5)
    assert [shard.rows for shard in store.shards[:-1]] == [37] * (len(store) // 37)


def test_several_sites_and_two_splits(model, tmp_path):
    sites = [SITE, "attn_z.0"]
    manifest = harvest(model, TOKENIZER, DOCUMENTS, sites, tmp_path, context=20, val_fraction=0.4)
    assert manifest.sites == {SITE: D, "attn_z.0": D}
    assert manifest.complete
    assert manifest.dtype == "float16"
    assert manifest.documents == {"train": 3, "val": 2}
    held = {doc for doc in range(5) if held_out(doc, 0.4)}
    for split, docs in (("train", {0, 1, 2, 3, 4} - held), ("val", held)):
        stores = [ActivationStore(tmp_path, site, split=split) for site in sites]
        assert set(stores[0].doc_ids().tolist()) == docs
        assert len(stores[0]) == len(stores[1]) == sum(len(DOCUMENTS[doc]) for doc in docs)
    assert manifest.dropped["prefix"] == len(list(chunks(TOKENIZER, DOCUMENTS, 20)))


def test_gradients_are_stored_beside_the_activations(model, tmp_path):
    manifest = harvest(
        model, TOKENIZER, DOCUMENTS, SITE, tmp_path, context=20, batch_size=3,
        dtype=torch.float32, gradients=True, val_fraction=0,
    )  # fmt: skip
    assert manifest.sites == {SITE: D, f"grad.{SITE}": D}
    both = ActivationStore(tmp_path, [SITE, f"grad.{SITE}"]).rows()
    x = torch.stack([row[3] for row in by_hand(model, 20)])
    torch.testing.assert_close(both[:, :D], x, rtol=1e-5, atol=1e-5)
    first = next(iter(chunks(TOKENIZER, DOCUMENTS, 20))).ids
    tokens = torch.tensor([first])
    site = resolve(model, SITE)
    g = read_gradients(model, [site], tokens, torch.ones_like(tokens, dtype=torch.bool))[1][SITE]
    torch.testing.assert_close(both[: len(first) - 1, D:], g[0, 1:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected dtype bfloat16 or float32 with gradients"):
        harvest(model, TOKENIZER, DOCUMENTS, SITE, tmp_path / "b", gradients=True)


def test_outliers_are_dropped_and_counted(model, tmp_path):
    rows = by_hand(model, 20)
    norms = torch.stack([x for *_, x in rows]).norm(dim=1)
    harvest(
        model, TOKENIZER, DOCUMENTS, SITE, tmp_path, context=20, batch_size=1000,
        dtype=torch.float32, val_fraction=0, max_norm_ratio=1.2,
    )  # fmt: skip
    store = ActivationStore(tmp_path)
    kept = norms <= 1.2 * norms.median()
    assert 0 < int(kept.sum()) < len(rows)
    assert store.max_norm == pytest.approx(1.2 * float(norms.median()), rel=1e-4)
    assert store.manifest.dropped["norm"] == int((~kept).sum())
    expected = [row[2] for row, keep in zip(rows, kept.tolist(), strict=True) if keep]
    assert store.token_ids().tolist() == expected


def test_the_usual_norm_is_that_of_many_rows_not_of_the_first_batch(tmp_path, caplog):
    """The first document is of one token, whose rows are longer than all others."""
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[60] *= 30
    documents = [{"input_ids": [60] * 19}, *({"input_ids": list(range(3, 22))} for _ in range(9))]
    rows = {"context": 20, "batch_size": 1, "dtype": torch.float32, "val_fraction": 0}
    site = "resid_pre.0"
    manifest = harvest(model, TOKENIZER, documents, site, tmp_path, max_norm_ratio=3.0, **rows)
    norm = model.model.embed_tokens.weight.detach().norm(dim=1)
    everything = torch.cat([norm[60].expand(19), norm[3:22].repeat(9)])
    assert manifest.max_norm[site] == pytest.approx(3 * float(everything.median()), rel=1e-5)
    assert manifest.dropped["norm"] == 19
    assert "19 of 190 rows were dropped for their norm" in caplog.text


def test_tokens_and_masks_leave_rows_out(model, tmp_path):
    ids = list(range(3, 30))
    keep = [i % 3 == 0 for i in ids]
    documents = [
        "as text",
        ids,
        torch.tensor(ids),
        {"input_ids": ids, "keep": keep, "other": 1},
        {"text": "as text"},
        [TOKENIZER.bos_token_id, *ids],
    ]
    rows = {"context": 20, "batch_size": 2, "dtype": torch.float32, "val_fraction": 0}
    manifest = harvest(
        model, TOKENIZER, documents, SITE, tmp_path, skip_token_ids=[5, 6, 7], **rows
    )
    store = ActivationStore(tmp_path)
    text = TOKENIZER("as text", add_special_tokens=False)["input_ids"]
    masked = [i for i, kept in zip(ids, keep, strict=True) if kept]
    wanted = [*text, *ids, *ids, *masked, *text, *ids]
    assert store.token_ids().tolist() == [i for i in wanted if i not in (5, 6, 7)]
    everything = 2 * len(text) + 4 * len(ids)
    assert manifest.dropped["skipped"] == everything - len(store)
    site = resolve(model, SITE)
    x = read(model, [site], torch.tensor([[1, *ids[:19]]]))[SITE][0]
    first = len([i for i in text if i not in (5, 6, 7)])
    rows_of_ids = store.rows()[first : first + 3]  # of tokens 3, 4 and 8
    torch.testing.assert_close(rows_of_ids, x[[1, 2, 6]], rtol=1e-4, atol=1e-4)


def test_a_mask_of_another_length_is_refused(model, tmp_path):
    document = {"input_ids": [3, 4, 5], "keep": [True]}
    with pytest.raises(ValueError, match="expected keep of 3 values in document 0, got 1"):
        harvest(model, TOKENIZER, [document], SITE, tmp_path)


def test_max_tokens_is_exact(model, tmp_path):
    seen = []
    manifest = harvest(
        model, TOKENIZER, DOCUMENTS, SITE, tmp_path, context=20, batch_size=2, max_tokens=50,
        progress=seen.append,
    )  # fmt: skip
    assert manifest.rows("train") + manifest.rows("val") == 50 == sum(seen)


def test_the_model_is_left_as_it_was(tmp_path):
    model = tiny_model().train()
    harvest(model, TOKENIZER, DOCUMENTS, SITE, tmp_path)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


STORE = '{"format": "fastsae-activations", '
SMALL = {"context": 20, "batch_size": 1, "shard_rows": 30, "val_fraction": 0.3}


def content(folder):
    """Return the bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_after(documents):
    """Yield some documents, then fail like a killed process that could still clean up."""
    yield from DOCUMENTS[:documents]
    raise KeyboardInterrupt


@pytest.mark.parametrize("documents", range(1, 6))
def test_an_interrupted_harvest_continues_to_the_same_bytes(model, tmp_path, documents):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    harvest(model, TOKENIZER, DOCUMENTS, SITE, whole, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        harvest(model, TOKENIZER, stop_after(documents), SITE, cut, **SMALL)
    assert not (cut / "manifest.json").exists()
    forward = []
    handle = model.register_forward_pre_hook(lambda *_: forward.append(1))
    harvest(model, TOKENIZER, DOCUMENTS, SITE, cut, **SMALL)
    handle.remove()
    assert content(cut) == content(whole)
    assert len(forward) < len(list(chunks(TOKENIZER, DOCUMENTS, 20)))


def test_an_interrupted_harvest_is_used_by_name_only(model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        harvest(model, TOKENIZER, stop_after(5), SITE, tmp_path, **SMALL | {"val_fraction": 0})
    with pytest.raises(ValueError, match=r"got an interrupted one of 390 rows; run the same"):
        ActivationStore(tmp_path)
    store = ActivationStore(tmp_path, partial=True)
    assert not store.manifest.complete
    assert len(store) == TOTAL // 30 * 30 == 390
    assert sorted(store.doc_ids().unique().tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"context": 30}, "expected context = 20 as in the interrupted harvest in .*, got 30"),
        ({"batch_size": 2}, "expected batch_size = 1 as in the interrupted"),
        ({"texts": ["other", *DOCUMENTS]}, "expected the documents of the interrupted harvest"),
        ({"model": tiny_model("gpt2")}, "expected model = "),
    ],
)
def test_another_harvest_does_not_continue_it(model, tmp_path, changed, message):
    with pytest.raises(KeyboardInterrupt):
        harvest(model, TOKENIZER, stop_after(4), SITE, tmp_path, **SMALL)
    before = content(tmp_path)
    arguments = {"model": model, "texts": DOCUMENTS, **SMALL, **changed}
    sites = {"sites": SITE if "model" not in changed else "resid_post.0"}
    with pytest.raises(ValueError, match=message):
        harvest(tokenizer=TOKENIZER, out=tmp_path, **sites, **arguments)
    assert content(tmp_path) == before
    harvest(tokenizer=TOKENIZER, out=tmp_path, overwrite=True, **sites, **arguments)
    assert ActivationStore(tmp_path).manifest.complete


def test_other_weights_do_not_continue_it(model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        harvest(model, TOKENIZER, stop_after(4), SITE, tmp_path, **SMALL)
    other = tiny_model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight += 1e-3
    with pytest.raises(ValueError, match="expected weights = "):
        harvest(other, TOKENIZER, DOCUMENTS, SITE, tmp_path, **SMALL)


def test_a_stop_signal_keeps_all_rows_so_far(model, tmp_path):
    def texts():
        for i, text in enumerate(DOCUMENTS):
            if i == 3:
                signal.raise_signal(signal.SIGTERM)
            yield text

    with pytest.raises(KeyboardInterrupt, match=r"SIGTERM after \d+ rows; they are in .*continues"):
        harvest(model, TOKENIZER, texts(), SITE, tmp_path, **SMALL | {"shard_rows": 1000})
    assert sorted(content(tmp_path)) == [
        "manifest.partial.json",
        "waiting-train-00000.safetensors",
        "waiting-val-00001.safetensors",
    ]


def test_a_replacement_that_wrote_nothing_permits_nothing(model, tmp_path):
    harvest(model, TOKENIZER, DOCUMENTS, SITE, tmp_path, **SMALL)
    before = content(tmp_path)
    writer = ShardWriter(tmp_path, Manifest(model="x", dtype="float16"), 30, first=99)
    writer._write_partial({})  # killed before its first shard
    with pytest.raises(FileExistsError, match="already holds a complete harvest"):
        harvest(model, TOKENIZER, DOCUMENTS[:1], SITE, tmp_path, **SMALL)
    assert {name: content(tmp_path)[name] for name in before} == before


def test_a_signal_in_the_last_batch_stops_what_comes_next(model, tmp_path):
    def texts():
        yield from DOCUMENTS
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"SIGINT; the harvest in .* is complete"):
        harvest(model, TOKENIZER, texts(), SITE, tmp_path, **SMALL)
    assert len(ActivationStore(tmp_path)) > 0


def test_a_failed_replacement_leaves_the_old_harvest(model, tmp_path):
    harvest(model, TOKENIZER, DOCUMENTS, SITE, tmp_path, **SMALL)
    before = content(tmp_path)
    for texts, error in (
        ([""], ValueError),
        (["a", 3], TypeError),
        (stop_after(0), KeyboardInterrupt),
    ):
        with pytest.raises(error):
            harvest(model, TOKENIZER, texts, SITE, tmp_path, overwrite=True, **SMALL)
        assert content(tmp_path) == before
    with pytest.raises(KeyboardInterrupt):
        harvest(model, TOKENIZER, stop_after(4), SITE, tmp_path, overwrite=True, **SMALL)
    assert len(ActivationStore(tmp_path, split="val").rows()) > 0
    assert {name: content(tmp_path)[name] for name in before} == before


def test_files_of_others_are_never_removed(model, tmp_path):
    for name in ("shard-mine.safetensors", "shard-00000.safetensors.bak", "notes.txt"):
        (tmp_path / name).write_text("mine")
    harvest(model, TOKENIZER, DOCUMENTS, SITE, tmp_path)
    harvest(model, TOKENIZER, DOCUMENTS[:2], SITE, tmp_path, overwrite=True)
    for name in ("shard-mine.safetensors", "shard-00000.safetensors.bak", "notes.txt"):
        assert (tmp_path / name).read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "shard-00007.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match=r"hold no files of others, got shard-00007"):
        harvest(model, TOKENIZER, DOCUMENTS, SITE, other)
    assert [path.name for path in other.iterdir()] == ["shard-00007.safetensors"]


def test_a_full_disk_is_one_line_and_keeps_complete_shards(model, tmp_path, monkeypatch):
    shards = []

    def replace(source, target, move=os.replace):
        if "shard" in str(target):
            shards.append(target)
            if len(shards) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        move(source, target)

    monkeypatch.setattr(os, "replace", replace)
    settings = SMALL | {"val_fraction": 0}
    with pytest.raises(OSError, match="disk full while writing shard-00001") as caught:
        harvest(model, TOKENIZER, DOCUMENTS, SITE, tmp_path, **settings)
    assert caught.value.errno == errno.ENOSPC
    assert "1 complete shards (30 rows) are kept" in str(caught.value)
    assert len(ActivationStore(tmp_path, partial=True)) == 30
    monkeypatch.undo()
    harvest(model, TOKENIZER, DOCUMENTS, SITE, tmp_path, **settings)
    assert len(ActivationStore(tmp_path)) == TOTAL


def test_a_context_longer_than_the_model_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="expected context <= 256, the positions of the model"):
        harvest(model, TOKENIZER, DOCUMENTS, SITE, tmp_path, context=257)


def test_a_complete_harvest_is_not_overwritten_by_accident(model, tmp_path):
    harvest(model, TOKENIZER, DOCUMENTS, SITE, tmp_path)
    with pytest.raises(FileExistsError, match="already holds a complete harvest"):
        harvest(model, TOKENIZER, DOCUMENTS, SITE, tmp_path)
    harvest(model, TOKENIZER, DOCUMENTS[:1], SITE, tmp_path, overwrite=True, meta={"a": 1})
    assert len(ActivationStore(tmp_path)) == len(DOCUMENTS[0])
    assert json.loads((tmp_path / "manifest.json").read_text())["meta"] == {"a": 1}


def test_activations_that_do_not_fit_are_an_error(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[5:] *= 1e6
    with pytest.raises(ValueError, match="more than the float16 maximum 65504; use dtype bfloat16"):
        harvest(model, TOKENIZER, DOCUMENTS, SITE, tmp_path)
    harvest(model, TOKENIZER, DOCUMENTS, SITE, tmp_path, dtype=torch.bfloat16)
    assert ActivationStore(tmp_path).rows().isfinite().all()
    with torch.no_grad():
        model.model.embed_tokens.weight[5:] = float("nan")
    with pytest.raises(ValueError, match=f"site {SITE} gave an activation that is not finite"):
        harvest(model, TOKENIZER, DOCUMENTS, SITE, tmp_path / "nan")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 1}, "expected context >= 2, got 1"),
        ({"drop_prefix": 20, "context": 20}, "expected 0 <= drop_prefix < context = 20, got 20"),
        ({"val_fraction": 1.0}, r"expected val_fraction in \[0, 1\), got 1.0"),
        ({"shard_rows": 0}, "expected shard_rows >= 1, got 0"),
        ({"max_tokens": 0}, "expected max_tokens >= 1, got 0"),
        ({"max_norm_ratio": -1.0}, "expected max_norm_ratio > 0 or None, got -1.0"),
        ({"dtype": torch.int16}, "expected dtype float16, .*, int8, got torch.int16"),
        ({"sites": [SITE, SITE]}, "expected one or more different sites"),
        ({"sites": "resid_post.9"}, "expected a layer in 0..2, got 9"),
        ({"texts": []}, "expected at least one token of text"),
    ],
)
def test_bad_arguments(model, tmp_path, arguments, message):
    arguments = {"texts": DOCUMENTS, "sites": SITE, **arguments}
    with pytest.raises(ValueError, match=message):
        harvest(model, TOKENIZER, out=tmp_path, **arguments)


def test_texts_are_documents(model, tmp_path):
    with pytest.raises(TypeError, match="iterable of documents, got one str"):
        harvest(model, TOKENIZER, "one string", SITE, tmp_path)
    with pytest.raises(TypeError, match=r"document 1 to be a str or token ids \[t\], got int"):
        harvest(model, TOKENIZER, ["a", 3], SITE, tmp_path)


def test_chunks_lose_no_token_and_padding_is_marked():
    got = list(chunks(TOKENIZER, ["abcdefg", "", "xy"], 4, prefix=9))
    assert [(len(c.ids), c.ids[0], c.doc) for c in got] == [
        (4, 9, 0), (4, 9, 0), (2, 9, 0), (3, 9, 2),
    ]  # fmt: skip
    tokens, real = pad([[1, 2, 3], [4]], 7)
    assert tokens.tolist() == [[1, 2, 3], [4, 7, 7]]
    assert real.tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize(("fraction", "n"), [(0.0, 0), (0.1, 10), (0.15, 15), (0.5, 50)])
def test_the_held_out_share_is_exact(fraction, n):
    assert sum(held_out(doc, fraction) for doc in range(100)) == n


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is not a manifest of fastsae-activations"),
        ("{", "to be JSON, got "),
        ("[1]", "to be a JSON object, got list"),
        ("[" * 200_000, "to be JSON, got "),
        ("\xff", "to be JSON, got "),
        (STORE + '"version": 3}', r"expected version 2 .* got 3; update"),
        (STORE + '"version": 2}', "to have a checksum, got none"),
        (STORE + '"version": 1}', "expected model in .* to be str, got none"),
    ],
)  # fmt: skip
def test_a_foreign_manifest_is_refused(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as caught:
        Manifest.read(tmp_path)
    assert "manifest.json" in str(caught.value)
    assert "\n" not in str(caught.value)
