"""Small systems of papers, in examples/: what each claims, at the smallest size that shows it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"


def load(name: str) -> dict:
    return runpy.run_path(str(FOLDER / name))


def test_prefixes_order_the_units() -> None:
    found = load("ordered_dropout.py")["main"](seeds=2, steps=1200)
    cosines, spans = found["prefixes"]
    assert float(cosines.min()) > 0.95
    assert float(spans.min()) > 0.99
    cosines, spans = found["whole"]
    assert float(cosines.mean()) < 0.6
    assert float(spans.min()) > 0.99  # the same span


def test_depth_turns_a_joint_embedding_towards_influence() -> None:
    found = load("jepa_influence.py")["main"](depths=(1, 2), seeds=2)
    assert found["equal", "MAE", 2].numpy() == pytest.approx(1, abs=0.03)
    assert (found["equal", "JEPA", 2] > 1.15).all()
    assert (found["inverted", "MAE", 2] < 0.95).all()
    assert (found["inverted", "JEPA", 2] > 1.05).all()
    assert (found["equal", "JEPA", 2] > found["equal", "JEPA", 1] + 0.1).all()


@pytest.mark.parametrize("objective", ["MAE", "JEPA"])
def test_gradients_of_the_deep_linear_model_are_those_of_autograd(objective) -> None:
    """On samples of x and y, whose target JEPA takes from a copy of the encoder."""
    module = load("jepa_influence.py")
    torch.manual_seed(0)
    x, y = torch.randn(2, 30, 2, dtype=torch.float64)
    V, *layers = (torch.randn(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(4))
    W = layers[2] @ layers[1] @ layers[0]
    goal = y if objective == "MAE" else y @ W.detach().t()
    loss = 0.5 * (x @ (V @ W).t() - goal).square().sum(1).mean()
    expected = torch.autograd.grad(loss, (V, *layers))
    with torch.no_grad():
        by_V, by_layers = module["gradients"](objective, V, layers, x.t() @ x / 30, y.t() @ x / 30)
    for one, other in zip((by_V, *by_layers), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_tree_gates_by_the_way_to_each_leaf() -> None:
    module = load("tree_gate.py")
    torch.manual_seed(0)
    router = module["TreeRouter"]()
    torch.nn.init.normal_(router.nodes.weight, std=0.15)
    x = torch.randn(50, module["D"])
    with torch.no_grad():
        gate, penalty = router(x)
        nodes, leaves = router.nodes(x), router.leaves(x)
    entropy = 0.0
    for row in range(50):
        weights = []
        for leaf in range(8):
            v, node = 1.0, 0
            for bit in (leaf >> 2 & 1, leaf >> 1 & 1, leaf & 1):
                t = min(max(float(nodes[row, node]), -0.5), 0.5)
                s = -2 * t**3 + 1.5 * t + 0.5
                v, node = v * (1 - s if bit else s), 2 * node + 1 + bit
            weights.append(v * float(leaves[row, leaf].exp()))
            entropy -= v * float(torch.tensor(v).log()) if v else 0.0
        expected = torch.tensor(weights) / sum(weights)
        torch.testing.assert_close(gate[row], expected, rtol=1e-4, atol=1e-5)
    assert float(penalty) == pytest.approx(module["ENTROPY"] * entropy / 50, rel=1e-4)
    assert 0 < int((gate == 0).sum()) < 350  # some leaves are out of reach, as they should be


def test_a_tree_grows_sparse_by_itself() -> None:
    runs = load("tree_gate.py")["main"](seeds=1, steps=300)
    assert runs["switch"][0]["experts_per_token"] == 1
    assert runs["tree"][0]["experts_per_token"] < 4
    assert all(run[0]["fvu"] < 0.9 for run in runs.values())


def test_rewiring_keeps_the_number_of_weights_and_drops_the_smallest() -> None:
    module = load("quick_selection.py")
    torch.manual_seed(0)
    weight, mask = module["graph"](40, 60)
    before, old = int(mask.sum()), weight.clone()
    module["rewire"](weight, mask)
    assert int(mask.sum()) == before
    assert bool((weight[~mask] == 0).all())
    kept = mask & (weight == old)
    for sign in (1, -1):
        side = (old * sign > 0).sum()
        stayed = kept & (old * sign > 0)
        assert int(side - stayed.sum()) == int(0.2 * side)
        dropped = (old * sign > 0) & ~stayed
        assert float(old[dropped].abs().max()) <= float(old[stayed].abs().min())


def test_strong_inputs_are_the_informative_ones() -> None:
    pytest.importorskip("sklearn")
    found = load("quick_selection.py")["main"](seeds=1, hidden=300, epochs=4)
    madelon = found["Madelon-like"]
    assert madelon.informative[0] > 0.5  # of 200 inputs 20 are: chance is 0.1
    assert madelon.quick[0] > 0.85
    assert found["digits"].every[0] > found["digits"].quick[0] > 0.8
