"""Settings, what they come to for given data, and the learning rate of every step."""

import json
import re

import pytest

from fastsae.train import TrainConfig
from fastsae.train.schedule import lr_at, make_plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "expected batch_size > 0 or None, got 0"),
        ({"epochs": -1}, "expected epochs > 0, got -1"),
        ({"lr": 0.0}, "expected lr > 0 or None, got 0.0"),
        ({"lr": float("nan")}, "expected lr > 0 or None, got nan"),
        ({"steps": 5, "total_tokens": 5}, "expected at most one of steps and total_tokens, got 5"),
        ({"betas": (0.9, 1.0)}, "expected two betas in [0, 1), got (0.9, 1.0)"),
        ({"decay_fraction": 1.5}, "expected 0 <= decay_fraction <= 1, got 1.5"),
        ({"warmup_steps": -1}, "expected warmup_steps >= 0 or None, got -1"),
        ({"calibration_rows": -1}, "expected calibration_rows >= 0 or None, got -1"),
        ({"hold_back": -1}, "expected hold_back >= 0 or None, got -1"),
        ({"hold_back": 3, "calibration_rows": 0}, "expected at most one of hold_back and "
         "calibration_rows, got 3"),
        ({"start_seed": -1}, "expected 0 <= start_seed < 2^32 or None, got -1"),
        ({"start_seed": "a"}, "expected start_seed to be an integer or None, got 'a'"),
        ({"b_dec_init": "median"}, "expected b_dec_init in geometric_median, mean, zeros, "
         "got 'median'"),
        ({"outlier_norm": 1.0}, "expected outlier_norm > 1, got 1.0"),
        ({"keep_checkpoints": 0}, "expected keep_checkpoints > 0, got 0"),
        ({"keep_checkpoints": 0.5}, "expected keep_checkpoints to be an integer, got 0.5"),
        ({"steps": 2.5}, "expected steps to be an integer or None, got 2.5"),
        ({"batch_size": 50.5}, "expected batch_size to be an integer or None, got 50.5"),
        ({"batch_size": True}, "expected batch_size to be an integer or None, got True"),
        ({"epochs": float("inf")}, "expected a finite epochs, got inf"),
        ({"lr": "1e-3"}, "expected lr to be a number or None, got '1e-3'"),
        ({"normalize": 1}, "expected normalize to be True or False, got 1"),
        ({"optimizer": None}, "expected optimizer to be a string, got None"),
        ({"out": 3}, "expected out to be a path or None, got 3"),
        ({"betas": 0.9}, "expected two numbers as betas, got 0.9"),
        ({"seed": -1}, "expected 0 <= seed < 2^32, got -1"),
        ({"tensorboard": True}, "expected out to be a folder when tensorboard is set, got None"),
        ({"checkpoint_every": 5}, "expected out to be a folder when checkpoint_every is set, "
         "got None"),
    ],
)  # fmt: skip
def test_config_errors(arguments, message):
    with pytest.raises(ValueError, match=f"^TrainConfig: {re.escape(message)}$"):
        TrainConfig(**arguments)


def test_config_is_json(tmp_path):
    config = TrainConfig(out=tmp_path, lr=1e-3)
    back = TrainConfig(**json.loads(json.dumps(config.to_dict())))
    assert back.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [({"epochs": 3}, 30), ({"epochs": 0.5}, 5), ({"steps": 7}, 7), ({"total_tokens": 799}, 7)],
)
def test_length_of_a_run(arguments, steps):
    plan = make_plan(TrainConfig(batch_size=100, **arguments), rows=1099, d_in=768, d_sae=2**14)
    assert plan.steps == steps


def test_defaults_follow_the_sizes_and_the_length():
    """The rates of docs/training.md: 0.004 at 576 to 2,304 and up to 256 updates."""

    def rate(steps, d_in, d_sae, **settings):
        config = TrainConfig(batch_size=100, steps=steps, **settings)
        return make_plan(config, rows=100, d_in=d_in, d_sae=d_sae).lr

    for steps in (1, 64, 256):
        assert rate(steps, 576, 2304) == pytest.approx(4e-3)
    assert rate(4096, 576, 2304) == pytest.approx(2e-3)  # 16 times as long: half
    assert rate(64, 576, 16 * 2304) == pytest.approx(2e-3)  # 16 times as many latents: half
    assert rate(64, 4 * 576, 2304) == pytest.approx(2e-3)  # 4 times as wide: half
    assert rate(4096, 576, 16 * 2304, optimizer="adam_mini") == pytest.approx(1e-3)
    assert rate(4096, 576, 2304, optimizer="sgd_sai") == 1e-2
    assert rate(4096, 576, 2304, lr=7e-4) == 7e-4
    plan = make_plan(TrainConfig(batch_size=100, steps=500), rows=100, d_in=768, d_sae=2**16)
    assert (plan.warmup_steps, plan.dead_after_tokens) == (25, 40_960)  # 20 * 65536 / 32
    for k, tokens in ((32, 5_000), (4, 11_520), (None, 5_000)):  # of 200,000, or 20 * 2304 / k
        config = TrainConfig(batch_size=100, steps=2000)
        assert make_plan(config, 100, d_in=576, d_sae=2304, k=k).dead_after_tokens == tokens
    long = make_plan(TrainConfig(batch_size=4096, steps=10**6), rows=4096, d_in=768, d_sae=2**14)
    assert (long.warmup_steps, long.dead_after_tokens) == (1000, 10_000_000)
    # 0.004 * 0.8660 * 0.4330 * 0.8459
    assert str(plan) == (
        "500 updates of 100 rows at a rate of 0.00127, warm-up over 25 and decay over 100 of them"
    )


@pytest.mark.parametrize(
    ("settings", "rows", "device", "size"),
    [
        ({"steps": 10**5}, 10**6, "cpu", 1024),
        ({"steps": 10**5}, 10**6, "cuda", 4096),
        ({"steps": 10}, 700, "cpu", 512),  # a power of two that the data fill
        ({}, 16_830, "cpu", 64),  # 65 rows would make 256 updates
        ({"epochs": 16}, 70_000, "cpu", 1024),
        ({"epochs": 2}, 70_000, "cuda", 512),  # 546 rows would
        ({}, 50, "cpu", 32),
        ({"total_tokens": 100_000}, None, "cpu", 256),
        ({"batch_size": 48}, 70_000, "cpu", 48),
    ],
)
def test_batches_are_as_large_as_the_run_allows(settings, rows, device, size):
    plan = make_plan(TrainConfig(**settings), rows, d_in=8, d_sae=16, device=device)
    assert plan.batch_size == size


@pytest.mark.parametrize(
    ("arguments", "rows", "message"),
    [
        ({"batch_size": 64}, 63, "expected at least batch_size = 64 rows, got 63"),
        ({"batch_size": 64, "total_tokens": 63}, 640, "expected at least one update, got none"),
        ({"batch_size": 64}, None, "expected steps or total_tokens for data without a length"),
    ],
)
def test_a_run_without_a_step(arguments, rows, message):
    with pytest.raises(ValueError, match=f"^Trainer: {message}"):
        make_plan(TrainConfig(**arguments), rows, d_in=8, d_sae=16)


def test_learning_rate_at_every_corner():
    rate = [lr_at(step, lr=8.0, steps=20, warmup_steps=4, decay_fraction=0.4) for step in range(21)]
    assert rate[:5] == [2, 4, 6, 8, 8]
    assert rate[11:14] == [8, 8, 7]
    assert rate[19:] == [1, 0]
    assert lr_at(0, lr=8.0, steps=20, warmup_steps=0, decay_fraction=0) == 8
    assert lr_at(19, lr=8.0, steps=20, warmup_steps=0, decay_fraction=0) == 8
