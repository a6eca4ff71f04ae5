"""What cannot be spread says so in one line."""

import pytest
import torch

import fastsae
from fastsae import TrainConfig, Trainer
from fastsae.distributed import make_mesh, why_not_sharded


@pytest.mark.parametrize(
    ("sae", "why"),
    [
        (fastsae.GroupMaxSAE(4, 8, 2), "GroupMaxSAE selects in its own way"),
        (fastsae.HierarchicalTopKSAE(4, 8, 2), "HierarchicalTopKSAE selects in its own way"),
        (fastsae.TopKSAE(4, 8, 2, multi_topk=True), "multi_topk looks at the latents"),
        (fastsae.TopKSAE(4, 8, 2, aux="zipf"), "aux='zipf' ranks the latents"),
        (fastsae.TopKSAE(4, 8, 2, dtype=torch.bfloat16), "parameters are torch.bfloat16"),
        (type("Own", (fastsae.TopKSAE,), {})(4, 8, 2), "Own selects in its own way"),
    ],
)
def test_sae_that_cannot_be_spread(sae, why):
    assert why in why_not_sharded(sae)
    with pytest.raises(ValueError, match="expected mesh=None for this SAE, got"):
        Trainer(sae, None, TrainConfig(steps=1, mesh=(1, 2)))


def test_mesh_without_a_job():
    with pytest.raises(RuntimeError, match="expected 2 processes, started by `torchrun"):
        make_mesh(1, 2)
    with pytest.raises(RuntimeError, match="expected 2 processes, started by `torchrun"):
        Trainer(fastsae.TopKSAE(4, 8, 2), None, TrainConfig(steps=1, mesh=(1, 2)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mesh": 4}, "mesh to be two numbers of processes"),
        ({"mesh": (2, 0)}, "mesh to be two numbers of processes"),
        ({"mesh": (1, 2), "update": "autograd"}, "update='auto' or 'fused' with a mesh"),
        ({"mesh": (1, 2), "clip_grad_norm": 1.0}, "clip_grad_norm=None with a mesh"),
    ],
)
def test_settings_that_exclude_a_mesh(settings, expected):
    with pytest.raises(ValueError, match=expected):
        TrainConfig(**settings)


def test_mesh_is_no_part_of_what_a_run_is():
    assert TrainConfig(mesh=[2, 4]).mesh == (2, 4)
    assert TrainConfig(mesh=(2, 4)).to_dict()["mesh"] == [2, 4]
