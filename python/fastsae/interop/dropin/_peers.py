"""Check that another library has what a drop-in relies on, before anything of it is replaced."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any


class Peer:
    """Another library, as a drop-in sees it.

    Args:
        package: its name on PyPI.
        tested: the version that the drop-in was compared with.

    Raises:
        ImportError: from every method, when something is not as the drop-in expects it. One line.
    """

    def __init__(self, package: str, tested: str) -> None:
        self.package, self.tested = package, tested

    def module(self, name: str, *needs: str) -> Any:
        """Return a module of the library that has the attributes `needs`."""
        try:
            found = importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"{self._dropin}: expected to import {name}, got {type(error).__name__}: {error}; "
                f"pip install {self.package}=={self.tested}"
            ) from error
        for need in needs:
            if not hasattr(found, need):
                self.refuse(f"{name}.{need}", "nothing of that name")
        return found

    def parameters(self, function: Any, expected: Iterable[str]) -> None:
        """Compare the names of a function's parameters."""
        got = list(inspect.signature(function).parameters)
        if got != [*expected]:
            name = getattr(function, "__qualname__", str(function))
            self.refuse(f"{name}({', '.join(expected)})", f"({', '.join(got)})")

    def fields(self, config: Any, known: Iterable[str]) -> None:
        """Compare the fields of a dataclass: a new one may be an option that nobody handles."""
        got = {field.name for field in dataclasses.fields(config)}
        if got != set(known):
            differing = ", ".join(sorted(got.symmetric_difference(known)))
            self.refuse(f"the known fields of {config.__name__}", f"a difference in {differing}")

    def refuse(self, expected: str, got: str) -> None:
        """Raise ImportError."""
        raise ImportError(
            f"{self._dropin}: expected {expected}, got {got} in {self.package} {self.version}; "
            f"the drop-in was made for {self.tested}"
        )

    @property
    def version(self) -> str:
        """The installed version."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return "of unknown version"

    @property
    def _dropin(self) -> str:
        return f"fastsae's drop-in for {self.package}"
