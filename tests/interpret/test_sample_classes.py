"""Contexts of SAEs that take rows in other ways: targets beside inputs, normalized rows."""

from __future__ import annotations

import pytest
import torch

from fastsae.interpret import sample_contexts
from fastsae.interpret.sample import fingerprint
from fastsae.nn import NormalizedSAE, TopKSAE, Transcoder
from tests.interpret.stores import documents, write_store

N, D, F = 400, 8, 32


def sampled(folder, sae, x):
    store = write_store(folder, x, torch.arange(N), *documents(N, [50, 7], 25))
    return sample_contexts(sae, store, width=8, top=2, drawn=2)


def test_a_transcoder_encodes_its_inputs_only(tmp_path) -> None:
    sae, x = Transcoder(D, 5, F, k=3).eval(), torch.randn(N, D + 5)
    code = sae.encode(x[:, :D])
    sample = sampled(tmp_path, sae, x)
    assert torch.equal(sample.counts, (code != 0).sum(0))
    torch.testing.assert_close(sample.largest, code.amax(0))


def test_a_normalized_sae_is_sampled_with_its_norm(tmp_path) -> None:
    inner, x = TopKSAE(D, F, k=3).eval(), 5 + 3 * torch.randn(N, D)
    sae = NormalizedSAE(inner, "layer_norm").eval()
    u = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    sample = sampled(tmp_path, sae, x)
    torch.testing.assert_close(sample.largest, inner.encode(u).amax(0))
    marks = {fingerprint(s) for s in (inner, sae, NormalizedSAE(inner, "constant_norm_rescale"))}
    assert len(marks) == 3


def test_rows_of_another_width_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="rows of 13 numbers like the SAE's, got 8"):
        sampled(tmp_path, Transcoder(D, 5, F, k=3), torch.randn(N, D))
