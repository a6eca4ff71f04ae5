"""Codes with signs: what is strong is large in magnitude."""

from __future__ import annotations

import pytest
import torch

from fastsae.analysis import Context
from fastsae.interpret import sample_contexts
from fastsae.interpret.ask import explain_messages
from fastsae.interpret.text import active
from fastsae.nn import TopKSAE
from tests.interpret.stores import documents, write_store

N, D, F, WIDTH = 1500, 8, 24, 8


def test_the_strongest_windows_are_those_of_the_largest_magnitude(tmp_path):
    torch.manual_seed(0)
    docs, places = documents(N, [37, 64], 50)
    store = write_store(tmp_path, torch.randn(N, D), torch.arange(N), docs, places)
    sae = TopKSAE(D, F, k=3, absolute=True).eval()
    code = sae.encode(store.rows()).detach()
    assert (code < 0).any(0).all()
    sample = sample_contexts(sae, store, width=WIDTH, top=5, drawn=9)
    begins = [
        r for r in range(N) if r == 0 or docs[r] != docs[r - 1] or (places[r] - 1) % WIDTH == 0
    ]
    windows = [range(a, b) for a, b in zip(begins, [*begins[1:], N], strict=True)]
    for latent in range(F):
        peaks = sorted(((float(code[w, latent].abs().max()), w) for w in windows), reverse=True,
                       key=lambda pair: pair[0])  # fmt: skip
        top = sample.top(latent)
        assert [c.token_ids for c in top] == [list(w) for _, w in peaks[:5]]
        for c in top + sample.drawn(latent):
            truth = code[c.token_ids, latent]
            assert c.peak == int(truth.abs().argmax())
            torch.testing.assert_close(torch.tensor(c.acts), truth, rtol=1e-3, atol=0)
        sizes = [abs(c.acts[c.peak]) for c in sample.drawn(latent)]
        assert sizes == sorted(sizes, reverse=True)


def test_negative_activations_are_marked_and_listed_with_their_sign():
    context = Context([1, 2, 3, 4], [0.0, -2.0, 0.9, -0.1], 1)
    assert active(context) == [False, True, True, False]
    user = explain_messages([context], lambda ids: "".join(f"t{i}" for i in ids))[1]["content"]
    assert user == "Text 1: t1<<t2t3>>t4\nActive: 't2' -10, 't3' 5, 't4' -1"


@pytest.mark.parametrize("bad", [float("inf"), 1e60])
def test_activations_that_are_not_finite_are_refused(tmp_path, bad):
    docs, places = documents(40, [40], 50)
    x = torch.rand(40, D) + 1
    sae = TopKSAE(D, D, k=2).double()
    with torch.no_grad():
        sae.W_enc = torch.eye(D).double() * bad
    store = write_store(tmp_path, x, torch.arange(40), docs, places)
    with pytest.raises(ValueError, match=r"activations that are finite in float32, got others in "):
        sample_contexts(sae, store)
