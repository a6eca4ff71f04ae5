"""Every class continues from a checkpoint to the last bit, whatever it keeps beside parameters.

On a GPU sums of autograd may differ in the last bits from run to run.
"""

import shutil

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
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_resumed_run_is_the_uninterrupted_one(name, device, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(300, 8) @ torch.randn(8, 8) + 3
    config = {"batch_size": 50, "steps": 12, "lr": 3e-3, "checkpoint_every": 6, "progress": False}

    def run(folder, resume):
        torch.manual_seed(1)
        sae = CLASSES[name]().to(device)
        return Trainer(sae, x, TrainConfig(**config, out=folder)).fit(resume=resume).sae

    whole = run(tmp_path / "a", False)
    shutil.copytree(tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step_000000012")
    resumed = run(tmp_path / "b", True)
    for key, tensor in whole.state_dict().items():
        again = resumed.state_dict()[key]
        if device == "cpu":
            assert torch.equal(again, tensor), key
        else:
            torch.testing.assert_close(again, tensor, rtol=1e-4, atol=1e-5)
    loaded = fastsae.load(tmp_path / "a").to(device)
    part = whole.split(x[:20].to(device))[0]
    torch.testing.assert_close(loaded(part), whole(part))
