"""A recorded step, replayed, is the step: to the last bit, with dead latents and through a resume.

A GPU's graph is stood in for by `recorded_graph`, and questions are left out as on a GPU.
"""

from __future__ import annotations

import copy
import gc
import logging
import shutil
import sys
import weakref
from collections import deque
from contextlib import nullcontext

import pytest
import torch

from fastsae import TrainConfig, Trainer
from fastsae.nn import SAE
from fastsae.train import captured_step
from fastsae.train.captured_step import CAPTURED, NUMBERS, WARM_UP, why_not_captured
from fastsae.train.fused_update import FusedUpdate
from fastsae.train.update import make_update, why_not_fused
from tests.conftest import EMULATED, NAMES, emulated
from tests.train.recorded_graph import NotForGraphs, RecordedGraph
from tests.train.test_no_wait import Questions

N, D, F, K, STEPS = 48, 12, 40, 4, 200
KINDS = {
    **{name: {} for name in sorted(CAPTURED)},
    "TopKSAE-multi": {"multi_topk": True},
    "TopKSAE-absolute": {"absolute": True},
    "TopKSAE-zipf": {"aux": "zipf"},
    "TopKSAE-by-norm": {"select_by_decoder_norm": True},
    "TopKSAE-uncentered": {"apply_b_dec_to_input": False},
    "BatchTopKSAE-fraction": {"k": 3.5},
    "MatryoshkaSAE-groups": {"groups": (8, 12, 20)},
    "SampledSAE-pool": {"pool": 2.0},
    "Transcoder-skip": {"skip": True},
    "FeatureChoiceSAE": {"mutual_choice_batches": 40, "refresh": 25},
    "FeatureChoiceSAE-often": {"mutual_choice_batches": 0, "refresh": 2, "allocation": "uniform"},
    "ReLUSAE-p_anneal": {"penalty": "p_anneal"},
    "ReLUSAE-fixed": {"k": None, "coefficient": 0.3},
    "JumpReLUSAE-fixed": {"k": None, "coefficient": 0.3},
    "CrossLayerTranscoder-layer": {"select": "layer", "decoders": "own"},
    "CrossLayerTranscoder-tied": {"decoders": "tied", "multi_topk": True},
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.startswith("fastsae.") and hasattr(module, "can_look"):
            monkeypatch.setattr(module, "can_look", lambda t: False)


@pytest.fixture
def graphs(monkeypatch):
    """The stand-ins that were made, in order."""
    made = []

    def make(device):
        made.append(RecordedGraph())
        return made[-1]

    monkeypatch.setattr(captured_step, "can_record", lambda device: True)
    monkeypatch.setattr(captured_step, "make_graph", make)
    return made


def make(kind, **more):
    """Return a module some of whose latents never fire at first, and die."""
    torch.manual_seed(0)
    name = kind.partition("-")[0]
    widths = (D, D) if name.endswith("Transcoder") else (D,)
    widths = (D // 2, 2) if name.endswith("CrossCoder") else widths
    options = {"k": K, "k_aux": 4, "aux": "auxk", "auxk_alpha": 1 / 32, **KINDS[kind], **more}
    latents = F
    if name.endswith("CrossLayerTranscoder"):
        widths, latents = (D // 2, 2), F // 2
    sae = SAE.registry[name](*widths, latents, **options)
    with torch.no_grad():
        sae.b_enc[::5] = -20.0
    return sae


def rows(sae, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, sum(sae.columns.widths), generator=generator)
    return torch.randn(n, 6, generator=generator).relu() @ mix


def settings(**named):
    options = {
        "steps": STEPS,
        "batch_size": N,
        "lr": 3e-3,
        "dead_after_tokens": 30 * N,
        "sparsity_warmup_steps": 40,
        "weight_init": "random",
        "log_every": 20,
        "progress": False,
        "calibration_rows": 0,
    }
    return TrainConfig(**{**options, **named})


def state(trainer, sae):
    """Everything that a step changes."""
    held = trainer.state_dict()
    return {**dict(sae.state_dict()), **flat(held["update"]), **held["dead"]}


def flat(tree, prefix="update"):
    found = {}
    for name, value in tree.items():
        where = f"{prefix}.{name}"
        found |= flat(value, where) if isinstance(value, dict) else {where: value}
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def steps_of(sae, count=STEPS, **named):
    """Yield a prepared trainer, and after each step what it returned and the state."""
    data = rows(sae, 1000)
    trainer = Trainer(sae, None, settings(**named))
    trainer.prepare(data)
    order = torch.Generator().manual_seed(2)
    for _ in range(count):
        batch = data[torch.randperm(len(data), generator=order)[:N]]
        yield trainer, trainer.step(batch)


def last(steps):
    """Do all steps; return what the last one left."""
    return deque(steps, maxlen=1).pop()


@pytest.mark.parametrize("kind", KINDS)
def test_200_replayed_steps_are_200_steps(kind, graphs):
    plain, captured = make(kind), make(kind)
    pairs = zip(steps_of(plain), steps_of(captured, capture=True), strict=True)
    aux, dead = 0, 0
    for i, ((one, a), (other, b)) in enumerate(pairs):
        for name in ("loss", "fvu", "mse", "aux_loss", "reconstruction"):
            assert torch.equal(getattr(a, name), getattr(b, name)), (i, name)
        assert torch.equal(a.acts.to_dense(), b.acts.to_dense()), i
        if i % 20 == 0 or i == STEPS - 1:
            assert_same(state(one, plain), state(other, captured))
        aux += float(b.aux_loss) > 0
        dead = max(dead, int(other._dead.mask().sum()))
    assert aux > 50
    assert dead >= 3
    (graph,) = graphs
    assert graph.counts == counts(kind, captured, STEPS)


def counts(kind, sae, steps):
    """Return what is to be recorded: latents can be dead after 30 steps, which is another kind."""
    kinds, once = 2, 0
    if kind == "FeatureChoiceSAE":  # the first step, another kind from 40 on, budgets every 25
        kinds, once = 3, 1 + len(range(40, steps, 25))
    elif kind == "FeatureChoiceSAE-often":
        once = len(range(0, steps, 2))
    elif kind.startswith("JumpReLU") and sae.k is not None:
        once = 1  # it starts the thresholds
    warm_up = kinds * WARM_UP + once
    return {"warm_up": warm_up, "record": kinds, "replay": steps - warm_up}


@pytest.mark.parametrize("named", [{"clip_grad_norm": 0.3}, {"optimizer": "adam_mini"}], ids=str)
@pytest.mark.parametrize(
    "kind", ["TopKSAE", "Transcoder-skip", "JumpReLUSAE", "GatedSAE", "FeatureChoiceSAE"]
)
def test_clipping_and_adam_mini(kind, named, graphs):
    plain, captured = make(kind), make(kind)
    one, _ = last(steps_of(plain, 60, **named))
    other, _ = last(steps_of(captured, 60, capture=True, **named))
    assert_same(state(one, plain), state(other, captured))
    further = kind in ("Transcoder-skip", "JumpReLUSAE", "GatedSAE")  # parameters, moved by torch
    assert len(graphs) == (0 if further and "optimizer" in named else 1)


@pytest.mark.skipif(EMULATED is None, reason="built without FASTSAE_EMULATION=ON")
@pytest.mark.parametrize("kind", sorted(CAPTURED))
def test_the_kernels_of_a_gpu_replayed(kind, graphs):
    with emulated(*(name for name in NAMES if name != "latent_scores")):  # a GPU has none
        plain, captured = make(kind), make(kind)
        one, _ = last(steps_of(plain, 50))
        other, out = last(steps_of(captured, 50, capture=True))
        assert_same(state(one, plain), state(other, captured))
        assert float(out.aux_loss) > 0
        assert graphs[0].counts == counts(kind, captured, 50)


ON_A_GPU = pytest.param(True, marks=pytest.mark.skipif(EMULATED is None, reason="not built"))


@pytest.mark.parametrize("kernels", [False, ON_A_GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("layers", [0, 1])
def test_a_recorded_step_need_not_know_which_layers_have_dead_latents(layers, kernels, graphs):
    """A step that may ask leaves out layers without any; a recorded one cannot."""
    saes = [make("CrossLayerTranscoder", k=12) for _ in range(2)]
    for sae in saes:
        with torch.no_grad():
            sae.b_enc[::5] = 0.0
            sae.b_enc[: 20 * layers : 5] = -20.0
    with emulated(*NAMES) if kernels else nullcontext():
        one, a = last(steps_of(saes[0], 50))
        other, b = last(steps_of(saes[1], 50, capture=True))
    assert_same(state(one, saes[0]), state(other, saes[1]))
    assert torch.equal(a.loss, b.loss)
    assert other._dead.mask().view(2, -1).any(1).tolist() == [layers > 0, False]
    assert graphs[0].counts["record"] == 2


RESUMED = ("TopKSAE", "BatchTopKSAE", "Transcoder-skip", "TopKSAE-zipf", "FeatureChoiceSAE")
RESUMED += ("JumpReLUSAE", "GatedSAE", "ReLUSAE-p_anneal", "JumpReLUCrossLayerTranscoder")


@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_that_is_resumed(kind, graphs, tmp_path):
    """fit with a graph, interrupted and resumed, with its metrics, and fit without one."""
    plain = make(kind)
    data = rows(plain, 3000)
    result = Trainer(plain, data, settings()).fit()
    first, again = make(kind), make(kind)
    config = settings(capture=True, out=tmp_path, checkpoint_every=90)
    Trainer(first, data, config).fit()
    assert_same(dict(plain.state_dict()), dict(first.state_dict()))
    folder = tmp_path / "checkpoints"
    kept = sorted(folder.iterdir())
    for path in kept[1:]:
        shutil.rmtree(path)
    resumed = Trainer(again, data, config).fit(resume=True)
    assert_same(dict(plain.state_dict()), dict(again.state_dict()))
    for row, other in zip(result.history, resumed.history, strict=True):
        for name in ("loss", "fvu", "aux_loss", "l0", "dead", "fvu_no_outliers", "lr"):
            assert row[name] == other[name], name
    assert [g.counts["record"] for g in graphs] == [3 if kind == "FeatureChoiceSAE" else 2, 1]
    assert result.history[-1]["dead"] >= 0 < max(row["dead"] for row in result.history)


def test_a_run_may_be_resumed_without_a_graph(graphs, tmp_path):
    plain, captured = make("TopKSAE"), make("TopKSAE")
    one = Trainer(plain, None, settings())
    other = Trainer(captured, None, settings(capture=True))
    data = rows(plain, 1000)
    for trainer in (one, other):
        trainer.prepare(data)
        for i in range(20):
            trainer.step(data[i : i + N])
    third = make("TopKSAE")
    last = Trainer(third, None, settings(capture=False))
    last.load_state_dict(copy.deepcopy(other.state_dict()))
    for trainer in (one, last):
        for i in range(20):
            trainer.step(data[i : i + N])
    assert_same(state(one, plain), state(last, third))


def test_a_smaller_batch_is_not_recorded_and_keeps_the_graph(graphs):
    plain, captured = make("BatchTopKSAE"), make("BatchTopKSAE")
    data = rows(plain, 1000)
    trainers = [
        Trainer(s, None, settings(capture=c)) for s, c in ((plain, False), (captured, True))
    ]
    for trainer in trainers:
        trainer.prepare(data)
    sizes = ([N] * 7 + [17]) * 3
    for i, size in enumerate(sizes):
        outs = [trainer.step(data[i : i + size]) for trainer in trainers]
        assert torch.equal(outs[0].loss, outs[1].loss)
    assert_same(state(trainers[0], plain), state(trainers[1], captured))
    assert graphs[0].counts == {"warm_up": WARM_UP + 3, "record": 1, "replay": 21 - WARM_UP}


@pytest.mark.parametrize("change", ["k", "parameter", "threshold"])
def test_what_a_graph_cannot_be_told_makes_another(change, graphs):
    """A setting of the module, or the place of a tensor."""
    plain, captured = make("BatchTopKSAE"), make("BatchTopKSAE")
    data = rows(plain, 1000)
    trainers = [
        Trainer(s, None, settings(capture=c)) for s, c in ((plain, False), (captured, True))
    ]
    for trainer, sae in zip(trainers, (plain, captured), strict=True):
        trainer.prepare(data)
        for i in range(20):
            if i == 10:
                if change == "k":
                    sae.k = 2.0
                elif change == "parameter":
                    sae.W_dec.data = sae.W_dec.data.flip(0).contiguous()
                else:
                    sae.threshold = sae.threshold + 1
            trainer.step(data[i : i + N])
    assert_same(state(trainers[0], plain), state(trainers[1], captured))
    assert graphs[0].counts["record"] == 2


@pytest.mark.parametrize("write", ["batches", "state", "budget"])
def test_what_feature_choice_knows_follows_a_write(write, graphs):
    """Each of them makes the next step renew the budgets, which were 0."""
    after = 0 if write == "budget" else 100
    options = {"mutual_choice_batches": after, "refresh": 1000}
    saes = [make("FeatureChoiceSAE", **options) for _ in range(2)]
    trainers = [
        Trainer(s, None, settings(capture=c)) for s, c in zip(saes, (False, True), strict=True)
    ]
    data = rows(saes[0], 1000)
    for trainer, sae in zip(trainers, saes, strict=True):
        trainer.prepare(data)
        for i in range(30):
            if i == 10:
                if write == "batches":
                    sae.batches_seen.fill_(after)
                elif write == "state":
                    sae.load_state_dict({**sae.state_dict(), "batches_seen": torch.tensor(after)})
                else:
                    sae.budget.zero_()
            trainer.step(data[i : i + N])
        assert int(sae.budget.sum()) == K * N
    assert_same(state(trainers[0], saes[0]), state(trainers[1], saes[1]))
    steps = {"warm_up": 1 + WARM_UP + 1, "record": 1, "replay": 25}
    if write != "budget":
        steps = {"warm_up": 1 + 2 * WARM_UP + 1, "record": 2, "replay": 22}
    assert graphs[0].counts == steps


def test_a_replay_asks_nothing(graphs):
    sae = make("FeatureChoiceSAE", mutual_choice_batches=0)
    trainer, _ = last(steps_of(sae, 10, capture=True))
    x = trainer._scaled(rows(sae, N))
    with Questions() as questions:
        for _ in range(3):
            trainer._step(x)
    assert not questions.asked
    assert trainer._captured.replays == 9
    assert int(sae.batches_seen) == 13


def test_a_run_that_is_dropped_is_gone(graphs):
    """At once, and what it holds on the device with it."""
    trainer, _ = last(steps_of(make("TopKSAE"), 10, capture=True))
    dropped = [weakref.ref(trainer), weakref.ref(trainer.sae)]
    graphs.clear()
    gc.collect()
    gc.disable()
    try:
        del trainer, _
        assert [ref() for ref in dropped] == [None, None]
    finally:
        gc.enable()


def test_a_parameter_that_is_frozen_is_not_moved_by_a_replay(graphs):
    sae = make("JumpReLUSAE")
    trainer, _ = last(steps_of(sae, 10, capture=True))
    sae.log_threshold.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        trainer.step(rows(sae, N))


def test_results_of_a_step_stay(graphs):
    sae = make("TopKSAE")
    kept = [
        (out, out.loss.item(), out.acts.values.clone())
        for _, out in steps_of(sae, 20, capture=True)
    ]
    assert len({loss for _, loss, _ in kept}) == 20
    for out, loss, values in kept:
        assert out.loss.item() == loss
        assert torch.equal(out.acts.values, values)


def test_a_bad_batch_is_refused_and_nothing_is_updated(graphs):
    sae = make("TopKSAE")
    trainer, _ = last(steps_of(sae, 10, capture=True))
    before = {name: copy.deepcopy(t) for name, t in state(trainer, sae).items()}
    bad = rows(sae, N)
    bad[3, 2] = float("nan")
    with pytest.raises(ValueError, match="got 1 of 48 rows with NaN or Inf"):
        trainer.step(bad)
    assert_same(before, state(trainer, sae))


def test_every_class_with_a_fused_step_is_recorded(monkeypatch):
    config = settings()
    found = set()
    for name, cls in sorted(SAE.registry.items()):
        if "." in name or cls.__name__ != name:
            continue  # of a test
        sae = small(name)
        if why_not_fused(sae, config) is None:
            found.add(name)
            assert why_not_captured(sae, make_update(sae, config)) == "cpu has no graphs"
    assert found == CAPTURED
    monkeypatch.setattr(captured_step, "CAPTURED", CAPTURED - {"TopKSAE"})
    sae = small("TopKSAE")
    why = why_not_captured(sae, make_update(sae, config))
    assert why == "steps of TopKSAE are not known to ask the device nothing"


def small(name):
    """Return a module of a class, whatever it takes."""
    cls = SAE.registry[name]
    for arguments in ((D, F, K), (D, D, F, K), (D, F), ([D, D], F, K), (2, D, F, K)):
        try:
            return cls(*arguments)
        except (TypeError, ValueError):
            continue
    raise AssertionError(f"give {name} arguments here")


def test_the_log_says_once_why_a_run_is_not_recorded(caplog):
    with caplog.at_level(logging.INFO):
        for kind, config in (
            ("TopKSAE", settings(capture=True)),
            ("TopKSAE", settings(capture=True, update="autograd")),
        ):
            trainer = Trainer(make(kind), None, config)
            trainer.prepare(rows(trainer.sae, 500))
            for i in range(5):
                trainer.step(rows(trainer.sae, N, i))
    found = [r.getMessage() for r in caplog.records if "graph" in r.getMessage()]
    assert found == [
        "Trainer: training without a CUDA graph, because cpu has no graphs",
        "Trainer: training without a CUDA graph, because the update is AutogradUpdate",
    ]


# -- the stand-in fails where a graph would ------------------------------------------------------


def test_a_number_that_was_read_is_not_recorded(graphs, monkeypatch):
    move = FusedUpdate.move
    monkeypatch.setattr(
        FusedUpdate, "move", lambda self, x, c, lr, number: move(self, x, c, float(lr), number)
    )
    with pytest.raises(NotForGraphs, match="_local_scalar_dense"):
        last(steps_of(make("TopKSAE"), 10, capture=True))


@pytest.mark.parametrize("baked", ["x", *NUMBERS])
def test_a_baked_number_shows(baked, graphs, monkeypatch):
    """A step that takes one of its inputs as it is when it is recorded gives other numbers."""
    set_ = captured_step.CapturedStep._set

    def without(self, given):
        inputs = self._inputs
        before = getattr(inputs, baked).clone()
        set_(self, given)
        if self._out is not None:
            getattr(inputs, baked).copy_(before)

    monkeypatch.setattr(captured_step.CapturedStep, "_set", without)
    plain, captured = make("ReLUSAE-p_anneal"), make("ReLUSAE-p_anneal")
    pairs = zip(steps_of(plain, 20), steps_of(captured, 20, capture=True), strict=True)
    assert not all(torch.equal(a.loss, b.loss) for (_, a), (_, b) in pairs)
