"""The package has layers: what imports what, at the top of a module or inside a function."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import fastsae

ROOT = Path(fastsae.__file__).parent

# Part of the package -> the parts it may import from. What everything may import is BASE.
BASE = {"types", "_log"}
LAYERS: dict[str, set[str]] = {
    "types": set(),
    "_log": set(),
    "_files": set(),
    "_signals": set(),
    "_library": set(),
    "reference": set(),
    "ops": {"_library", "reference"},
    "nn": {"ops"},
    "models": set(),
    "data": {"models", "_files", "_signals"},
    "interop": {"nn", "models", "ops", "_files"},
    "distributed": {"nn", "data", "ops", "_files"},
    "train": {"nn", "data", "ops", "interop", "distributed", "_files", "_library", "_signals"},
    "eval": {"nn", "models", "data"},
    "analysis": {"nn", "models", "data", "train", "eval"},
    "interpret": {"nn", "models", "data", "analysis", "eval", "_files"},
    "verification": {"data", "interop", "interpret", "train", "_files"},
    "serve": {"nn", "models", "data", "analysis", "interpret", "_files"},
    "report": {"nn", "models", "data", "eval", "analysis", "_files"},
}


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["fastsae", *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of the package that a module imports, lazily or not.

    `if TYPE_CHECKING:` counts: what a signature names is a dependency as well.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: expected absolute imports"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in known else str(node.module))
    return {name for name in names if name in known}


def graph() -> dict[str, set[str]]:
    """Return what every module imports of the package, itself left out."""
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def part(module: str) -> str:
    """Return the part that a module belongs to: `nn` of `fastsae.nn.sae`."""
    return module.split(".")[1] if "." in module else ""


def test_no_module_imports_itself_around_a_corner() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' -> '.join(error.args[1])}") from None


def test_every_part_imports_only_from_below() -> None:
    wrong = []
    for module, imported in graph().items():
        here = part(module)
        if here in ("", "cli"):
            continue
        assert here in LAYERS, f"{module}: say in LAYERS what it may import"
        allowed = LAYERS[here] | BASE | {here}
        wrong += [f"{module} imports {other}" for other in imported if part(other) not in allowed]
    assert wrong == []


def test_nothing_imports_the_command_line() -> None:
    users = {module for module, found in graph().items() if any(part(f) == "cli" for f in found)}
    assert {module for module in users if part(module) != "cli"} == set()


def test_the_graph_sees_lazy_imports(tmp_path: Path) -> None:
    file = tmp_path / "lazy.py"
    file.write_text("def f():\n    from fastsae.nn import topk\n    import fastsae.ops.topk\n")
    assert imports(file, modules()) == {"fastsae.nn.topk", "fastsae.ops.topk"}
