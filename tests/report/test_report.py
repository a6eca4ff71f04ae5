"""The report: which contexts it shows, and that the page is whole, safe and self-contained."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch

from fastsae.analysis.examples import ActivatingExamples
from fastsae.analysis.lens import promoted_tokens
from fastsae.data import ActivationStore
from fastsae.data.shards import Manifest, ShardWriter
from fastsae.eval import CrossEntropy, evaluate
from fastsae.nn import TopKSAE
from fastsae.report.html import show
from fastsae.report.plots import held_out, time_curve
from fastsae.report.sections import plots
from fastsae.report.write import write_report
from tests.models.tiny import FAMILIES, VOCAB, D, tiny_model

ROWS, DOC = 2000, 100


class Words:
    """A tokenizer whose tokens are hostile to HTML."""

    def decode(self, ids):
        (i,) = ids
        return ("<script>", "\n", "&amp;", '"quote"', "\t", " plain")[i % 6] + str(i)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One-hot rows with token i % 50 at row i, and an SAE whose latent j reads dimension j."""
    folder = tmp_path_factory.mktemp("store")
    row = torch.arange(ROWS)
    x = torch.nn.functional.one_hot(row % 50, 50).float()
    x *= 1 + (row // 50 % 7).unsqueeze(1)
    writer = ShardWriter(
        folder, Manifest(model="a <b>", dtype="float32", sites={"resid_post.2": 50}), 700
    )
    columns = {"token_ids": row % 50, "doc_ids": row // DOC, "positions": row % DOC + 1}
    writer.add("train", {**{k: v.int() for k, v in columns.items()}, "acts.resid_post.2": x})
    writer.close()
    sae = TopKSAE(50, 50, k=2)
    with torch.no_grad():
        sae.W_enc = torch.eye(50)
        sae.W_dec = torch.eye(50)
    return sae, ActivationStore(folder)


def test_firings_are_sorted_and_complete(trained):
    sae, store = trained
    firings = ActivatingExamples(sae, store, batch_size=300)
    rows, values = firings.of(7)
    assert sorted(rows.tolist()) == list(range(7, ROWS, 50))
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    assert values[0] == 7
    torch.testing.assert_close(values, store.rows()[rows.long(), 7])


def test_contexts_stay_in_their_document_and_do_not_repeat(trained):
    sae, store = trained
    contexts = ActivatingExamples(sae, store).contexts(7, n=8, width=12)
    assert len(contexts) == 1  # the text repeats every 50 tokens, so there is one context
    assert contexts[0].token_ids[contexts[0].peak] == 7
    assert contexts[0].acts[contexts[0].peak] == 7.0
    assert all(a == 0 for i, a in enumerate(contexts[0].acts) if i != contexts[0].peak)
    firings = ActivatingExamples(sae, store)
    firings.token_ids = list(range(ROWS))  # now every context is another
    contexts = firings.contexts(3, n=6, width=12)
    assert len(contexts) == 6
    for context in contexts:
        row = context.token_ids[context.peak]
        first = max(row // DOC * DOC, row - 12)
        assert context.token_ids == list(range(first, min(row // DOC * DOC + DOC, row + 13)))


def test_interesting_latents_are_neither_rare_nor_dense_nor_copies(trained):
    sae, store = trained
    shown = ActivatingExamples(sae, store).interesting(50)
    assert all(abs(latent.frequency - 0.02) < 1e-9 for latent in shown)
    assert [latent.selectivity for latent in shown] == sorted(
        (latent.selectivity for latent in shown), reverse=True
    )
    copy = TopKSAE(50, 51, k=2)
    with torch.no_grad():
        copy.W_enc = torch.cat([torch.eye(50), torch.eye(50)[:, 7:8]], dim=1)
        copy.W_dec = torch.cat([torch.eye(50), torch.eye(50)[7:8]])
    again = ActivatingExamples(copy, store).interesting(51)
    assert len(again) == len(shown)
    assert len({latent.index for latent in again} & {7, 50}) == 1
    with torch.no_grad():  # fires on 4 % of the tokens: too many
        sae2 = TopKSAE(50, 50, k=2)
        sae2.W_enc = torch.eye(50) + torch.eye(50).roll(1, 0)
        sae2.W_dec = torch.eye(50)
    assert ActivatingExamples(sae2, store).interesting(50) == []


class Checker(HTMLParser):
    """Checks that tags close in order and collects what a page would load."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.ids, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("href", "src") and not value.startswith("#"):
                self.loads.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    sae, store = trained
    path = tmp_path_factory.mktemp("report") / "report.html"
    history = [{"step": s, "fvu": 1 / s} for s in range(1, 20)]
    write_report(
        path, sae, store, Words(), evaluate(sae, store), history=history,
        cross_entropy=CrossEntropy(2.0, 3.0, 6.0, 12.0, 9), facts={"<k>": "<v> & more"},
    )  # fmt: skip
    return path.read_text()


def test_the_page_is_well_formed_and_loads_nothing(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.loads == []
    assert len(checker.ids) == len(set(checker.ids))
    assert "script" not in checker.tags
    assert "http" not in page
    assert "url(" not in page.replace("url(#", "")
    assert "@import" not in page
    assert page.count("<svg") == 3
    assert len(page) < 3_000_000


def test_tokens_are_escaped_and_blanks_are_visible(page):
    assert "<script>" not in page
    assert "&lt;script&gt;0" in page
    assert "↵1" in page
    assert "&amp;amp;2" in page
    assert "⇥4" in page
    assert "a &lt;b&gt;" in page
    assert "&lt;v&gt; &amp; more" in page


def test_control_characters_of_tokens_are_shown_not_obeyed():
    assert show("a\x00\x1b[31m\u202eb<") == "a\\x00\\x1b[31m\\u202eb&lt;"
    assert show("x\ty\r\nz") == "x⇥y↵z"


def test_the_page_gives_the_numbers(page):
    assert "75.0%" in page  # recovered against the mean
    assert "90.0%" in page  # against zeros
    assert "+1.000" in page  # delta
    assert 'title="7.00"' in page


def test_without_latents_history_or_cross_entropy(trained, tmp_path):
    sae, store = trained
    path = tmp_path / "r.html"
    write_report(path, sae, store, Words(), evaluate(sae, store), max_rows=30)
    text = path.read_text()
    assert "No latent fires on 0.02% to 2%" in text
    assert "Cross entropy" not in text
    assert text.count("<svg") == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_promoted_tokens_are_those_of_the_unembedding(family):
    model = tiny_model(family)
    unembed = model.get_output_embeddings().weight.detach()
    got = promoted_tokens(model, "resid_post.2", unembed, n=3)
    norm = {"llama": "model.norm", "gpt2": "transformer.ln_f", "neox": "gpt_neox.final_layer_norm"}
    x = model.get_submodule(norm[family])(unembed) @ unembed.T
    assert got == x.detach().topk(3).indices.tolist()
    assert len(got) == VOCAB


def test_no_logit_lens_where_it_would_be_noise():
    model, rows = tiny_model(), torch.randn(2, D)
    assert promoted_tokens(model, "resid_post.0", rows) is None
    assert promoted_tokens(model, "mlp_out.2", rows) is None
    assert promoted_tokens(model, "resid_post.1", rows) is not None


def test_matplotlib_is_asked_for_by_name(trained, tmp_path, monkeypatch):
    import sys

    sae, store = trained
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r"pip install 'fastsae\[report\]'"):
        write_report(tmp_path / "r.html", sae, store, Words(), evaluate(sae, store))
    assert not (tmp_path / "r.html").exists()


def points(**columns):
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_the_curve_over_time_has_points_of_one_kind():
    sampled = points(step=[5, 10, 20], seconds=[1.0, 2.0, 4.0], val_fvu_sample=[0.5, 0.4, 0.3])
    sampled[-1]["val_fvu"] = 0.31
    name, found = held_out(sampled)
    assert (name, len(found)) == ("val_fvu_sample", 3)
    svg = time_curve(sampled)
    assert "sample of held-out text" in svg
    assert [f">{step}<" in svg for step in (5, 10, 20)] == [True] * 3  # every point says its update
    assert ">1 s<" in svg
    assert ">3 s<" in svg
    assert ">10 s<" not in svg
    whole = points(step=[5, 10], seconds=[1.0, 90.0], val_fvu=[0.5, 0.4])
    assert "sample" not in time_curve(whole)
    assert ">1 min<" in time_curve(whole)
    assert time_curve(whole[:1]) is None  # a point is no curve
    assert time_curve(points(step=[5, 10], val_fvu=[0.5, 0.4])) is None  # of an earlier version
    assert time_curve([]) is None


def test_the_curve_over_time_comes_with_its_caption(trained):
    sae, store = trained
    history = points(step=[5, 10], seconds=[1.0, 2.0], fvu=[0.5, 0.4], val_fvu=[0.6, 0.5])
    result = evaluate(sae, store)
    assert plots(sae, result, history).count("<figure>") == 4
    assert "after how much training" in plots(sae, result, history)
    assert plots(sae, result, history[:1]).count("<figure>") == 3
