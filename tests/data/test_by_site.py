"""One pass over the model feeds several trainers, each of which resumes to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastsae import BatchTopKSAE, TopKSAE, TrainConfig, Trainer
from fastsae.data import ActivationStore, TensorSource, by_site, harvest, stream
from tests.models.tiny import DOCUMENTS, CharTokenizer, D, tiny_model

SITES = ["resid_post.0", "mlp_out.1", "attn_z.2"]
TEXTS = [f"{i} {text}" for i in range(8) for text in DOCUMENTS]
STEPS = 24


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def source(model, sites=SITES):
    return stream(
        model, CharTokenizer(), TEXTS, sites, context=20, batch_size=3, buffer_rows=400
    )  # fmt: skip


def trainers():
    """One of each kind, by site, before its first step."""
    torch.manual_seed(0)
    config = TrainConfig(steps=STEPS, batch_size=50, progress=False)
    kinds = (TopKSAE, BatchTopKSAE, TopKSAE)
    return {
        site: Trainer(cls(D, 32, k=4), None, config) for site, cls in zip(SITES, kinds, strict=True)
    }


def run(batches, made, steps):
    for rows in itertools.islice(batches, steps):
        for site, trainer in made.items():
            trainer.step(rows[site])


def test_rows_are_those_of_streams_of_one_site(model):
    """By content: a stream of one site shuffles with the same seed, so its batches are the same."""
    together = by_site(source(model), 50, seed=3)
    alone = {site: source(model, site).batches(50, seed=3) for site in SITES}
    for _ in range(6):
        rows = next(together)
        assert list(rows) == SITES
        for site in SITES:
            torch.testing.assert_close(rows[site], next(alone[site]), rtol=1e-5, atol=1e-6)


def test_the_model_runs_once_for_all_sites(model):
    count = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: count.append(1))
    try:
        batches = source(model, SITES[0]).batches(50, seed=None)
        list(batches)
        once = len(count)
        count.clear()
        list(by_site(source(model), 50, seed=None))
        assert len(count) == once
    finally:
        handle.remove()


@pytest.mark.parametrize("stop", [1, 7, 20])
def test_all_of_them_resume_to_the_same_bits(model, tmp_path, stop):
    whole = trainers()
    batches = by_site(source(model), 50)
    sample = batches.sample(500)
    for site, trainer in whole.items():
        trainer.prepare(sample[site])
    run(batches, whole, STEPS)

    cut = trainers()
    batches = by_site(source(model), 50)
    sample = batches.sample(500)
    for site, trainer in cut.items():
        trainer.prepare(sample[site])
    run(batches, cut, stop)
    state = {site: trainer.state_dict() for site, trainer in cut.items()}
    torch.save({"batches": batches.state_dict(), **state}, tmp_path / "state.pt")
    run(batches, cut, 2)  # steps that are lost

    state = torch.load(tmp_path / "state.pt")
    again, batches = trainers(), by_site(source(model), 50)
    batches.load_state_dict(state["batches"])
    for site, trainer in again.items():
        trainer.load_state_dict(state[site])
    run(batches, again, STEPS - stop)
    for site in SITES:
        assert again[site].steps_done == STEPS
        for a, b in zip(
            whole[site].sae.state_dict().values(), again[site].sae.state_dict().values(),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(a, b)


def test_a_store_of_several_sites(model, tmp_path):
    harvest(
        model, CharTokenizer(), TEXTS, SITES, tmp_path, context=20, dtype="int8", val_fraction=0
    )
    store = ActivationStore(tmp_path, SITES[::-1])
    assert store.widths == dict.fromkeys(SITES[::-1], D)
    rows = torch.cat([part["mlp_out.1"] for part in by_site(store, 64, seed=None)])
    assert torch.equal(rows, ActivationStore(tmp_path, "mlp_out.1").rows())
    first = by_site(store, 64)
    next(first)
    second = by_site(store, 64)
    second.load_state_dict(first.state_dict())
    wanted, got = next(first), next(second)
    assert all(torch.equal(wanted[site], got[site]) for site in SITES)


def test_bad_arguments(model):
    with pytest.raises(TypeError, match=r"expected source to be a Stream or .* got TensorSource"):
        by_site(TensorSource(torch.zeros(4, 3)), 2)
    with pytest.raises(ValueError, match="expected a seed for batches with a state, got None"):
        by_site(source(model), 50, seed=None).state_dict()
