"""A tiny language model and tokenizer in a folder, as `transformers` loads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.tiny import VOCAB, tiny_model

LETTERS = "abcdefghijklmnopqrstuvwxyz .,;:!?'\"()\n0123456789"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    """Return the folder of a Llama of 3 blocks, one token per character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocab = {"<unk>": 0, "<s>": 1, **{c: i + 2 for i, c in enumerate(LETTERS)}}
    assert len(vocab) <= VOCAB
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>"
    ).save_pretrained(folder)
    tiny_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path) -> str:
    """Return a text file of 60 different paragraphs, 9,000 characters."""
    path = Path(tmp_path) / "text.txt"
    words = [
        "the",
        "a",
        "fox",
        "dog",
        "jumps",
        "over",
        "lazy",
        "quick",
        "brown",
        "and",
        "or",
        "not",
        "to",
        "be",
        "is",
    ]
    paragraphs = []
    for i in range(60):
        sentence = " ".join(words[(i * 7 + j * (i + 3)) % len(words)] for j in range(30))
        paragraphs.append(f"{i}. {sentence}.")
    path.write_text("\n\n".join(paragraphs))
    return str(path)
