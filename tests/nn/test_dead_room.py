"""Dead latents of a step: room for some, turns of more, and no question how many there are."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fastsae import Transcoder
from fastsae.nn import BatchTopKSAE, MatryoshkaSAE, StepContext, TopKSAE, objective

D, F, K, K_AUX = 8, 60, 3, 5
ROOM = 2 * K_AUX
CLASSES = {
    "TopK": lambda: TopKSAE(D, F, K, k_aux=K_AUX, dtype=torch.float64),
    "uncentered": lambda: TopKSAE(
        D, F, K, k_aux=K_AUX, dtype=torch.float64, apply_b_dec_to_input=False
    ),
    "BatchTopK": lambda: BatchTopKSAE(D, F, K, k_aux=K_AUX, dtype=torch.float64),
    "Matryoshka": lambda: MatryoshkaSAE(D, F, K, k_aux=K_AUX, dtype=torch.float64),
    "Transcoder": lambda: Transcoder(D, D, F, K, k_aux=K_AUX, dtype=torch.float64),
}


def loss_and_grads(sae, batch, dead, turn=None):
    out = sae.training_loss(batch, StepContext(dead=dead, turn=turn))
    return out.loss, out.aux_loss, torch.autograd.grad(out.loss, list(sae.parameters()))


def made(kind):
    torch.manual_seed(0)
    sae = CLASSES[kind]()
    sae.b_enc.data.normal_()
    return sae, torch.randn(30, sum(sae.columns.widths), dtype=torch.float64)


@pytest.fixture
def no_looking(monkeypatch):
    """Turns questions off when called."""
    return lambda: monkeypatch.setattr(objective, "can_look", lambda t: False)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("count", [0, 1, 4, K_AUX, 8, ROOM - 1, ROOM])
@pytest.mark.parametrize("turn", [0, 7])
def test_as_long_as_they_fit_it_is_the_loss_of_all(kind, count, turn, no_looking):
    sae, batch = made(kind)
    dead = torch.zeros(F, dtype=torch.bool)
    dead[torch.randperm(F)[:count]] = True
    want = loss_and_grads(sae, batch, dead)
    no_looking()
    got = loss_and_grads(sae, batch, dead, turn)
    assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert bool(got[1] > 0) is (count > 0)


@pytest.mark.parametrize("count", [ROOM + 1, 33, F])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("looks", [False, True])
def test_more_than_fit_take_turns(count, as_tensor, looks, no_looking):
    sae, batch = made("TopK")
    dead = torch.zeros(F, dtype=torch.bool)
    dead[torch.randperm(F)[:count]] = True
    order = dead.nonzero().squeeze(1).tolist()
    wanted, served = [], [0] * F
    for turn in range(12):
        chosen = [order[(turn * ROOM + i) % count] for i in range(ROOM)]
        for f in chosen:
            served[f] += 1
        mask = torch.zeros(F, dtype=torch.bool)
        mask[chosen] = True
        wanted.append(loss_and_grads(sae, batch, mask))
    assert {served[f] > 0 for f in order} == {True}
    assert max(served) - min(served[f] for f in order) <= 1
    if not looks:
        no_looking()
    for turn, want in enumerate(wanted):
        number = torch.tensor(turn) if as_tensor else turn
        assert_close(loss_and_grads(sae, batch, dead, number), want, rtol=1e-11, atol=1e-12)


def test_without_a_turn_all_are_trained():
    sae, batch = made("TopK")
    dead = torch.arange(F) < ROOM + 10
    found = loss_and_grads(sae, batch, dead)
    rows = sae.W_enc_rows[dead], sae.b_enc[dead], sae.W_dec[dead]
    with torch.no_grad():
        error = sae(batch) - batch
        pre = (batch - sae.b_dec) @ rows[0].T + rows[1]
        largest = pre.topk(K_AUX).indices
        code = torch.zeros_like(pre).scatter(1, largest, pre.gather(1, largest).relu())
        left = (code @ rows[2] + error).square().sum() / (error - error.mean(0)).square().sum()
    assert_close(found[1].detach(), left)


def test_there_is_never_room_for_more_than_there_are(no_looking):
    torch.manual_seed(0)
    sae = TopKSAE(D, 12, K, k_aux=6, dtype=torch.float64)
    dead = torch.arange(12) % 2 == 0
    batch = torch.randn(20, D, dtype=torch.float64)
    want = loss_and_grads(sae, batch, dead)
    no_looking()
    assert_close(loss_and_grads(sae, batch, dead), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_fused_step_is_the_same(clip, no_looking):
    """With the tape that the fused update opens: gradients of the rows that were copied."""
    from fastsae.train import TrainConfig
    from fastsae.train.fused_update import FusedUpdate

    found = []
    dead = torch.arange(F) % 7 == 3
    for asks in (True, False):
        if not asks:
            no_looking()
        sae, batch = made("TopK")
        sae.normalize_decoder_()
        update = FusedUpdate(sae, TrainConfig(clip_grad_norm=clip))
        for turn in range(5):
            update.step(batch, StepContext(dead=dead, turn=turn), 1e-2)
        found.append({name: p.detach() for name, p in sae.named_parameters()})
    assert_close(found[0], found[1], rtol=1e-10, atol=1e-11)
