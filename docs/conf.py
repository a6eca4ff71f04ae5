"""The site of the documentation: `make docs` writes it to build/docs, and a dead reference fails.

Docstrings are in Google's style with some sections of our own, and in Markdown as far as they are
marked up: single backticks for code, an indented block for formulas. `to_rst` turns them into what
Sphinx reads. In backticks, a public name of the package is a link; `fastsae.` before it says that
it has to be one.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst.states import Inliner
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

import fastsae

project = "fastsae"
version = release = fastsae.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "fastsae"
exclude_patterns = ["conf.py"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
default_role = "name"
nitpicky = True
# Other packages' pages are not looked up: building needs no network.
nitpick_ignore_regex = [(r"py:.*", r"(?!fastsae\b).*")]

SECTIONS = ("Gradients", "Numerics", "Cost", "Source")
napoleon_custom_sections = [(section, "notes_style") for section in SECTIONS]
napoleon_use_rtype = False
napoleon_use_ivar = True

HERE = Path(__file__).parent
OUTSIDE = {"bench": "../bench/README.md", "contributing": "../CONTRIBUTING.md"}

# Packages whose __all__ has a page in docs/api, in the order in which a name is looked for.
PACKAGES = ("ops", "nn", "train", "data", "models", "eval", "analysis", "report", "interop")


def places() -> dict[int, str]:
    """Return under which name every public object is documented, by its id."""
    found: dict[int, str] = {}
    for package in PACKAGES:
        module = importlib.import_module(f"fastsae.{package}")
        if not hasattr(module, "__all__"):  # its modules are documented one by one
            for info in pkgutil.iter_modules(module.__path__):
                inner = importlib.import_module(f"{module.__name__}.{info.name}")
                for name, value in vars(inner).items():
                    if getattr(value, "__module__", None) == inner.__name__ and name[0] != "_":
                        found.setdefault(id(value), f"{inner.__name__}.{name}")
        for name in getattr(module, "__all__", ()):
            found.setdefault(id(getattr(module, name)), f"fastsae.{package}.{name}")
    return found


PLACES = places()
PUBLIC = {place.rpartition(".")[2]: place for place in PLACES.values()}


def place_of(target: str) -> str | None:
    """Return the documented name of what `target` names: `fastsae.nn.sae.SAE.loss`, or `SAE`."""
    head, *rest = target.removeprefix("fastsae.").split(".")
    if not target.startswith("fastsae.") and head not in PUBLIC:
        return None
    found: Any = fastsae
    for at, part in enumerate((head, *rest)):
        if part in PUBLIC and not hasattr(found, part):
            return ".".join([PUBLIC[part], *(head, *rest)[at + 1 :]])
        found = getattr(found, part, None)
        if id(found) in PLACES:
            return ".".join([PLACES[id(found)], *(head, *rest)[at + 1 :]])
    return None


def exists(target: str) -> bool:
    """Return whether `target` is a class or function of a module of the package."""
    module, _, name = target.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), name)
    except (ImportError, ValueError):
        return False


def resolve(
    app: Sphinx, env: Any, node: pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Find a public object by another of its names, such as `fastsae.nn.topk.TopKSAE`.

    Signatures and bases name internal classes too: those stay without a link if they exist.
    """
    if node.get("refdomain") != "py":
        return None
    target = str(node["reftarget"])
    place = place_of(target)
    if place is None or place == target:
        return content if node["reftype"] == "class" and exists(target) else None
    domain, document = env.get_domain("py"), node.get("refdoc")
    return domain.resolve_xref(env, document, app.builder, "obj", place, node, content)


def name_role(
    name: str, rawtext: str, text: str, lineno: int, inliner: Inliner, *_: Any
) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """Return text in backticks: a link if it names something public, else code."""
    text = text.replace("\x00", "")
    literal = nodes.literal(text, text)
    bare = re.sub(r"\(.*\)$", "", text)
    named = re.fullmatch(r"fastsae(\.\w+)+|[A-Z]\w+(\.\w+)*", bare)
    if not named or (not bare.startswith("fastsae.") and place_of(bare) is None):
        return [literal], []
    target = place_of(bare) or bare
    about = {"refdomain": "py", "reftype": "obj", "reftarget": target, "refwarn": True}
    env = inliner.document.settings.env
    return [pending_xref("", literal, refdoc=env.docname, refexplicit=False, **about)], []


def to_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrite a docstring in place: formulas become literal blocks, stray marks are escaped."""
    out: list[str] = []
    section, block = False, False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if re.match(
            r"(Args|Returns|Raises|Yields|Attributes|Example|" + "|".join(SECTIONS) + "):$", line
        ):
            section = True
        elif line and not indent:
            section = False
        if block and line and indent < 4:
            block = False
        if indent >= 4 and not section and not block and (not out or not out[-1]):
            out += ["::", ""]
            block = True
        if inline := re.match(rf"({'|'.join(SECTIONS)}): (.*)", line):
            out += ["", f"**{inline[1]}**: {escape(inline[2])}"]
        else:
            out.append(line if block else escape(line))
    # Napoleon takes what is before a colon in the first line about an attribute for its type.
    lines[:] = ["\\", *out] if what == "attribute" else out


def escape(line: str) -> str:
    """Escape what reStructuredText would take for markup, outside of backticks."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*|\\]|_(?!\w))", r"\\\1", part)
        for part in parts
    )


def link_within_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Show files from outside of docs, and point links to them at where the site has them."""
    if page in OUTSIDE:
        source[0] = (
            (HERE / OUTSIDE[page]).read_text().replace("](../docs/", "](").replace("](docs/", "](")
        )
    for name, file in OUTSIDE.items():
        source[0] = source[0].replace(f"]({file}", f"]({name}.md")
    source[0] = re.sub(r"\]\(\.\./examples/\w+\.py\)", "](examples.md)", source[0])


def setup(app: Sphinx) -> None:
    """Register the above."""
    app.add_role("name", name_role)
    app.connect("autodoc-process-docstring", to_rst, priority=100)
    app.connect("missing-reference", resolve)
    app.connect("source-read", link_within_site)
