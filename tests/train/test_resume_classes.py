"""Every class continues from a checkpoint to the last bit, whatever it keeps beside parameters.

On a GPU sums of autograd may differ in the last bits from run to run.
"""

import copy
import shutil
from itertools import islice

import pytest
import torch

import fastsae
from fastsae import TrainConfig, Trainer

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CLASSES = {
    "TopK": lambda: fastsae.TopKSAE(8, 24, 3),
    "BatchTopK": lambda: fastsae.BatchTopKSAE(8, 24, 3),
    "AbsTopK": lambda: fastsae.TopKSAE(8, 24, 3, absolute=True),
    "GroupMax": lambda: fastsae.GroupMaxSAE(8, 24, 3),
    "Hierarchical": lambda: fastsae.HierarchicalTopKSAE(8, 24, 3),
    "Matryoshka": lambda: fastsae.MatryoshkaSAE(8, 24, 3, groups=[4, 20]),
    "Sampled": lambda: fastsae.SampledSAE(8, 24, 2, pool=4),
    "FeatureChoice": lambda: fastsae.FeatureChoiceSAE(8, 24, 3, mutual_choice_batches=5, refresh=3),
    "ReLU": lambda: fastsae.ReLUSAE(8, 24, 3, penalty="p_anneal"),
    "Gated": lambda: fastsae.GatedSAE(8, 24, 3, auxk_alpha=0.1),
    "JumpReLU": lambda: fastsae.JumpReLUSAE(8, 24, 3),
    "Gradient": lambda: fastsae.GradientSAE(4, 24, 3),
    "Transcoder": lambda: fastsae.Transcoder(5, 3, 24, 3, skip=True),
    "JumpReLUTranscoder": lambda: fastsae.JumpReLUTranscoder(5, 3, 24, 3),
    "CrossCoder": lambda: fastsae.CrossCoder(4, 2, 24, 3),
    "CrossLayer": lambda: fastsae.CrossLayerTranscoder(2, 2, 12, 3),
    "TiedCrossLayer": lambda: fastsae.CrossLayerTranscoder(2, 2, 12, 3, decoders="tied"),
    "LowRankCrossLayer": lambda: fastsae.CrossLayerTranscoder(
        2, 2, 12, 3, decoders="low_rank", rank=1
    ),
    "BatchTopKCrossLayer": lambda: fastsae.BatchTopKCrossLayerTranscoder(
        2, 2, 12, 2, select="layer"
    ),
    "JumpReLUCrossLayer": lambda: fastsae.JumpReLUCrossLayerTranscoder(2, 2, 12, 3),
}


def interrupted(build, x, config, at, folder, device="cpu"):
    """Return an SAE of a whole run, and of one continued from the checkpoint of step `at`."""

    def run(out, resume):
        torch.manual_seed(1)
        settings = TrainConfig(**config, keep_checkpoints=99, out=out)
        return Trainer(build().to(device), x, settings).fit(resume=resume).sae

    whole = run(folder / "a", False)
    found = f"checkpoints/step_{at:09d}"
    shutil.copytree(folder / "a" / found, folder / "b" / found)
    return whole, run(folder / "b", True)


def assert_same(a, b, device="cpu"):
    """Compare everything two modules hold, to the last bit on a CPU."""
    assert a.state_dict().keys() == b.state_dict().keys()
    for key, tensor in a.state_dict().items():
        if device == "cpu":
            assert torch.equal(b.state_dict()[key], tensor), key
        else:
            torch.testing.assert_close(b.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_resumed_run_is_the_uninterrupted_one(name, device, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(300, 8) @ torch.randn(8, 8) + 3
    config = {"batch_size": 50, "steps": 12, "lr": 3e-3, "checkpoint_every": 6, "progress": False}
    whole, resumed = interrupted(CLASSES[name], x, config, 6, tmp_path, device)
    assert_same(whole, resumed, device)
    loaded = fastsae.load(tmp_path / "a").to(device)
    part = whole.columns.split(x[:20].to(device)).x
    torch.testing.assert_close(loaded(part), whole(part))


@pytest.mark.parametrize("at", [4, 24, 39, 40])
@pytest.mark.parametrize(
    "name", ["BatchTopK", "Sampled", "FeatureChoice", "Matryoshka", "BatchTopKCrossLayer"]
)
def test_thresholds_are_estimated_from_the_same_last_batches(name, at, tmp_path):
    """The last 32 of 40 steps are 8 to 39: interrupted before them, among them, and after all."""
    torch.manual_seed(0)
    x = torch.randn(300, 8) @ torch.randn(8, 8) + 3
    config = {"batch_size": 50, "steps": 40, "lr": 3e-3, "checkpoint_every": 1, "progress": False}
    whole, resumed = interrupted(CLASSES[name], x, config, at, tmp_path)
    assert_same(whole, resumed)
    assert whole.threshold.isfinite().all()


@pytest.mark.parametrize("update", ["auto", "autograd"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_loop_of_your_own_is_fit(name, update):
    torch.manual_seed(0)
    x = torch.randn(300, 8) @ torch.randn(8, 8) + 3
    config = TrainConfig(
        batch_size=50, steps=40, lr=3e-3, dead_after_tokens=200, update=update, progress=False
    )

    def trainer():
        torch.manual_seed(1)
        return Trainer(CLASSES[name](), x, config)

    fitted = trainer().fit()
    mine = trainer()
    mine.prepare()
    for batch in islice(mine.data.batches(50, seed=config.seed), 40):
        out = mine.step(batch)
    assert mine.steps_done == 40
    assert float(out.mse) == fitted.final["mse"]
    sae = mine.finish()
    assert not sae.training
    assert_same(fitted.sae, sae)


def test_a_step_without_prepare_and_one_too_many():
    x = torch.randn(60, 8)
    trainer = Trainer(fastsae.TopKSAE(8, 24, 3), None, TrainConfig(batch_size=20, steps=2))
    with pytest.raises(RuntimeError, match=r"expected a step after prepare\(\), got one more"):
        trainer.step(x)
    with pytest.raises(ValueError, match=r"expected prepare\(sample\) without data, got no sample"):
        trainer.prepare()
    trainer.prepare(x)
    trainer.step(x)
    trainer.step(x)
    with pytest.raises(RuntimeError, match="expected a step of 2 steps, got one more"):
        trainer.step(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_step_takes_raw_rows_and_returns_raw_reconstructions(dtype):
    torch.manual_seed(0)
    x = (40 * torch.randn(200, 8) + 300).to(dtype)
    sae = fastsae.TopKSAE(8, 24, 3)
    config = TrainConfig(batch_size=50, steps=9, lr=1e-3, compute_dtype="float32")
    trainer = Trainer(sae, None, config)
    trainer.prepare(x)
    before = copy.deepcopy(sae)
    trainer.scaler.fold_(before)
    out = trainer.step(x)
    rows = x.float()
    torch.testing.assert_close(out.reconstruction, before(rows).detach(), rtol=1e-5, atol=1e-3)
    error = (rows - out.reconstruction).square().sum(1).mean()
    torch.testing.assert_close(out.mse, error, rtol=1e-4, atol=0)
