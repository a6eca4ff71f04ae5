"""Documents: files, the language reference, and how they are cut."""

from __future__ import annotations

import pytest

from fastsae.models.text import clean, pieces, python_topics, read_files


def test_one_document_per_file_or_per_line(tmp_path):
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n\n{"text": "third", "id": 3}\n')
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    assert read_files(paths) == ["first\n", "second", "third"]


def test_reference_topics_share_no_paragraph():
    topics = python_topics()
    assert len(topics) > 40
    assert topics == sorted(topics, key=len)
    assert sum(map(len, topics)) > 200_000
    paragraphs = [p for topic in topics for p in topic.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert not any(set(line) == {"*"} for topic in topics for line in topic.splitlines())


def test_cleaning_joins_lines_of_prose_but_not_of_code():
    text = "Title\n*****\n\nOne line\ngoes on.\n\n   code\n   more code\n"
    assert clean([text, "One line\ngoes on.\n\nNew"]) == [
        "Title\n\nOne line goes on.\n\n   code\n   more code",
        "New",
    ]


def test_few_documents_are_cut_at_blank_lines():
    text = "\n\n".join("x" * 100 for _ in range(200))
    cut = pieces([text, "short"], size=250)
    assert "".join(cut) == text + "short"
    assert {len(piece) for piece in cut[:-2]} == {306}
    assert cut[-1] == "short"
    many = [text] * 20
    assert pieces(many, size=250) == many


@pytest.mark.parametrize("sign", ["\n\n", "\n", " ", ""])
def test_every_text_gives_enough_pieces(sign):
    text = sign.join(f"word{i:04}" for i in range(500))
    cut = pieces([text])
    assert 10 <= len(cut) <= 20
    assert "".join(cut) == text
    if sign:
        assert all(piece.endswith(sign) for piece in cut[:-1])


def test_blank_pieces_are_left_out():
    assert pieces(["a", " \n", "b"]) == ["a", "b"]
