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
    """Return the topics of Python's `help()` (its language reference) as documents, short to long.

    Topics quote each other; a paragraph stays in the first topic that has it, so that held-out
    topics share no paragraph with the others. Neighbors are of about the same length, so holding
    out every n-th topic holds out about an n-th of the text, however much of it is used.

    Raises:
        RuntimeError: this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise RuntimeError(
            "this Python comes without pydoc_data.topics; give text with --text FILE"
        ) from None
    return sorted(clean(topics[name] for name in sorted(topics)), key=len)


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
    """Cut documents into pieces of about `size` characters if there are too few to hold some out.

    With `enough` documents or more nothing is cut. A short text gives shorter pieces, so that there
    are always about `enough` of them. Cuts are at blank lines, else at the end of a line or word.
    """
    if len(documents) >= enough:
        return list(documents)
    size = min(size, sum(map(len, documents)) // enough + 1)
    out = []
    for document in documents:
        start = 0
        while start < len(document):
            end = _cut(document, start + size, size)
            out.append(document[start:end])
            start = end
    return [piece for piece in out if piece.strip()]


def _cut(text: str, at: int, within: int) -> int:
    """Return the first good place to cut `text` from `at` on, at most `within` characters later."""
    for sign in ("\n\n", "\n", " "):
        found = text.find(sign, at, at + within)
        if found >= 0:
            return found + len(sign)
    return at + within
