"""A step as a CUDA graph on a GPU, against the step itself."""

from __future__ import annotations

import shutil

import pytest
import torch

from fastsae import Trainer
from fastsae.train.captured_step import WARM_UP
from tests.train.test_captured_step import (
    KINDS,
    STEPS,
    N,
    assert_same,
    counts,
    make,
    rows,
    settings,
    state,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("named", [{}, {"clip_grad_norm": 0.3}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_200_replayed_steps_are_200_steps(kind, named) -> None:
    if "CrossLayer" in kind and named:
        pytest.skip("not fused")
    saes = [make(kind).cuda() for _ in range(2)]
    data = rows(saes[0], 1000).cuda()
    trainers = [
        Trainer(sae, None, settings(capture=capture, **named))
        for sae, capture in zip(saes, (False, True), strict=True)
    ]
    for trainer in trainers:
        trainer.prepare(data)
    order = torch.Generator().manual_seed(2)
    for i in range(STEPS):
        batch = data[torch.randperm(len(data), generator=order)[:N].cuda()]
        plain, captured = (trainer.step(batch) for trainer in trainers)
        assert torch.equal(plain.loss, captured.loss), i
        assert torch.equal(plain.reconstruction, captured.reconstruction), i
        if i % 50 == 0 or i == STEPS - 1:
            one, other = (state(t, s) for t, s in zip(trainers, saes, strict=True))
            assert_same(one, other)
    assert trainers[1]._captured is not None
    assert trainers[1]._captured.replays == counts(kind, saes[1], STEPS)["replay"]


@pytest.mark.parametrize("kind", ["TopKSAE", "BatchTopKSAE", "Transcoder-skip", "FeatureChoiceSAE"])
def test_fit_with_a_thread_that_reads_ahead_and_a_resume(kind, tmp_path) -> None:
    plain, first, again = (make(kind).cuda() for _ in range(3))
    data = rows(plain, 3000)
    Trainer(plain, data, settings()).fit()
    config = settings(capture=True, out=tmp_path, checkpoint_every=90)
    Trainer(first, data, config).fit()
    assert_same(dict(plain.state_dict()), dict(first.state_dict()))
    for path in sorted((tmp_path / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    Trainer(again, data, config).fit(resume=True)
    assert_same(dict(plain.state_dict()), dict(again.state_dict()))


@pytest.mark.parametrize("name", ["BatchTopKSAE", "FeatureChoiceSAE", "ReLUSAE"])
def test_a_replay_does_not_wait(name) -> None:
    sae = make(name).cuda()
    trainer = Trainer(sae, None, settings(capture=True))
    trainer.prepare(rows(sae, 1000).cuda())
    x = trainer._scaled(rows(sae, N).cuda())
    for _ in range(WARM_UP + 2):
        trainer._step(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer._captured is not None
    assert trainer._captured.replays == (2 if name == "FeatureChoiceSAE" else 3)
