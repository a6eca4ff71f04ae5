"""Dead latents are counted in tokens, by values and not by selection."""

import pytest
import torch

from fastsae.nn import TopKSAE
from fastsae.train import DeadLatents


def test_counts_tokens_and_resets_on_one_firing():
    dead = DeadLatents(3, after_tokens=100)
    fired = torch.tensor([True, False, False])
    dead.update(fired, 60)
    assert dead.tokens_since_fired.tolist() == [0, 60, 60]
    assert not dead.mask().any()
    dead.update(fired, 40)
    assert dead.mask().tolist() == [False, True, True]
    dead.update(~fired & torch.tensor([False, True, False]), 1)
    assert dead.mask().tolist() == [False, False, True]
    assert dead.tokens_since_fired.tolist() == [1, 0, 101]


@pytest.mark.parametrize("batches", [[1000], [1] * 1000, [400, 600]])
def test_the_batch_size_does_not_matter(batches):
    dead = DeadLatents(1, after_tokens=1000)
    for tokens in batches:
        assert not dead.mask().any()
        dead.update(torch.tensor([False]), tokens)
    assert dead.mask().all()


def test_a_latent_selected_with_value_zero_has_not_fired():
    sae = TopKSAE(4, 6, k=6)
    sae.b_enc = torch.tensor([1e3, -1e3, -1e3, -1e3, -1e3, -1e3])
    acts = sae.loss(torch.randn(5, 4)).acts
    assert set(acts.indices.flatten().tolist()) == {0, 1, 2, 3, 4, 5}
    assert acts.fired().tolist() == [True] + 5 * [False]
