"""Rows straight from a model are those of a harvest, mixed, the same again, and resumable."""

from __future__ import annotations

import gc
import itertools
import sys
import time

import pytest
import torch

from fastsae import BatchTopKSAE, TopKSAE, TrainConfig, Trainer
from fastsae.data import ActivationStore, harvest, stream
from fastsae.models import check_sites, read, replace, resolve
from tests.models.tiny import DOCUMENTS, CharTokenizer, D, tiny_model

MODULE = sys.modules["fastsae.data.stream"]  # whose name in the package is the function
TEXTS = [f"{i} {text}" for i in range(8) for text in DOCUMENTS]
SITE = "resid_post.1"
SMALL = {"context": 20, "batch_size": 3}


class InOrder:
    """Documents that can be iterated again, but not indexed."""

    def __iter__(self):
        return iter(TEXTS)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def harvested(model, tmp_path_factory):
    """All rows of a pass, in order, from a store."""
    out = tmp_path_factory.mktemp("store")
    rows = {"val_fraction": 0, "dtype": torch.float32}
    harvest(model, CharTokenizer(), TEXTS, SITE, out, **SMALL, **rows)
    return ActivationStore(out).rows()


def source(model, texts=TEXTS, sites=SITE, **options):
    return stream(model, CharTokenizer(), texts, sites, **{**SMALL, "buffer_rows": 400, **options})


def ordered(rows: torch.Tensor) -> torch.Tensor:
    """Rows sorted by their numbers, so that two sets of rows can be compared."""
    return torch.tensor(sorted(map(tuple, rows.tolist())))


def test_one_pass_in_order_is_the_harvest(model, harvested):
    batches = list(source(model).batches(64, seed=None))
    assert {len(batch) for batch in batches[:-1]} == {64}
    assert torch.equal(torch.cat(batches), harvested)


def test_every_row_comes_once_in_a_pass_and_rows_are_mixed(model, harvested, monkeypatch):
    monkeypatch.setattr(MODULE, "WAITING", 1)  # contexts come as they are
    n = len(harvested)
    rows = torch.cat(list(itertools.islice(source(model, InOrder()).batches(50), 2 * n // 50)))
    for start in range(0, n - 200, 200):  # what half a buffer holds
        half = rows[start : start + 200]
        assert torch.equal(ordered(half), ordered(harvested[start : start + 200]))
        assert not torch.equal(half, harvested[start : start + 200])
    # The second pass begins anew, within the half in which the first one ends.
    again = rows[-(-n // 200) * 200 :]
    place = -(-n // 200) * 200 - n
    assert torch.equal(ordered(again[:200]), ordered(harvested[place : place + 200]))


def test_documents_that_can_be_indexed_come_in_another_order_each_pass(model, harvested):
    n = len(harvested)
    whole = source(model, buffer_rows=2 * n).batches(n)  # half a buffer is a pass
    first, second = next(whole), next(whole)
    for rows in (first, second):
        distance = torch.cdist(rows.double(), harvested.double())
        assert float(distance.min(1).values.max()) < 1e-4
        assert float(distance.min(0).values.max()) < 1e-4
    parts = source(model, buffer_rows=n).batches(n // 4)  # half of one; two parts are a half
    halves = [torch.cat([next(parts), next(parts)]) for _ in range(4)]
    in_order = harvested[: len(halves[0])]
    for rows in (halves[0], halves[2]):
        assert float(torch.cdist(rows, in_order).min(1).values.max()) > 0.1
    assert float(torch.cdist(halves[0], halves[2]).min(1).values.max()) > 0.1


def test_contexts_of_an_iterator_are_mixed_among_those_that_wait(model, harvested, monkeypatch):
    monkeypatch.setattr(MODULE, "WAITING", 16)
    n = len(harvested)
    rows = torch.cat(list(source(model, iter(TEXTS), buffer_rows=60).batches(30)))
    assert n - 30 < len(rows) <= n
    distance = torch.cdist(rows.double(), harvested.double())
    assert float(distance.min(1).values.max()) < 1e-4
    assert float((distance.min(0).values > 1e-4).double().mean()) < 0.02
    places = distance.argmin(1)  # of the first row that is the same; texts repeat, so often early
    assert int(places[:60].max()) > 200  # 16 contexts of up to 19 tokens wait


def test_a_seed_says_the_order(model):
    first, again, other = (
        torch.cat(list(itertools.islice(source(model).batches(64, seed=seed), 9)))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("taken", [0, 1, 5, 6, 20, 41])
def test_a_state_continues_where_it_was_taken(model, taken):
    """Halves of 192 rows hold three batches of 64, and begin amid batches of contexts."""
    batches = source(model).batches(64)
    for _ in range(taken):
        next(batches)
    state = batches.state_dict()
    wanted = torch.cat([next(batches) for _ in range(8)])
    later = source(model).batches(64)
    later.load_state_dict(state)
    assert torch.equal(torch.cat([next(later) for _ in range(8)]), wanted)
    assert later.state_dict() == batches.state_dict()


def test_other_documents_are_noticed(model):
    batches = source(model).batches(64)
    for _ in range(9):
        next(batches)
    other = source(model, ["another document", *TEXTS]).batches(64)
    other.load_state_dict(batches.state_dict())
    with pytest.raises(ValueError, match="expected the documents that the run began with"):
        next(other)


@pytest.mark.parametrize("cls", [TopKSAE, BatchTopKSAE])
def test_a_run_that_is_resumed_ends_in_the_same_bits(model, tmp_path, cls):
    def train(folder, steps_then_stop=None):
        torch.manual_seed(0)
        sae = cls(D, 64, k=4)
        config = TrainConfig(
            steps=40, batch_size=50, out=str(tmp_path / folder), checkpoint_every=7,
            progress=False, calibration_rows=100,
        )  # fmt: skip
        trainer = Trainer(sae, source(model), config)
        if steps_then_stop is None:
            return trainer.fit(resume=True).sae
        original, count = trainer._step, itertools.count(1)

        def step(x):
            if next(count) > steps_then_stop:
                raise KeyboardInterrupt
            return original(x)

        trainer._step = step
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        return sae

    whole = train("whole")
    train("cut", steps_then_stop=25)
    resumed = train("cut")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_what_is_held_back_is_not_trained_on(model, harvested):
    rest, held = source(model).hold_back(30)
    kept = torch.cat(list(held.batches(16, seed=None)))
    assert kept.shape == (30, D)
    n = len(harvested)
    trained = torch.cat(list(itertools.islice(rest.batches(50), 2 * n // 50)))
    distance = torch.cdist(kept.double(), trained.double()).min(1).values
    inside = torch.cdist(kept.double(), harvested.double()).min(1).values
    assert float(inside.max()) < 1e-6
    # Rows of other documents may be alike at their first tokens, not all of them.
    assert float((distance > 1e-3).double().mean()) > 0.5


def test_an_iterator_is_read_once_and_loses_nothing_to_a_sample(model, harvested):
    once = source(model, iter(TEXTS))
    sample = once.sample(50)
    assert float(torch.cdist(sample.double(), harvested.double()).min(1).values.max()) < 1e-6
    rows = torch.cat(list(once.batches(10)))
    whole = len(harvested) // 10 * 10
    assert len(rows) in (whole, whole - 10)
    distance = torch.cdist(rows.double(), harvested.double())
    assert float(distance.min(1).values.max()) < 1e-4
    assert float((distance.min(0).values > 1e-4).double().mean()) < 0.02
    with pytest.raises(RuntimeError, match="expected texts that can be iterated again"):
        next(once.batches(10))


def test_several_sites_are_columns(model):
    both = source(model, sites=["mlp_in.1", "mlp_out.1"])
    assert both.d_in == 2 * D
    x, y = next(both.batches(64)).split(D, 1)
    torch.testing.assert_close(model.model.layers[1].mlp(x), y, rtol=1e-4, atol=1e-5)


def test_rows_of_huge_norm_are_left_out(model, harvested):
    limited = source(model, max_norm_ratio=1.2)
    rows = torch.cat(list(limited.batches(64, seed=None)))
    norm = harvested.norm(dim=1)
    assert torch.equal(rows, harvested[norm <= 1.2 * norm.median()])
    assert limited.max_norm == pytest.approx(1.2 * float(norm.median()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer_rows": 0}, "expected buffer_rows >= 1, got 0"),
        ({"context": 1}, "expected context >= 2"),
        ({"context": 10_000}, "stream: expected context <= 256, the positions of the model"),
        ({"drop_prefix": 20}, "expected 0 <= drop_prefix < context = 20, got 20"),
        ({"max_norm_ratio": 0.0}, "expected max_norm_ratio > 0 or None, got 0.0"),
        ({"sites": ["resid_post.1", "resid_post.1"]}, "one or more different sites"),
        ({"sites": "resid_post.7"}, "expected a layer in 0..2"),
    ],
)
def test_bad_settings(model, options, message):
    with pytest.raises(ValueError, match=message):
        source(model, **options)
    with pytest.raises(ValueError, match=r"buffer_rows >= 2 \* batch_size = 1000, got 400"):
        source(model).batches(500)


def test_neither_the_stream_nor_others_see_each_others_hooks(model, harvested, monkeypatch):
    """The thread that fills the buffer runs the model while this one replaces and reads."""
    monkeypatch.setattr(MODULE, "WAITING", 1)
    tokens = torch.arange(5, 25).view(2, 10)
    other = [resolve(model, "mlp_out.0"), resolve(model, "attn_out.2")]
    wanted = read(model, other, tokens)
    with torch.no_grad():
        clean = model(input_ids=tokens).logits
        batches = source(model, InOrder(), buffer_rows=200).batches(50, seed=0)
        with replace(model, "resid_pre.1", torch.zeros_like):
            replaced = model(input_ids=tokens).logits
            rows = []
            for _ in range(20):
                rows.append(next(batches))
                assert torch.equal(model(input_ids=tokens).logits, replaced)
        for _ in range(10):
            rows.append(next(batches))
            assert torch.equal(model(input_ids=tokens).logits, clean)
            got = read(model, other, tokens)
            assert all(torch.equal(got[name], x) for name, x in wanted.items())
            assert check_sites(model, "mlp_out.1")["mlp_out.1"].written == "exact"
    every = torch.cat(rows)
    assert torch.equal(ordered(every[:100]), ordered(harvested[:100]))
    distance = torch.cdist(every.double(), harvested.double()).min(1).values
    assert float(distance.max()) < 1e-4


def test_no_text_is_an_error(model):
    with pytest.raises(ValueError, match="expected at least one token of text"):
        next(source(model, ["", ""]).batches(10))


def test_the_limit_of_norms_is_part_of_the_state(model):
    def limited():
        return source(model, buffer_rows=300, max_norm_ratio=1.05)

    first = limited()
    first.sample(20, seed=5)  # which finds a limit in another order
    batches = first.batches(50, seed=1)
    for _ in range(4):
        next(batches)
    state = batches.state_dict()
    wanted = torch.cat([next(batches) for _ in range(6)])
    second = limited()
    later = second.batches(50, seed=1)
    later.load_state_dict(state)
    assert torch.equal(torch.cat([next(later) for _ in range(6)]), wanted)
    assert second.max_norm == first.max_norm


def test_a_model_in_training_mode_is_refused():
    model = tiny_model().train()
    with pytest.raises(RuntimeError, match="expected LlamaForCausalLM in eval mode"):
        next(source(model).batches(50))


def test_the_thread_ends_with_the_batches(model):
    """It stops after the batch of contexts that it is at; no process waits for half a buffer."""
    slow = tiny_model()
    slow.model.layers[0].register_forward_hook(lambda *_: time.sleep(0.02))
    batches = source(slow, TEXTS * 50, buffer_rows=800, batch_size=1).batches(50)
    next(batches)
    (thread,) = batches._threads
    assert thread.is_alive()
    assert thread.daemon
    start = time.monotonic()
    del batches
    gc.collect()
    assert not thread.is_alive()
    assert time.monotonic() - start < 20


def test_one_of_a_few_documents_is_held_back(model):
    rest, held = source(model, [[5, 6, 7, 8]] * 3).hold_back(100)
    counts = [sum(map(len, part.batches(16, seed=None))) for part in (rest, held)]
    assert counts == [8, 4]
