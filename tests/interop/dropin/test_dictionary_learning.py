"""dictionary-learning's trainers with our loss and with their own: the same numbers and files."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.interop.dropin.common import (
    assert_same,
    assert_same_gradients,
    assert_same_state,
    peer,
    rows,
)

peer("dictionary_learning.trainers")

from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k  # noqa: E402

from fastsae.interop.dropin import dictionary_learning as fast  # noqa: E402

N, D, F, K = 48, 16, 96, 6
MODULES = {
    "TopKTrainer": top_k,
    "BatchTopKTrainer": batch_top_k,
    "MatryoshkaBatchTopKTrainer": matryoshka_batch_top_k,
}
# Their auxiliary loss and their thresholds are float32 in a float64 dictionary too.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5}


def pair(name, dtype=torch.float64, **options):
    """Return our trainer and theirs with the same weights, where no bias is 0."""
    run = {"steps": 1000, "activation_dim": D, "dict_size": F, "k": K, "layer": 0, "seed": 0}
    run |= {"lm_name": "none", "device": "cpu", "warmup_steps": 2, "lr": 3e-3} | options
    if name.startswith("Matryoshka"):
        run.setdefault("group_fractions", [0.125, 0.25, 0.625])
    made = [getattr(fast, name)(**copy.deepcopy(run)), getattr(MODULES[name], name)(**run)]
    for trainer in made:
        made_by = torch.Generator().manual_seed(1)
        trainer.ae.to(dtype)
        with torch.no_grad():
            for key, parameter in trainer.ae.named_parameters():
                if parameter.ndim == 1:
                    noise = torch.randn(parameter.shape, generator=made_by)
                    parameter.copy_(0.1 * noise + (0.1 if key.startswith(("enc", "b_enc")) else 0))
    assert_same_state(made[0].ae, made[1].ae, 0)
    return made


def set_dead(trainers, dead):
    for trainer in trainers:
        trainer.num_tokens_since_fired[:dead] = trainer.dead_feature_threshold


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dead", [0, 3, 20, 96])
@pytest.mark.parametrize("name", list(MODULES))
def test_loss_and_gradients(name, dead, dtype):
    both = pair(name, dtype, threshold_start_step=5)
    x = rows(N, D, dtype)
    for step in (1, 6, 7):
        set_dead(both, dead)
        ours, theirs = (trainer.loss(x, step=step) for trainer in both)
        assert_same(ours, theirs, "loss", TOLERANCE[dtype])
        assert_same(both[0].ae.threshold, both[1].ae.threshold, "threshold", 1e-6)
        for trainer in both:
            trainer.ae.zero_grad()
        ours.backward(), theirs.backward()
        mine = dict(both[0].ae.named_parameters())
        for key, parameter in both[1].ae.named_parameters():
            assert bool(parameter.grad.any()), key
            assert_same(mine[key].grad, parameter.grad, key, TOLERANCE[dtype])
        assert torch.equal(*(t.num_tokens_since_fired for t in both))
    assert float(both[1].ae.threshold) > 0
    for key in both[1].logging_parameters:
        found = [float(torch.as_tensor(getattr(t, key)).detach()) for t in both]
        assert found[0] == pytest.approx(found[1], rel=1e-5), key
    assert both[0].get_logging_parameters().keys() == both[1].get_logging_parameters().keys()


def test_exact_in_float64_without_their_float32_sums():
    for name in MODULES:
        both = pair(name)
        for trainer in both:
            trainer.loss(rows(N, D), step=1).backward()
        assert_same_gradients(both[0].ae, both[1].ae)


@pytest.mark.parametrize("dead", [0, 20])
@pytest.mark.parametrize("name", list(MODULES))
def test_what_is_logged(name, dead):
    both = pair(name)
    set_dead(both, dead)
    ours, theirs = (trainer.loss(rows(N, D), step=1, logging=True) for trainer in both)
    for key in ("x", "x_hat", "f"):
        assert_same(getattr(ours, key), getattr(theirs, key), key)
    assert list(ours.losses) == list(theirs.losses)
    for key, value in theirs.losses.items():
        assert ours.losses[key] == pytest.approx(value, rel=1e-6), key
    assert ours._fields == theirs._fields


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("TopKTrainer", {}),
        ("TopKTrainer", {"auxk_alpha": 0, "decay_start": 6}),
        ("BatchTopKTrainer", {"auxk_alpha": 0.5, "threshold_beta": 0.5}),
        ("BatchTopKTrainer", {"k": 95}),
        ("MatryoshkaBatchTopKTrainer", {}),
        ("MatryoshkaBatchTopKTrainer", {"group_weights": [0.5, 0.3, 0.2]}),
        ("MatryoshkaBatchTopKTrainer", {"group_fractions": [1.0]}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_updates(name, options, dtype):
    """Twelve updates, dead features among them; every one normalizes, projects and clips."""
    both = pair(name, dtype, threshold_start_step=3, **options)
    for trainer in both:
        trainer.dead_feature_threshold = 2 * N
    dead = 0
    for step in range(12):
        x = rows(N, D, dtype, seed=step)
        ours, theirs = (trainer.update(step, x.clone()) for trainer in both)
        assert ours == pytest.approx(theirs, rel=1e-4)
        dead += both[1].dead_features
    assert dead > 0 or options.get("k") == 95 or options.get("auxk_alpha") == 0
    assert type(both[0].optimizer) is fast.FusedAdam
    # Adam turns rounding into a share of the rate where a gradient is next to 0.
    assert_same_state(both[0].ae, both[1].ae, {torch.float64: 1e-5, torch.float32: 5e-3}[dtype])
    assert both[0].config == both[1].config
    rates = [trainer.scheduler.get_last_lr() for trainer in both]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("name", list(MODULES))
def test_files_load_in_both(name, tmp_path):
    ours, theirs = pair(name, torch.float32)
    ours.update(0, rows(N, D, torch.float32)), theirs.update(0, rows(N, D, torch.float32))
    for trainer, file in ((ours, "ours.pt"), (theirs, "theirs.pt")):
        torch.save(trainer.ae.state_dict(), tmp_path / file)
    assert type(ours.ae) is type(theirs.ae)
    cls = type(theirs.ae)
    for trainer, file in ((ours, "ours.pt"), (theirs, "theirs.pt")):
        back = cls.from_pretrained(tmp_path / file)
        assert_same_state(back, trainer.ae, 0)
    state = torch.load(tmp_path / "theirs.pt")
    ours.ae.load_state_dict(state)
    assert_same_state(ours.ae, theirs.ae, 0)
    decoder = ours.ae.W_enc if name.startswith("Matryoshka") else ours.ae.decoder.weight
    assert decoder.t().is_contiguous()


def test_where_their_own_loss_runs():
    class Own(top_k.AutoEncoderTopK):
        def decode(self, x):
            return 2 * super().decode(x)

    ours, theirs = pair("TopKTrainer", dict_class=Own)
    x = rows(N, D)
    assert ours.why_not_fast(x) == "a dictionary of class Own"
    assert type(ours.optimizer) is torch.optim.Adam
    assert torch.equal(ours.loss(x, step=1), theirs.loss(x, step=1))
    nested, other = pair("MatryoshkaBatchTopKTrainer")
    assert nested.why_not_fast(x) == ""
    nested.ae.active_groups = other.ae.active_groups = 2
    assert nested.why_not_fast(x) == "groups that are left out"
    assert torch.equal(nested.loss(x, step=1), other.loss(x, step=1))
    plain, _ = pair("TopKTrainer")
    assert plain.why_not_fast(x) == ""
    assert "float32 for parameters of torch.float64" in plain.why_not_fast(x.float())
    assert "shape [2, 24, 16]" in plain.why_not_fast(x.view(2, 24, D))
    with torch.autocast("cpu", torch.bfloat16):
        assert plain.why_not_fast(x).startswith("autocast")
