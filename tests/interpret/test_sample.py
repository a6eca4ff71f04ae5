"""Sampled contexts against a search through all activations."""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest
import torch

import fastsae
from fastsae.interpret import ContextSample, sample_contexts
from fastsae.interpret.sample import EDGES, uniform
from fastsae.nn import JumpReLUSAE, TopKSAE
from tests.interpret.stores import documents, write_store

N, D, F, WIDTH = 3000, 12, 40, 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    docs, places = documents(N, [37, 5, 120, 64], 50)
    token_ids = torch.arange(N)
    store = write_store(
        tmp_path_factory.mktemp("store"), torch.randn(N, D), token_ids, docs, places
    )
    return store, docs, places


def windows_by_hand(docs, places):
    """Return lists of rows, a loop over tokens."""
    out = []
    for row in range(len(docs)):
        goes_on = (
            row > 0
            and docs[row] == docs[row - 1]
            and places[row] == places[row - 1] + 1
            and len(out[-1]) < WIDTH
        )
        if goes_on:
            out[-1].append(row)
        else:
            out.append([row])
    return out


@pytest.mark.parametrize("kind", [TopKSAE, JumpReLUSAE])
@pytest.mark.parametrize("batch_size", [30, 4096])
def test_it_is_what_a_search_finds(made, kind, batch_size):
    store, docs, places = made
    torch.manual_seed(1)
    sae = TopKSAE(D, F, k=3) if kind is TopKSAE else JumpReLUSAE(D, F)
    sample = sample_contexts(sae, store, width=WIDTH, top=5, drawn=6, batch_size=batch_size)
    code = sae.eval().encode(store.rows()).detach()
    windows = windows_by_hand(docs, places)
    assert sample.windows == len(windows)
    assert sample.tokens == N
    assert torch.equal(sample.counts, (code > 0).sum(0))
    torch.testing.assert_close(sample.largest, code.amax(0))
    torch.testing.assert_close(
        sample.mean.double(), code.double().sum(0) / (code > 0).sum(0).clamp(min=1)
    )
    for latent in range(F):
        values = code[:, latent][code[:, latent] > 0]
        bins = torch.tensor([int((v >= EDGES).sum()) for v in values], dtype=torch.long)
        assert torch.equal(
            sample.histogram[latent], torch.bincount(bins, minlength=len(EDGES) + 1).int()
        )
        peaks = [(float(code[w, latent].max()), w) for w in windows]
        peaks = sorted(((v, w) for v, w in peaks if v > 0), key=lambda p: -p[0])
        top = sample.top(latent)
        assert [c.token_ids for c in top] == [w for _, w in peaks[:5]]
        for context, (value, window) in zip(top, peaks, strict=False):
            expected = code[window, latent].double()
            assert context.acts[context.peak] == pytest.approx(value, rel=1e-5)
            assert torch.allclose(torch.tensor(context.acts).double(), expected, rtol=5e-4, atol=0)
        fires = [w for _, w in peaks]
        drawn = [c.token_ids for c in sample.drawn(latent)]
        assert len(drawn) == min(6, len(fires))
        assert all(window in fires for window in drawn)
        assert len({w[0] for w in drawn}) == len(drawn)
        strengths = [max(c.acts) for c in sample.drawn(latent)]
        assert strengths == sorted(strengths, reverse=True)


def test_how_rows_are_batched_changes_nothing(made):
    store = made[0]
    torch.manual_seed(1)
    sae = TopKSAE(D, F, k=3)
    one, other = (
        sample_contexts(sae, store, width=WIDTH, top=4, drawn=9, batch_size=n) for n in (17, 900)
    )
    for name, x in one._tensors.items():
        torch.testing.assert_close(x, other._tensors[name], rtol=1e-3, atol=1e-6, msg=name)


def test_every_window_is_drawn_equally_often(made):
    store, docs, places = made
    torch.manual_seed(2)
    sae = TopKSAE(D, F, k=3)
    fires = sae.eval().encode(store.rows()).detach()[:, 0] > 0
    rows = [w[0] for w in windows_by_hand(docs, places) if fires[w].any()]
    draws = torch.zeros(N)
    times, n = 60, 8
    for seed in range(times):
        for context in sample_contexts(sae, store, width=WIDTH, top=0, drawn=n, seed=seed).drawn(0):
            draws[context.token_ids[0]] += 1
    assert draws.sum() == times * n
    expected = times * n / len(rows)
    chi2 = float(((draws[rows] - expected) ** 2 / expected).sum())
    degrees = len(rows) - 1
    assert abs(chi2 - degrees) < 5 * (2 * degrees) ** 0.5
    assert draws.sum() == draws[rows].sum()


def test_uniform_numbers():
    x = uniform(torch.arange(200_000), 3)
    assert float(x.min()) >= 0
    assert float(x.max()) < 1
    for a, b in ((0.0, 0.1), (0.45, 0.55), (0.9, 1.0)):
        assert abs(float(((x >= a) & (x < b)).double().mean()) - 0.1) < 0.004
    assert (
        abs(float(torch.corrcoef(torch.stack([x, uniform(torch.arange(200_000), 4)]))[0, 1])) < 0.01
    )


def test_quantiles_are_equal_parts_of_what_was_drawn(made):
    store = made[0]
    sample = sample_contexts(TopKSAE(D, F, k=3), store, width=WIDTH, top=1, drawn=20)
    latent = int(sample.counts.argmax())
    groups = sample.quantiles(latent, quantiles=4, n=3)
    assert [len(g) for g in groups] == [3, 3, 3, 3]
    peaks = [[max(c.acts) for c in g] for g in groups]
    assert all(min(a) >= max(b) for a, b in pairwise(peaks))
    whole = sample.quantiles(latent, quantiles=4, n=5)
    assert [context for group in whole for context in group] == sample.drawn(latent)


def test_text_that_repeats_is_counted_and_kept_once(tmp_path):
    x = torch.rand(4 * WIDTH, D) + 0.1
    ids = torch.cat([torch.arange(WIDTH)] * 3 + [100 + torch.arange(WIDTH)])
    docs = torch.arange(4).repeat_interleave(WIDTH)
    store = write_store(tmp_path, x, ids, docs, torch.arange(WIDTH).repeat(4) + 1)
    sae = TopKSAE(D, D, k=D)
    with torch.no_grad():
        sae.W_enc, sae.W_dec = torch.eye(D), torch.eye(D)
    sample = sample_contexts(sae, store, width=WIDTH, top=4, drawn=4)
    assert sample.counts.tolist() == [4 * WIDTH] * D
    for contexts in (sample.top(0), sample.drawn(0)):
        assert sorted(c.token_ids[0] for c in contexts) == [0, 100]
    (tmp_path / "images").mkdir()
    store = write_store(
        tmp_path / "images", x, torch.full((len(x),), -1), docs, torch.arange(WIDTH).repeat(4) + 1
    )
    sample = sample_contexts(sae, store, width=WIDTH, top=4, drawn=4)
    assert len(sample.top(0)) == len(sample.drawn(0)) == 4


def test_a_saved_sample_is_the_same_and_knows_its_sae(made, tmp_path):
    store = made[0]
    sae = TopKSAE(D, F, k=3)
    sample = sample_contexts(sae, store, width=WIDTH, top=2, drawn=3)
    sample.save(tmp_path / "contexts.safetensors")
    read = ContextSample.open(tmp_path / "contexts.safetensors", verify=True)
    assert read.about == sample.about
    assert read.top(5) == sample.top(5)
    assert read.drawn(5) == sample.drawn(5)
    other = sample_contexts(TopKSAE(D, F, k=3), store, width=WIDTH)
    assert other.about["sae"] != sample.about["sae"]
    assert other.about["store"] == sample.about["store"]


def test_what_is_wrong_is_one_line(made, tmp_path):
    store = made[0]
    with pytest.raises(ValueError, match=r"expected rows of 13 numbers like the SAE's, got 12"):
        sample_contexts(TopKSAE(13, F, k=3), store)
    with pytest.raises(ValueError, match=r"expected width >= 1, got 0"):
        sample_contexts(TopKSAE(D, F, k=3), store, width=0)
    sample = sample_contexts(TopKSAE(D, F, k=3), store, width=WIDTH)
    with pytest.raises(ValueError, match=r"expected a latent in 0\.\.39, got 40"):
        sample.top(40)
    with pytest.raises(FileNotFoundError, match=r"ContextSample\.open"):
        ContextSample.open(tmp_path / "nothing")
    sample.save(tmp_path / "c")
    data = bytearray((tmp_path / "c").read_bytes())
    data[-5] ^= 1
    (tmp_path / "c").write_bytes(data)
    with pytest.raises(ValueError, match="as it was written"):
        ContextSample.open(tmp_path / "c", verify=True)


def test_verify_compares_all_of_it(made, tmp_path):
    sae = TopKSAE(D, F, k=3)
    sample_contexts(sae, made[0], width=WIDTH).save(tmp_path / "contexts.safetensors")
    fastsae.save(sae, tmp_path / "sae")
    shutil.copy(tmp_path / "contexts.safetensors", tmp_path / "sae")
    for folder, kind in ((tmp_path, "contexts"), (tmp_path / "sae", "SAE")):
        found = fastsae.verify(folder)
        assert (found.kind, found.problems) == (kind, [])
        assert str(folder / "contexts.safetensors") in map(str, found.checked)
        data = bytearray((folder / "contexts.safetensors").read_bytes())
        data[len(data) // 2] ^= 4
        (folder / "contexts.safetensors").write_bytes(data)
        (problem,) = fastsae.verify(folder).problems
        assert "contexts.safetensors" in problem
