"""Several SAEs from one pass over the data: each is the one that its trainer gives alone."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch

import fastsae
from fastsae import TrainConfig, Trainer, load
from fastsae.data import ActivationStore, TensorSource, only_sites
from fastsae.data.source import EpochBatches
from fastsae.train import Run, latest, train_many
from fastsae.train.metrics import TIMED
from tests.train.test_resume_classes import assert_same

CLASSES = {
    "topk": lambda: fastsae.TopKSAE(8, 24, 3),
    "batchtopk": lambda: fastsae.BatchTopKSAE(8, 24, 3),
    "jumprelu": lambda: fastsae.JumpReLUSAE(8, 32, 2),
}
STEPS = {"topk": 30, "batchtopk": 30, "jumprelu": 44}


def rows(n=1000, seed=0):
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(20, 8, generator=torch.Generator().manual_seed(99))
    return torch.rand(n, 20, generator=g).pow(6) @ basis + 1


def settings(**arguments):
    defaults = {"batch_size": 50, "steps": 30, "lr": 3e-3, "progress": False, "log_every": 10}
    return TrainConfig(**defaults | {"dead_after_tokens": 300} | arguments)


def runs(**arguments):
    return [
        Run(name, build, settings(**{"steps": STEPS[name], "start_seed": 5} | arguments))
        for name, build in CLASSES.items()
    ]


def alone(run, config, data, **how):
    """Train as `Trainer` does, from the same random numbers."""
    torch.manual_seed(config.seed if config.start_seed is None else config.start_seed)
    return Trainer(run.sae(), data, config, **how).fit()


def untimed(history):
    return [{k: v for k, v in row.items() if k not in TIMED} for row in history]


def weights(folder):
    assert load(folder)
    return (folder / "sae_weights.safetensors").read_bytes()


class Counted(TensorSource):
    """Rows of two sites, of which every batch that is read is counted."""

    def __init__(self, x, act=lambda count: None):
        super().__init__(x)
        self.widths = {"a": 8, "b": x.shape[1] - 8} if x.shape[1] > 8 else {"a": 8}
        self.read, self.act = [], act

    def _take(self, chosen):
        self.read.append(len(chosen))
        self.act(len(self.read))
        return super()._take(chosen)

    @property
    def batches_read(self):
        return self.read.count(50)


@pytest.mark.parametrize("how", [{}, {"calibration_rows": 0}, {"hold_back": 60}])
def test_each_run_is_the_one_of_its_trainer(how, tmp_path):
    x, val = rows(), rows(200, seed=1)
    made = runs(**how)
    state = torch.get_rng_state()
    found = train_many(made, x, val=val, out=tmp_path / "many")
    assert torch.equal(torch.get_rng_state(), state)
    assert list(found) == list(CLASSES)
    for run in made:
        got = found[run.name]
        assert got.error is None
        assert got.steps == STEPS[run.name]
        assert got.config == replace(run.config, out=tmp_path / "many" / run.name)
        config = replace(run.config, out=tmp_path / "alone" / run.name)
        expected = alone(run, config, x, val=val)
        assert_same(expected.sae, got.sae)
        assert untimed(expected.history) == untimed(got.result.history)
        assert expected.gap == got.result.gap
        assert weights(tmp_path / "alone" / run.name) == weights(tmp_path / "many" / run.name)
        names = {p.name for p in (tmp_path / "alone" / run.name).iterdir()}
        assert names == {p.name for p in (tmp_path / "many" / run.name).iterdir()}
    assert fastsae.verify(tmp_path / "many" / "topk").ok


def test_all_hold_back_what_one_of_them_does():
    x = rows(6000)
    found = train_many(runs(), x)
    assert {r.config.hold_back for r in found.values()} == {None, 512}  # None: it does by itself
    for run in runs():
        assert_same(alone(run, found[run.name].config, x).sae, found[run.name].sae)


def test_modules_that_were_made_before_and_random_numbers_in_a_step():
    class Noisy(fastsae.TopKSAE):
        def training_loss(self, x, context):
            return super().training_loss(x + 0.01 * torch.randn_like(x), context)

    x = rows()

    def built():
        torch.manual_seed(3)
        return [Noisy(8, 24, 3), Noisy(8, 24, 2)]

    config = settings(steps=12)
    single = []
    for i in range(2):
        sae = built()[i]
        torch.manual_seed(11)
        single.append(Trainer(sae, x, config).fit().sae)
    made = built()
    torch.manual_seed(11)
    found = train_many([("x", made[0], config), ("y", made[1], config)], x)
    for sae, name in zip(single, found, strict=True):
        assert_same(sae, found[name].sae)


def test_a_batch_is_read_once_and_sites_are_columns_of_it(tmp_path):
    x = torch.cat([rows(), 3 * rows(seed=4)[:, :5]], 1)
    data = Counted(x)
    made = [
        Run("first", lambda: fastsae.TopKSAE(8, 24, 3), settings(), "a"),
        Run("second", lambda: fastsae.BatchTopKSAE(5, 16, 2), settings(), "b"),
        Run("coder", lambda: fastsae.Transcoder(5, 8, 16, 2), settings(steps=35), ["b", "a"]),
    ]
    found = train_many(made, data)
    assert data.batches_read == 35
    for run in made:
        expected = alone(run, found[run.name].config, only_sites(Counted(x), run.sites))
        assert_same(expected.sae, found[run.name].sae)
    with pytest.raises(ValueError, match=r"^train_many: run x: only_sites: expected sites to be"):
        train_many([Run("x", CLASSES["topk"], settings(), "c")], data)
    with pytest.raises(TypeError, match="expected a source with widths, such as an ActivationSto"):
        train_many([Run("x", CLASSES["topk"], settings(), "a")], rows())


def test_seeds_of_the_start_differ_on_the_same_batches():
    made = [Run(str(i), CLASSES["topk"], settings(start_seed=i)) for i in range(2)]
    found = train_many(made, rows())
    assert not torch.equal(found["0"].sae.W_dec, found["1"].sae.W_dec)
    assert_same(alone(made[1], made[1].config, rows()).sae, found["1"].sae)


@pytest.mark.parametrize("at", [7, 29, 33])
def test_an_interrupted_sweep_ends_in_the_same_bits(at, tmp_path):
    """33: two of three have finished."""
    x = rows()

    def interrupt(count):
        if count == at + 1 + armed:
            os.kill(os.getpid(), signal.SIGINT)

    whole = train_many(runs(calibration_rows=0), x, out=tmp_path / "whole")
    armed = 1  # one sample, whose n all runs share
    with pytest.raises(KeyboardInterrupt, match=r"SIGINT; checkpoints of . of . unfinished runs"):
        train_many(runs(calibration_rows=0), Counted(x, interrupt), out=tmp_path / "cut")
    done = {n: int(latest(tmp_path / "cut" / n / "checkpoints").name[5:]) for n in CLASSES}
    assert done == {name: min(at + 1, STEPS[name]) for name in CLASSES}
    data = Counted(x)
    found = train_many(runs(calibration_rows=0), data, out=tmp_path / "cut", resume=True)
    for name in CLASSES:
        assert_same(whole[name].sae, found[name].sae)
        assert untimed(whole[name].result.history) == untimed(found[name].result.history)
        assert weights(tmp_path / "whole" / name) == weights(tmp_path / "cut" / name)


def test_runs_that_stopped_at_different_steps_go_on_together(tmp_path):
    x, made = rows(), runs(calibration_rows=60, checkpoint_every=None)
    every = {"topk": 10, "batchtopk": 20, "jumprelu": 13}
    for run in made:
        run.config = replace(
            run.config, calibration_rows=None, hold_back=60, checkpoint_every=every[run.name],
            keep_checkpoints=9, out=tmp_path / run.name,
        )  # fmt: skip
    whole = train_many(made, x)
    for name, step in {"topk": 10, "batchtopk": 20, "jumprelu": 26}.items():
        for path in (tmp_path / name / "checkpoints").iterdir():
            if int(path.name[5:]) > step:
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
    data = Counted(x)
    found = train_many(made, data, resume=True)
    assert data.batches_read <= 44
    for name in CLASSES:
        assert_same(whole[name].sae, found[name].sae)
    data = Counted(x)
    train_many(made, data, resume=True)
    assert data.batches_read == 0  # all have finished


def test_rows_after_the_last_step_calibrate_all(tmp_path):
    made = runs(steps=30, calibration_rows=100)
    found = train_many(made, iter(rows(2100).split(50)))
    for run in made:
        expected = alone(run, found[run.name].config, iter(rows(2100).split(50)))
        assert_same(expected.sae, found[run.name].sae)
    with pytest.raises(ValueError, match=r"expected one number of steps for all runs, .* 30 \(top"):
        train_many(runs(calibration_rows=100), iter(rows(2100).split(50)))


def test_a_store_of_several_sites(tmp_path):
    from fastsae.data import harvest
    from tests.models.tiny import DOCUMENTS, CharTokenizer, D, tiny_model

    texts = [f"{i} {text}" for i in range(8) for text in DOCUMENTS]
    sites = ["resid_post.0", "mlp_out.1"]
    harvest(tiny_model(), CharTokenizer(), texts, sites, tmp_path, context=20)
    made = [
        Run(site, lambda: fastsae.TopKSAE(D, 32, 4), settings(steps=10), site) for site in sites
    ]
    val = ActivationStore(tmp_path, sites, split="val")
    found = train_many(made, ActivationStore(tmp_path, sites), val=val)
    for run in made:  # stores of one site, in groups of the same shards
        parts = (ActivationStore(tmp_path, run.sites, split=split) for split in ("train", "val"))
        expected = alone(run, run.config, next(parts), val=next(parts))
        assert_same(expected.sae, found[run.name].sae)
        assert untimed(expected.history) == untimed(found[run.name].result.history)


def test_a_model_runs_once_for_all_sites(tmp_path):
    from fastsae.data import stream
    from tests.models.tiny import DOCUMENTS, CharTokenizer, D, tiny_model

    model, sites = tiny_model(), ["resid_post.0", "mlp_out.1"]
    texts = [f"{i} {text}" for i in range(30) for text in DOCUMENTS]
    count = []
    model.model.layers[0].register_forward_hook(lambda *_: count.append(1))

    def source():
        return stream(
            model, CharTokenizer(), texts, sites, context=20, batch_size=3, buffer_rows=400
        )

    made = [
        Run(
            f"{cls.__name__}-{site}",
            lambda cls=cls: cls(D, 32, k=4),
            settings(steps=24, hold_back=100),
            site,
        )
        for site in sites
        for cls in (fastsae.TopKSAE, fastsae.BatchTopKSAE)
    ]
    single = [alone(run, run.config, only_sites(source(), run.sites)).sae for run in made]
    one = len(count) // len(made)
    count.clear()
    found = train_many(made, source(), out=tmp_path / "whole")
    assert len(count) < 1.5 * one  # the filling thread may be a batch of contexts further
    for run, sae in zip(made, single, strict=True):
        assert_same(sae, found[run.name].sae)

    step, sent = Trainer._step, []

    def interrupted(self, x):
        if self.steps_done == 11 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return step(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt, match="checkpoints of 4 of 4 unfinished runs"):
            train_many(made, source(), out=tmp_path / "cut")
    again = train_many(made, source(), out=tmp_path / "cut", resume=True)
    for run, sae in zip(made, single, strict=True):
        assert_same(sae, again[run.name].sae)


def test_only_sites_has_what_its_source_has():
    class Plain:
        d_in, widths = 10, {"a": 8, "b": 2}

        def batches(self, batch_size, *, seed=0):
            return iter([torch.ones(batch_size, 10)])

    part = only_sites(Plain(), ["b"])
    assert next(part.batches(4)).shape == (4, 2)
    assert not any(hasattr(part, name) for name in ("sample", "fingerprint", "hold_back"))
    assert not hasattr(part, "__len__")
    x = torch.randn(1000, 10)
    data = Counted(x)
    part = only_sites(data, ["b", "a"])
    assert len(part) == 1000
    assert torch.equal(part.sample(20), data.sample(20)[:, [8, 9, *range(8)]])
    assert part.fingerprint() != only_sites(data, ["a", "b"]).fingerprint()
    rest, held = part.hold_back(64)
    assert (len(rest), len(held)) == (936, 64)
    first = part.batches(50, seed=2)
    assert isinstance(data.batches(50), EpochBatches)
    next(first)
    second = part.batches(50, seed=2)
    second.load_state_dict(first.state_dict())
    assert torch.equal(next(first), next(second))
