"""The timing of cross-layer transcoders compares steps that do the same."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bench import cross_layer

SIZE = cross_layer.Size(layers=3, d_model=8, latents=32, k=6, tokens=40)


def test_both_ways_go_the_same_way():
    s = cross_layer.start(SIZE)
    ours, theirs = (cross_layer.WAYS[name](SIZE, s) for name in ("fastsae", "dense torch"))
    losses = []
    for _ in range(4):
        (loss, out), (their_loss, their_out) = ours(), theirs()
        torch.testing.assert_close(loss, their_loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out, their_out, rtol=1e-2, atol=1e-3)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_a_difference_is_noticed():
    def other():
        return torch.tensor(1.0), torch.zeros(40, 24)

    s = cross_layer.start(SIZE)
    with pytest.raises(AssertionError):
        cross_layer.check({"fastsae": cross_layer.fastsae_step(SIZE, s), "dense torch": other})


def test_the_table_has_a_row_for_each_way(monkeypatch, capsys):
    sizes = ("--layers", "2", "--d-model", "8", "--latents", "16", "--k", "4", "--tokens", "32")
    monkeypatch.setattr(sys, "argv", ["cross_layer", *sizes, "--rounds", "1", "--threads", "1"])
    monkeypatch.setattr(cross_layer, "find_spec", lambda name: None)
    assert cross_layer.main() == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["implementation"] for row in rows] == ["fastsae", "dense torch"]
    assert all(row["tokens_per_second"] > 0 and row["peak_mib"] >= 0 for row in rows)
