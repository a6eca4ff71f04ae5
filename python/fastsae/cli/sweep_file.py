"""The file of `fastsae train --sweep FILE`: runs, by the options of the command line.

    epochs: 2                       # options of `fastsae train`, for all runs
    sweep:                          # all combinations of these
      k: [16, 32, 64]
      arch: [topk, batchtopk]
    runs:                           # and these
      - {name: wide, k: 32, expansion: 32}

A value of a run goes before one of the command line, and that before one for all runs.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fastsae.cli.recipe import add_options

OF_ALL = ("device", "seed", "batch-size", "hold-back", "partial")
"""What cannot differ between runs that take the same batches."""
OF_ONE = ("time-budget",)
"""What a single run can have only."""

Values = dict[str, Any]


class Resolved(NamedTuple):
    """A run of the file."""

    name: str
    """Of its folder."""
    args: argparse.Namespace
    """Its options, as the command line would have given them."""


class _Options(argparse.ArgumentParser):
    """The options of one run; what is wrong is a ValueError."""

    def __init__(self) -> None:
        super().__init__(add_help=False)
        add_options(self)
        self.by_key = {
            action.option_strings[0].removeprefix("--"): action
            for action in self._actions
            if action.option_strings
        }

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def rivals(self, key: str) -> list[str]:
        """Return the options that exclude `key`."""
        action = self.by_key[key]
        groups = [g._group_actions for g in self._mutually_exclusive_groups]
        return [
            other
            for group in groups
            if action in group
            for other, its in self.by_key.items()
            if its in group and its is not action
        ]


def read(path: Path, argv: list[str]) -> list[Resolved]:
    """Return the runs that a file describes.

    Args:
        path: of the YAML file.
        argv: the command line, from the command on; what it says goes before values for all runs.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not what this module says.
        ModuleNotFoundError: PyYAML is not installed.
    """
    from fastsae._files.read import read_yaml

    content = read_yaml(path, "train")
    try:
        return _resolved(content, _given(argv))
    except ValueError as error:
        raise ValueError(f"train: {path}: {error}") from None


def _resolved(content: Values, given: Values) -> list[Resolved]:
    options = _Options()
    lists = content.pop("sweep", None) or {}
    listed = content.pop("runs", None) or []
    base = _merged(options, _checked(options, content, "", (*OF_ALL, *OF_ONE)), given)
    if not isinstance(lists, dict):
        raise ValueError(f"expected sweep to be a list of values for each option, got {lists!r}")
    lists = _checked(options, lists, " in sweep", OF_ALL)
    for key, values in lists.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"expected a list of values for {key} in sweep, got {values!r}")
    runs: list[Resolved] = []
    for values in itertools.product(*lists.values()) if lists else ():
        own = dict(zip(lists, values, strict=True))
        runs.append(_run(options, base, own, _name_of(own)))
    if not isinstance(listed, list):
        raise ValueError(f"expected runs to be a list, got {listed!r}")
    for number, entry in enumerate(listed, 1):
        if not isinstance(entry, dict):
            raise ValueError(f"expected run {number} to be a mapping of options, got {entry!r}")
        name = entry.get("name")
        own = {key: value for key, value in entry.items() if key != "name"}
        own = _checked(options, own, f" in run {number}", OF_ALL)
        if name is None and not own:
            raise ValueError(f"expected a name or an option in run {number}, got none")
        runs.append(_run(options, base, own, _name_of(own) if name is None else str(name)))
    if not runs:
        raise ValueError("expected at least one run, in sweep or runs, got none")
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"expected a name for each run, got {name!r} twice")
    return runs


def options_of(args: argparse.Namespace) -> Values:
    """Return the options of a run, by their names."""
    return {key: getattr(args, action.dest) for key, action in _Options().by_key.items()}


def _given(argv: list[str]) -> Values:
    """Return the options of a run that are on the command line."""
    options = _Options()
    for action in options.by_key.values():
        action.default = argparse.SUPPRESS
    values = vars(options.parse_known_args(argv)[0])
    found = {key: values[a.dest] for key, a in options.by_key.items() if a.dest in values}
    return {key: getattr(value, "text", value) for key, value in found.items()}


def _checked(options: _Options, values: Values, where: str, shared: tuple[str, ...]) -> Values:
    """Return values by the names of options, if there are such, and they can stand here."""
    found: Values = {}
    for given, value in values.items():
        key = str(given).replace("_", "-")
        if key not in options.by_key:
            known = [*options.by_key, *(() if where else ("sweep", "runs"))]
            near = difflib.get_close_matches(key, known, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise ValueError(f"expected an option of fastsae train{where}, got {given!r}{hint}")
        if key in found:
            raise ValueError(f"expected {key}{where} once, got it twice")
        if where and key in shared:
            hint = "; start-seed may differ" if key == "seed" else ""
            raise ValueError(
                f"expected {key} for all runs, which take the same batches, got it{where}{hint}"
            )
        found[key] = value
    for key in OF_ONE:
        if key in found:
            raise ValueError(f"expected steps or epochs, got {key}, which is of a single run")
    return found


def _merged(options: _Options, *levels: Values) -> Values:
    """Return the values of all levels; a later one goes before, also before what it excludes."""
    found: Values = {}
    for level in levels:
        for key in level:
            for rival in options.rivals(key):
                found.pop(rival, None)
        found |= level
    return found


def _run(options: _Options, base: Values, own: Values, name: str) -> Resolved:
    words = [
        word
        for key, value in _merged(options, base, own).items()
        for word in _words(options.by_key[key], key, value, name)
    ]
    try:
        return Resolved(name, options.parse_args(words))
    except ValueError as error:
        raise ValueError(f"run {name}: {error}") from None


def _words(action: argparse.Action, key: str, value: Any, name: str) -> list[str]:
    """Return an option as words of a command line; None is its default."""
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"run {name}: expected {key} to be true or false, got {value!r}")
        return [f"--{key}"] if value else []
    several = isinstance(action.default, list) or key == "site"
    if key == "option" and isinstance(value, dict):
        value = [f"{each}={json.dumps(its)}" for each, its in value.items()]
    values = value if several and isinstance(value, list) else [value]
    for each in values:
        if isinstance(each, bool) or not isinstance(each, str | int | float):
            what = "values" if several else "one value"
            raise ValueError(f"run {name}: expected {key} to be {what}, got {each!r}")
    return [f"--{key}={each}" for each in values]


def _name_of(values: Values) -> str:
    """Return a name that says what a run has of its own."""
    return "_".join(f"{key}-{_as_name(value)}" for key, value in values.items())


def _as_name(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{key}={json.dumps(its)}" for key, its in value.items()]
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-")
