"""The benches of architectures: what they train, measure and print."""

import torch

from bench.architectures import ARCHITECTURES, build, measure, report
from bench.planted import KINDS, Planted, planted, recovery
from fastsae.nn import TopKSAE


def test_every_row_of_the_table_can_be_trained_and_measured():
    x = torch.randn(1400, 8) @ torch.randn(8, 8)
    rows = [measure(name, 0, x[:1100], x[1100:], 3, steps=3) for name in ARCHITECTURES]
    table = report(rows)
    for name, row in zip(ARCHITECTURES, rows, strict=True):
        assert 0 < row["fvu"] < 3, name
        assert 0 < row["l0"] <= 32, name
        assert f"| {name} | 1 | {row['fvu']:.4f} ± 0.0000 |" in table


def test_planted_features_are_as_many_as_asked_for():
    for kind in KINDS:
        data = planted(kind, 5000, 64, 32, 3, seed=0)
        assert abs(float((data.code > 0).sum(1).float().mean()) - 3) < 0.3, kind
        torch.testing.assert_close(data.x, data.code @ data.directions)
    code = planted("hierarchical", 5000, 64, 32, 3, seed=0).code > 0
    for child in (1, 2, 3):
        assert not (code[:, child::4] & ~code[:, ::4]).any()


def test_a_perfect_dictionary_is_recognised():
    directions = torch.eye(6, 8)
    code = (torch.rand(500, 6) < 0.3).float() * (1 + torch.rand(500, 6))
    data = Planted(code @ directions, code, directions)
    sae = TopKSAE(8, 6, k=6)
    sae.W_enc, sae.W_dec = directions.t(), directions
    assert recovery(sae, data) == (1.0, 1.0)
    sae.W_dec = torch.roll(torch.eye(6, 8), 2, dims=1)
    assert recovery(sae, data).cosine < 1
    assert build("TopK", 8, 6, 2).k == 2
