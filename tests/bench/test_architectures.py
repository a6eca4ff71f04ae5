"""The benches of architectures: what they train, measure and print."""

import torch

from bench.architectures import ARCHITECTURES, LAYERS, OTHERS, build, measure, report
from bench.planted import KINDS, Planted, for_architecture, planted, recovery
from fastsae.nn import TopKSAE


class Source:
    """Random rows in the place of real ones, and no model."""

    contexts = torch.zeros(4, 76)
    with_model = True

    def split(self, name):
        blocks = 2 if name.startswith(("Gradient", "Transcoder")) else 1
        blocks = len(LAYERS) if name.startswith("CrossCoder") else blocks
        x = torch.randn(1400, 8 * blocks) @ torch.randn(8 * blocks, 8 * blocks)
        return x[:1100], x[1100:]

    def recovered(self, fn):
        x_hat = fn(torch.randn(300, 8))
        assert x_hat.shape == (300, 8)
        assert not x_hat.requires_grad
        return 0.5


def test_every_row_of_the_table_can_be_trained_and_measured():
    torch.manual_seed(0)
    rows = []
    for name in ARCHITECTURES | OTHERS:
        first, *others = measure(name, 0, Source(), 4, steps=3)
        rows += [first, *others]
        assert first["architecture"] == name
        assert 0 < first["l0"] <= 32, name
        assert ("recovered" in first) == (name in ARCHITECTURES or name == "Gradient")
    table = report(rows)
    for row in rows:
        assert 0 < row["fvu"] < 9, row
        line = f"| {row['architecture']} | {row['parameters']:,} | 1 | {row['fvu']:.4f} ± 0.0000 |"
        assert line in table
    assert "| Gradient, scored | " in table
    assert "| TopK, pursuit (512 rows) | " in table


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


def test_every_architecture_gets_the_columns_it_reads():
    data = planted("independent", 100, 16, 8, 2, seed=0)
    for name in ARCHITECTURES | OTHERS:
        own, sae = for_architecture(name, data, 0), build(name, 8, 16, 2)
        assert own.x.shape[1] == sum(sae.columns.widths), name
        goal = sae.columns.split(own.x).target
        scale = len(LAYERS) ** 0.5 if name.startswith("CrossCoder") else 1
        torch.testing.assert_close(goal, scale * own.code @ own.directions)
        norms = own.directions.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
