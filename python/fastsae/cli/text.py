"""Documents for a command: text files, or the language reference that comes with Python."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

UNDERLINE = re.compile(r"\s*[*=~\-^+]{3,}\s*")


def read_files(paths: Sequence[str]) -> list[str]:
    """Return one document per file, or per line for .jsonl files with a field "text".

    Raises:
        FileNotFoundError, OSError: a file cannot be read.
        ValueError: a file is empty, is not UTF-8 text, or a line of .jsonl has no "text".
    """
    documents = []
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise FileNotFoundError(f"no such text file: {name}")
        if path.is_dir():
            raise ValueError(f"expected a text file, got a folder: {name}")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise OSError(f"cannot read {name}: {error.strerror}") from None
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise ValueError(f"expected UTF-8 text, got a binary file: {name}") from None
        if "\0" in text:
            raise ValueError(f"expected UTF-8 text, got a binary file: {name}")
        if not text.strip():
            raise ValueError(f"expected some text, got an empty file: {name}")
        documents += _json_lines(name, text) if path.suffix == ".jsonl" else [text]
    return documents


def _json_lines(name: str, text: str) -> list[str]:
    """Return the field "text" of every line."""
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            document = None
        if not isinstance(document, str):
            raise ValueError(
                f'expected {{"text": "..."}} in line {number} of {name}, got {line[:40]}'
            )
        documents.append(document)
    return documents


def python_topics() -> list[str]:
    """Return the topics of Python's `help()` (its language reference) as documents, by name.

    Topics quote each other; a paragraph stays in the first topic that has it, so that held-out
    topics share no paragraph with the others.

    Raises:
        RuntimeError: this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise RuntimeError(
            "this Python comes without pydoc_data.topics; give text with --text FILE"
        ) from None
    return clean(topics[name] for name in sorted(topics))


def clean(documents: Iterable[str]) -> list[str]:
    """Take underlines and line breaks inside paragraphs out of reST, and repeated paragraphs."""
    seen: set[str] = set()
    cleaned = []
    for document in documents:
        kept = []
        for paragraph in re.split(r"\n\s*\n", document.strip("\n")):
            lines = [x for x in paragraph.splitlines() if not UNDERLINE.fullmatch(x)]
            indented = any(line.startswith(" ") for line in lines)
            text = ("\n" if indented else " ").join(lines)
            if text and text not in seen:
                seen.add(text)
                kept.append(text)
        cleaned.append("\n\n".join(kept))
    return [document for document in cleaned if document]


def pieces(documents: Sequence[str], size: int = 6000, enough: int = 20) -> list[str]:
    """Cut documents at blank lines into pieces of about `size` characters, if there are too few.

    With `enough` documents or more, whole documents can be held out, and nothing is cut.
    """
    if len(documents) >= enough:
        return list(documents)
    out = []
    for document in documents:
        piece: list[str] = []
        for paragraph in re.split(r"\n\s*\n", document):
            piece.append(paragraph)
            if sum(map(len, piece)) >= size:
                out.append("\n\n".join(piece))
                piece = []
        if piece:
            out.append("\n\n".join(piece))
    return out
