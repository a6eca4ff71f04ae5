"""The page about an SAE's error is whole, loads nothing, and gives the numbers."""

from __future__ import annotations

import pytest
import torch

from fastsae.analysis import dark_matter
from fastsae.nn import TopKSAE
from fastsae.report import write_dark_matter
from tests.models.tiny import D, tiny_model
from tests.report.test_report import Checker

CONTEXTS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    fit, held_out = torch.randn(300, D), torch.randn(100, D)
    return dark_matter(
        [TopKSAE(D, 40, k=3), TopKSAE(D, 1080, k=3)], fit, held_out, pursuit_rows=64,
        earlier={"u <i>": (fit[:, :4], held_out[:, :4])},
        model=tiny_model(), site="resid_post.1", contexts=CONTEXTS,
    )  # fmt: skip


def written(found, tmp_path, **kwargs) -> str:
    path = tmp_path / "page.html"
    write_dark_matter(path, found, **kwargs)
    text = path.read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.loads == []
    assert len(checker.ids) == len(set(checker.ids))
    assert "http" not in text
    return text


def test_the_page_gives_every_part(found, tmp_path):
    text = written(found, tmp_path, title="About <x>", facts={"<k>": "<v>"})
    assert "<h1>About &lt;x&gt;</h1>" in text
    assert "&lt;v&gt;" in text
    assert "u &lt;i&gt;" in text
    assert "u <i>" not in text
    assert "1,080 latents, L0 3.0" in text
    last = found.saes[-1]
    for number in (
        f"{last.anatomy.fvu_nonlinear:.4f}",
        f"{last.cost.linear_added:.3f}",
        f"{last.pursuit.pursuit.fvu:.4f}",
        f"{last.earlier['u <i>'].fvu:.4f}",
        f"{float(found.correlation[0, 1]):.3f}",
    ):
        assert number in text
    assert text.count("<svg") == 5


def test_one_sae_without_model_pursuit_or_earlier_outputs(tmp_path):
    sae = TopKSAE(D, 40, k=3)
    text = written(dark_matter([sae], torch.randn(90, D), torch.randn(50, D)), tmp_path)
    assert text.count("<svg") == 2
    assert "pursuit" not in text
    assert "Cross entropy" not in text
