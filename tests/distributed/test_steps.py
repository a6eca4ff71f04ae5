"""Several processes select what one selects, and train the same SAE."""

import pytest
import torch

from fastsae import ops
from fastsae.train import make_update
from tests.distributed import cases
from tests.distributed.launch import once, torchrun

MESHES = [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)]


@pytest.fixture(scope="module", params=MESHES, ids=lambda mesh: "x".join(map(str, mesh)))
def several(request, tmp_path_factory):
    data, latent = request.param

    def run(out):
        torchrun(data * latent, "run_steps.py", data, latent, out)

    out = once(tmp_path_factory, f"steps-{data}x{latent}", run)
    return request.param, torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def alone():
    def steps(name):
        sae, batches = cases.build(name)
        update = make_update(sae, cases.CONFIG)
        losses = []
        for turn, batch in enumerate(batches):
            context = cases.context(cases.dead_latents(), turn)
            losses.append(update.step(batch, context, 1e-3).loss.item())
        return losses, dict(sae.state_dict())

    return {name: steps(name) for name in cases.CLASSES}


@pytest.mark.parametrize("name", cases.matrices())
def test_selection_is_that_of_one_process(several, name):
    matrix = cases.matrices()[name]
    top = torch.zeros_like(matrix, dtype=torch.bool)
    top.scatter_(1, ops.topk(matrix, cases.K).indices.long(), True)
    batch = ops.batch_topk(matrix, 2.5)
    for found, rows, own in several[1]["selections"]:
        kept, dense, threshold = found[name]
        assert torch.equal(kept, top[rows, own])
        assert torch.equal(dense, batch.acts.to_dense()[rows, own])
        assert torch.equal(threshold, batch.threshold.to(threshold))


@pytest.mark.parametrize("name", cases.CLASSES)
def test_training_is_that_of_one_process(several, alone, name):
    if name not in several[1]["steps"]:
        pytest.skip("by two processes only")
    losses, state = alone[name]
    got = several[1]["steps"][name]
    torch.testing.assert_close(got["losses"], losses, rtol=1e-9, atol=0)
    assert got["state"].keys() == state.keys()
    for key, value in state.items():
        # Thresholds are float32 in any SAE, and moved by a float32 average.
        size = 1e-6 * float(value.abs().max()) if value.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(got["state"][key], value, rtol=1e-6, atol=size)
