"""What a training step asks the device: on a GPU each question is a wait for all that was started.

The step runs on the CPU with the questions that are free there (`types.can_look`) left out, as they
are on a GPU. Questions are seen in the dispatcher: numbers that are read, and results whose shape
depends on values.
"""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastsae
from fastsae import TrainConfig, Trainer
from tests.train.recorded_graph import asks

N, D, F, K = 128, 16, 64, 4
CLASSES = ("TopKSAE", "BatchTopKSAE", "MatryoshkaSAE", "HierarchicalTopKSAE", "SampledSAE")
CLASSES += ("GroupMaxSAE", "Transcoder", "JumpReLUSAE", "ReLUSAE", "GatedSAE", "FeatureChoiceSAE")
"""Classes whose steps ask nothing."""


class Questions(TorchDispatchMode):
    """Counts what is asked, and keeps the shapes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self.shapes: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if asks(func, args):
            self.asked[name] += 1
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.shapes.append((name, tuple(x.shape)))
        return out


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.startswith("fastsae.") and hasattr(module, "can_look"):
            monkeypatch.setattr(module, "can_look", lambda t: False)


def step_of(trainer, x) -> Questions:
    """Return what one step of a prepared trainer asks."""
    with Questions() as questions:
        trainer._step(x)
    return questions


def prepared(name, **options):
    torch.manual_seed(0)
    widths = (D, D) if name == "Transcoder" else (D,)
    sae = getattr(fastsae, name)(*widths, F, K, **options)
    batch = torch.randn(N, sum(sae.columns.widths))
    trainer = Trainer(
        sae, None, TrainConfig(steps=100, batch_size=N, dead_after_tokens=1 << 20, progress=False)
    )
    trainer.prepare(batch)
    trainer.step(batch)  # makes what the first step makes
    return trainer, batch


@pytest.mark.parametrize("name", CLASSES)
def test_a_step_asks_nothing_and_its_shapes_do_not_depend_on_the_batch(name):
    trainer, batch = prepared(name)
    found = [step_of(trainer, x) for x in (batch, torch.zeros_like(batch), 3 * batch.flip(0))]
    assert [dict(q.asked) for q in found] == [{}] * 3
    assert found[0].shapes == found[1].shapes == found[2].shapes
    assert len(found[0].shapes) > 10


@pytest.mark.parametrize("name", CLASSES)
def test_dead_latents_cost_no_question(name):
    trainer, batch = prepared(name)
    found = []
    for dead in (0, 9, F):
        trainer._tokens_done = 1 << 40
        trainer._dead.tokens_since_fired.zero_()[:dead] = 1 << 40
        found.append(step_of(trainer, batch))
    assert [dict(q.asked) for q in found] == [{}] * 3
    assert found[0].shapes == found[1].shapes == found[2].shapes


def test_feature_choice_asks_when_it_renews_its_budgets():
    trainer, batch = prepared("FeatureChoiceSAE", mutual_choice_batches=0, refresh=3)
    asked = [bool(step_of(trainer, batch).asked) for _ in range(6)]  # after one step
    assert asked == [False, False, True, False, False, True]


def test_questions_are_seen():
    x = torch.randn(8)
    with Questions() as questions:
        float(x.sum())
        x[x > 0]
        x.nonzero()
    assert questions.asked["aten._local_scalar_dense.default"] == 1
    assert sum(questions.asked.values()) == 3


@pytest.mark.parametrize("score", ["l2", "entropy"])
def test_scores_of_a_gpu_ask_nothing(score):
    """`latent_scores` is plain torch there, which a step does not show."""
    x, W, b = torch.randn(N, D), torch.randn(F, D), torch.randn(F)
    with Questions() as questions:
        scores, _ = sys.modules["fastsae.ops.latent_scores"]._plain(
            x, W, b, None, score == "entropy", 8, False
        )
    assert not questions.asked
    assert scores.shape == (F,)
