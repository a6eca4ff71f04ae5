"""Rows of huge norm: what is clipped, and that training survives them."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fastsae import TopKSAE, TrainConfig, Trainer, Transcoder
from fastsae.nn.scaler import Columns
from fastsae.train.outliers import clip_rows_, norm_limits


def test_rows_are_scaled_down_to_the_limit_of_their_norm() -> None:
    x = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.0, 0.0]])
    want = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 0.0]])
    assert_close(clip_rows_(x, Columns((2,)), [10.0]), want)


def test_one_factor_for_inputs_and_targets_and_none_for_the_rest() -> None:
    # Norms 5 | 10 | 7: the limits allow factors of 1 and 1/4.
    x = torch.tensor([[3.0, 4.0, 6.0, 8.0, 7.0]])
    clipped = clip_rows_(x, Columns((2,), (2,), (1,)), [10.0, 2.5])
    assert_close(clipped, torch.tensor([[0.75, 1.0, 1.5, 2.0, 7.0]]))


def test_limits_are_medians_of_norms() -> None:
    x = torch.tensor([[1.0, 0.0, 10.0], [0.0, 2.0, 30.0], [3.0, 0.0, 20.0]])
    assert norm_limits(Columns((2,), (1,)), x, 3.0) == [6.0, 60.0]


def planted(n: int) -> torch.Tensor:
    features = torch.nn.functional.normalize(torch.randn(64, 24), dim=1)
    codes = torch.rand(n, 64) * (torch.rand(n, 64) < 0.08)
    return codes @ features + 0.02 * torch.randn(n, 24)


@pytest.mark.parametrize("cls", [TopKSAE, Transcoder])
def test_one_row_of_a_batch_does_not_spoil_the_others(cls) -> None:
    torch.manual_seed(0)
    x = planted(6_000)
    spoilt = x.clone()
    spoilt[::250] = 300 * torch.randn(24)  # one direction, as attention sinks have
    fvu = {}
    for name, data, clip in (
        ("clean", x, True),
        ("clipped", spoilt, True),
        ("as is", spoilt, False),
    ):
        torch.manual_seed(0)
        sae = cls(24, 96, 5) if cls is TopKSAE else cls(24, 24, 96, 5)
        rows = data if cls is TopKSAE else torch.cat([data, data], 1)
        held = x[5_000:] if cls is TopKSAE else torch.cat([x, x], 1)[5_000:]
        config = TrainConfig(steps=200, batch_size=250, lr=5e-3, clip_outliers=clip, progress=False)
        fvu[name] = Trainer(sae, rows[:5_000], config, val=held).fit().final["val_fvu"]
    assert fvu["clipped"] < 1.1 * fvu["clean"]
    assert fvu["as is"] > 1.15 * fvu["clean"]


def test_the_trained_sae_reconstructs_outliers_too() -> None:
    torch.manual_seed(0)
    x = planted(6_000)
    sink = torch.randn(24)
    x[::200] = 20 * sink * (1 + 0.1 * torch.rand(30, 1))
    sae = TopKSAE(24, 96, 5)
    Trainer(sae, x, TrainConfig(steps=300, batch_size=250, lr=5e-3, progress=False)).fit()
    outliers = x[::200]
    error = (sae(outliers) - outliers).square().sum() / outliers.square().sum()
    assert error < 0.05
