"""Files of development versions of 0.1.0: SAEs load, checkpoints are refused in one line.

`saved_by_development_version` was written by the last version with its names, which also made the
reconstructions that are expected here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastsae
from fastsae import TrainConfig, Trainer

FOLDER = Path(__file__).parent / "saved_by_development_version"
NAMES = sorted(p.name for p in FOLDER.iterdir() if (p / "cfg.json").exists() and p.name != "run")


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_sae_loads(name, caplog):
    expected = load_file(FOLDER / "expected.safetensors")
    sae = fastsae.load(FOLDER / name)
    assert "holds no checksums" in caplog.text
    assert type(sae).__name__ == name
    torch.testing.assert_close(
        sae(expected[f"{name}.x"]), expected[f"{name}.reconstruction"], rtol=1e-5, atol=1e-5
    )


def test_renamed_arguments_keep_their_values():
    sae = fastsae.load(FOLDER / "TopKSAE")
    assert (sae.k_aux, sae.auxk_alpha) == (2, 0.1)


def test_it_can_be_trained_further():
    sae = fastsae.load(FOLDER / "TopKSAE")
    before = sae.b_dec.detach().clone()
    x = torch.randn(256, 6) @ torch.randn(6, 6) + 1
    Trainer(sae, x, TrainConfig(batch_size=64, steps=1, lr=1e-12)).fit()
    torch.testing.assert_close(sae.b_dec, before, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_is_refused_in_one_line(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(FOLDER / "run", run)
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    config = TrainConfig(batch_size=64, steps=4, out=run)
    trainer = Trainer(fastsae.TopKSAE(6, 12, k=3), torch.randn(512, 6), config)
    with pytest.raises(
        ValueError, match=r"expected a checkpoint of format 4 in .*train fastsae.load"
    ) as e:
        trainer.fit(resume=True)
    assert "\n" not in str(e.value)
    assert files == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
