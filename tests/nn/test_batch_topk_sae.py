"""BatchTopK: whose entries are kept, how the threshold follows, and what inference does with it."""

import copy
import math

import pytest
import torch

from fastsae.nn import BatchTopKSAE
from tests.properties import given, settings, st


def identity(k, d=4, **arguments):
    """An SAE whose pre-activations are its input."""
    sae = BatchTopKSAE(d, d, k, **arguments)
    sae.W_enc = sae.W_dec = torch.eye(d)
    return sae


@pytest.mark.parametrize(
    ("k", "x", "kept"),
    [
        (2, [[1, -2, 3, -4], [-5, 6, -7, 8]], [[1, 0, 3, 0], [0, 6, 0, 8]]),
        (2, [[1, 2, 3, 4], [-5, -6, -7, -8]], [[1, 2, 3, 4], [0, 0, 0, 0]]),
        (1.5, [[1, -2, 3, -4], [-5, 6, -7, 8]], [[0, 0, 3, 0], [0, 6, 0, 8]]),
        (3, [[1, -2, 3, -4], [-5, 6, -7, 8]], [[1, 0, 3, 0], [0, 6, 0, 8]]),
        (0.4, [[1, -2, 3, -4], [-5, 6, -7, 8]], [[0, 0, 0, 0], [0, 0, 0, 0]]),
    ],
)
def test_the_largest_of_the_batch_are_kept(k, x, kept):
    sae = identity(k)
    x, kept = torch.tensor(x).float(), torch.tensor(kept).float()
    assert torch.equal(sae.encode(x), kept)
    assert torch.equal(sae.encode(x.reshape(2, 1, 4)), kept.reshape(2, 1, 4))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.floats(0.05, 8), st.integers(0, 2**31))
def test_number_kept_is_k_n_or_all_positives(n, k, seed):
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    kept = identity(k, 8).encode(x)
    assert kept.count_nonzero() == min(int(k * n), int((x > 0).sum()))


def test_threshold_is_the_average_of_the_smallest_kept_value():
    sae = identity(1, threshold_lr=0.25)
    assert sae.threshold == math.inf
    sae.loss(torch.tensor([[5.0, 2, 0, 0], [4, 1, 0, 0]]))
    assert sae.threshold == 4  # the first value is copied
    sae.loss(torch.tensor([[9.0, 8, 0, 0], [0, 0, 0, 0]]))
    assert sae.threshold == 4 + 0.25 * (8 - 4)
    for silent in (-torch.ones(2, 4), torch.full((2, 4), torch.nan)):
        sae.loss(silent)
        assert sae.threshold == 5


def test_only_a_training_loss_moves_the_threshold():
    sae = identity(1)
    x = torch.tensor([[5.0, 2, 0, 0], [4, 1, 0, 0]])
    sae(x)
    sae.encode(x)
    assert sae.threshold == math.inf
    sae.loss(x)
    sae.eval()
    sae.loss(10 * x)
    sae(10 * x)
    assert sae.threshold == 4
    assert not sae.threshold.requires_grad


def test_inference_keeps_what_is_strictly_above_whatever_the_neighbours():
    sae = identity(1)
    sae.threshold = torch.tensor(2.0)
    sae.eval()
    x = torch.tensor([[1.0, 2, 3, -4], [9, 8, 7, 6]])
    assert sae.encode(x).tolist() == [[0, 0, 3, 0], [9, 8, 7, 6]]
    assert torch.equal(sae.encode(x[:1]), sae.encode(x)[:1])


def test_inference_never_keeps_what_is_not_positive():
    sae = identity(1)
    sae.threshold = torch.tensor(-2.0)
    x = torch.tensor([[1.0, 2, 0, -1], [-3, 8, -1.5, 6]])
    assert torch.equal(sae.eval().encode(x), x.relu())


def test_inference_before_training_says_what_to_do():
    sae = identity(1).eval()
    with pytest.raises(RuntimeError, match="expected a threshold in eval mode, got none yet; call"):
        sae(torch.ones(2, 4))
    sae.train()
    sae.loss(torch.ones(2, 4))
    sae.eval()
    assert sae(torch.full((1, 4), 2.0)).sum() == 8
    sae.load_state_dict(identity(1).state_dict())
    sae.eval()
    with pytest.raises(RuntimeError, match="got none yet"):
        sae(torch.ones(2, 4))


def test_threshold_mode_keeps_k_on_average_on_held_out_data():
    sae = BatchTopKSAE(32, 512, 12.5)
    for _ in range(40):
        sae.loss(torch.randn(128, 32))
    sae.eval()
    l0 = sae.encode_sparse(torch.randn(2000, 32)).l0()
    assert abs(l0 / 12.5 - 1) < 0.05


def test_a_cast_does_not_round_the_threshold():
    sae = identity(1)
    sae.threshold = torch.tensor(1.0001)
    exact = sae.threshold.clone()
    for module in (sae.to(torch.bfloat16), copy.deepcopy(sae).double()):
        assert module.threshold.dtype == torch.float32
        assert torch.equal(module.threshold, exact)


def test_threshold_survives_the_state_dict():
    a, b = identity(1), identity(1)
    a.loss(torch.tensor([[5.0, 2, 0, 0]]))
    b.load_state_dict(a.state_dict())
    assert b.threshold == 5


def test_calibration_gives_k_on_the_rows_it_is_given():
    sae = BatchTopKSAE(32, 512, 12.5)
    sae.loss(torch.randn(128, 32))
    x = 1 + 3 * torch.randn(10, 50, 32)
    sae.eval()
    before = sae.encode_sparse(x).l0()
    sae.calibrate_(x)
    after = sae.encode_sparse(x).l0()
    assert abs(before / 12.5 - 1) > 0.5
    assert abs(after / 12.5 - 1) < 0.01
    with pytest.raises(ValueError, match="expected x to have positive pre-activations, got none"):
        identity(1).calibrate_(-torch.ones(2, 4))


def test_the_estimate_is_the_mean_of_the_smallest_kept_values():
    sae = identity(1)
    first = torch.tensor([[5.0, 2, 0, 0], [4, 1, 0, 0]])
    silent = -torch.ones(2, 4)
    sae.estimate_threshold_([])
    sae.estimate_threshold_([silent])
    assert sae.threshold == math.inf
    sae.estimate_threshold_([first, silent, 2 * first])
    assert sae.threshold == (4 + 8) / 2
