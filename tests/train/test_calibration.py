"""Thresholds are right for rows that the weights have not seen, with no call by the user."""

import logging
import shutil
from dataclasses import replace

import pytest
import torch

import fastsae
from fastsae import TrainConfig, Trainer
from fastsae.data.source import TensorSource
from fastsae.train.calibration import calibration_rows
from fastsae.train.schedule import make_plan
from tests.train.test_resume_classes import CLASSES, assert_same

NAMES = ("BatchTopK", "Matryoshka", "Sampled", "FeatureChoice", "JumpReLU")
NAMES += ("JumpReLUTranscoder", "CrossCoder", "BatchTopKTranscoder")
BUILD = {
    **CLASSES,
    "BatchTopKTranscoder": lambda: fastsae.BatchTopKTranscoder(5, 3, 24, 3),
}


def rows(n=1000, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(20, d, generator=torch.Generator().manual_seed(99))
    return torch.rand(n, 20, generator=g).pow(6) @ basis + 1


def settings(**arguments):
    return TrainConfig(**{"batch_size": 50, "steps": 40, "lr": 3e-3, "progress": False} | arguments)


def fit(build, data, config, **how):
    torch.manual_seed(1)
    return Trainer(build(), data, config).fit(**how).sae


def active(sae, x):
    """Count the entries above threshold, in plain torch."""
    x = sae.columns.split(x).x
    z = x - sae.b_dec if sae.b_dec.shape[0] == x.shape[1] else x
    return int((z @ sae.W_enc + sae.b_enc > sae.threshold.clamp_min(0)).sum())


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_held_back_have_k_active_latents_each(name):
    x = rows()
    held = x[470:530]  # the middle
    held *= 1.5
    sae = fit(BUILD[name], x, settings(calibration_rows=60))
    assert abs(active(sae, held) - sae.k * 60) <= 2
    last = fit(BUILD[name], x, settings(calibration_rows=0))
    assert abs(active(last, held) - sae.k * 60) > 2


@pytest.mark.parametrize("name", ["BatchTopK", "FeatureChoice", "JumpReLU"])
def test_weights_do_not_see_them(name):
    x = rows()
    other = x.clone()
    other[470:530] = 3 * rows(60, seed=5)
    a, b = (fit(CLASSES[name], data, settings(calibration_rows=60)) for data in (x, other))
    assert torch.equal(a.W_dec, b.W_dec)
    assert torch.equal(a.W_enc, b.W_enc)
    assert torch.equal(a.b_dec, b.b_dec)
    assert not torch.equal(a.threshold, b.threshold)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("name", ["BatchTopK", "FeatureChoice", "JumpReLU"])
def test_few_rows_seen_often_leave_the_l0_of_new_ones_alone(name, sinks):
    """Sinks: rows of a hundred times the norm, one in 640 of training and of new rows."""
    cls = {"BatchTopK": fastsae.BatchTopKSAE, "JumpReLU": fastsae.JumpReLUSAE}
    cls["FeatureChoice"] = fastsae.FeatureChoiceSAE
    x, new = torch.randn(3584, 24), torch.randn(5120, 24)
    sink = 100 * torch.randn(24)
    if sinks:
        x[100 :: 2560 // sinks] = new[100 :: 2560 // sinks] = sink
    config = settings(batch_size=128, steps=600, calibration_rows=1536)
    sae = fit(lambda: cls[name](24, 192, 8), x, config)
    assert active(sae, new) / len(new) == pytest.approx(8, rel=0.05)


def test_last_batches_alone_are_memorized():
    """What the test above guards against: the same run without rows held back."""
    x, new = torch.randn(2560, 24), torch.randn(5120, 24)
    config = settings(batch_size=128, steps=600, calibration_rows=0)
    sae = fit(lambda: fastsae.BatchTopKSAE(24, 192, 8), x, config)
    assert active(sae, new) / len(new) > 8.4


def test_only_classes_with_a_threshold_and_a_k_give_up_rows():
    class Own(fastsae.TopKSAE):
        def __init__(self, d_in, d_sae, k):
            super().__init__(d_in, d_sae, k)
            self.calls = []

        def calibrate_(self, x):
            self.calls.append(x)

    def held(sae, rows, **arguments):
        config = settings(**arguments)
        plan = make_plan(replace(config, steps=100), rows, d_in=sae.d_in, d_sae=sae.d_sae)
        return calibration_rows(config, sae, rows, plan)

    batch_topk = fastsae.BatchTopKSAE(8, 24, 3)
    assert held(batch_topk, 100_000) == 5000
    assert held(batch_topk, 10**9) == 8192
    assert held(batch_topk, 6000) == 512
    assert held(batch_topk, 5119) == 0  # more than a tenth
    assert held(batch_topk, None) == 0  # of 100 batches of 50
    assert held(batch_topk, None, batch_size=1000) == 5000
    assert held(batch_topk, 6000, batch_size=5800) == 0
    assert held(batch_topk, 6000, calibration_rows=0) == 0
    assert held(batch_topk, 6000, calibration_rows=7) == 7
    assert held(fastsae.BatchTopKSAE(1 << 15, 8, 3), 10**9) == 4096  # 512 MiB
    for sae in (
        fastsae.TopKSAE(8, 24, 3),
        fastsae.GatedSAE(8, 24, 3),
        fastsae.JumpReLUSAE(8, 24),
        fastsae.Transcoder(5, 3, 24, 3),
    ):
        assert held(sae, 100_000) == held(sae, 100_000, calibration_rows=70_000) == 0
    x = rows()
    own = fit(lambda: Own(8, 24, 3), x, settings(calibration_rows=60, normalize=False))
    assert [torch.equal(call, x[470:530]) for call in own.calls] == [True]


def test_hold_back_keeps_rows_from_any_class():
    x = rows()
    other = x.clone()
    other[470:530] = 3 * rows(60, seed=5)
    config = settings(hold_back=60)
    a, b = (fit(CLASSES["TopK"], data, config) for data in (x, other))
    assert_same(a, b)
    sae = fit(CLASSES["BatchTopK"], x, config)
    assert_same(sae, fit(CLASSES["BatchTopK"], x, settings(calibration_rows=60)))
    with pytest.raises(ValueError, match=r"^Trainer: expected hold_back <= 500 of 1000 rows of da"):
        Trainer(CLASSES["TopK"](), x, settings(hold_back=501))
    none = fit(CLASSES["BatchTopK"], x, settings(hold_back=0))
    assert_same(none, fit(CLASSES["BatchTopK"], x, settings(calibration_rows=0)))


def test_a_class_with_its_own_calibration_keeps_the_fused_update():
    class Own(fastsae.BatchTopKSAE):
        def calibrate_(self, x):
            self.threshold.fill_(7.0)

    config = settings(update="fused", calibration_rows=60, normalize=False)
    assert fit(lambda: Own(8, 24, 3), rows(), config).threshold == 7


def test_an_epoch_has_as_many_steps_with_rows_held_back_as_without():
    x = rows(6000)
    for cls in (fastsae.TopKSAE, fastsae.BatchTopKSAE):
        assert Trainer(cls(8, 24, 3), x, settings(steps=None)).plan.steps == 120


@pytest.mark.parametrize(
    ("n", "batch_size", "message"),
    [
        (501, 50, "calibration_rows <= 500 of 1000 rows of data with batch_size = 50, got 501"),
        (101, 900, "calibration_rows <= 100 of 1000 rows of data with batch_size = 900, got 101"),
    ],
)
def test_more_rows_than_there_can_be(n, batch_size, message):
    with pytest.raises(ValueError, match=f"^Trainer: expected {message}$"):
        Trainer(
            fastsae.BatchTopKSAE(8, 24, 3),
            rows(),
            settings(batch_size=batch_size, calibration_rows=n),
        )


@pytest.mark.parametrize("name", [*NAMES, "TopK"])
@pytest.mark.parametrize("at", [6, 11, 12])
def test_a_resumed_run_holds_the_same_rows_back(name, at, tmp_path):
    x = rows()

    def run(out, **how):
        config = settings(
            calibration_rows=90, steps=12, checkpoint_every=1, keep_checkpoints=99, out=out
        )
        return fit(BUILD[name], x, config, **how)

    whole = run(tmp_path / "a")
    found = f"checkpoints/step_{at:09d}"
    shutil.copytree(tmp_path / "a" / found, tmp_path / "b" / found)
    assert_same(whole, run(tmp_path / "b", resume=True))
    config = settings(calibration_rows=80, steps=12, out=tmp_path / "b")
    with pytest.raises(ValueError, match="expected calibration_rows = 90 as in"):
        fit(BUILD[name], x, config, resume=True)


def test_a_stream_calibrates_on_the_rows_after_the_last_step():
    x = rows(2100)
    sae = fit(CLASSES["BatchTopK"], iter(x.split(50)), settings(calibration_rows=100))
    assert abs(active(sae, x[2000:]) - 300) <= 2


def test_a_stream_that_has_ended_leaves_the_thresholds_of_the_last_batches(caplog):
    x = rows(2000)
    sae = fit(CLASSES["BatchTopK"], iter(x.split(50)), settings(calibration_rows=100))
    assert "nothing was calibrated: the data have ended" in caplog.text
    last = fit(CLASSES["BatchTopK"], iter(x.split(50)), settings(calibration_rows=0))
    assert_same(sae, last)


def test_bad_rows_among_them_do_not_lose_the_run(caplog):
    x = rows()
    x[500, 3] = torch.nan
    sae = fit(CLASSES["BatchTopK"], x, settings(calibration_rows=60))
    assert "1 of 60 rows with NaN or Inf" in caplog.text
    assert sae.threshold.isfinite()


@pytest.mark.parametrize("plain", [True, False])
def test_no_rows_held_back_is_mentioned_once(plain, caplog):
    class Plain:
        d_in = 8

        def batches(self, batch_size, *, seed=0):
            return TensorSource(rows(9000)).batches(batch_size, seed=seed)

    caplog.set_level(logging.INFO)
    fit(CLASSES["BatchTopK"], Plain() if plain else rows(300), settings(steps=200))
    why = "Plain has no hold_back" if plain else "the data are few"
    assert caplog.text.count(f"are those of training, with no rows held back: {why}") == 1
