"""The code blocks of the README and of docs/ run as printed."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
PEERS = ("sae_lens", "sparsify", "dictionary_learning")
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs_as_printed(number, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), scope)
    if number == 0:
        result = scope["result"]
        assert result.final["val_fvu"] < 0.5
        assert (tmp_path / "my-sae" / "cfg.json").exists()


@pytest.mark.parametrize(
    "page", sorted((README.parent / "docs").rglob("*.md")), ids=lambda p: p.stem
)
def test_documented_code_runs(page, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        peers = [name for name in PEERS if f"dropin import {name}" in block]
        peers += [name for name in PEERS if f"dropin.{name} import" in block]
        if any(find_spec(name) is None for name in peers):
            continue  # of a page on other libraries, which are not installed here
        exec(compile(block, page.name, "exec"), {})


def test_first_screen_names_the_two_commands() -> None:
    first_screen = README.read_text().split("## Use it")[0]
    assert "make demo" in first_screen
    assert "make test" in first_screen
    assert len(BLOCKS) == 2
    assert len(BLOCKS[0].strip().splitlines()) <= 12
