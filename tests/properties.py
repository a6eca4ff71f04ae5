"""hypothesis where it is installed; where not, as on many a GPU machine, its tests are skipped."""

from __future__ import annotations

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    from typing import Any

    import pytest

    class _Strategies:
        def __getattr__(self, _: str) -> Any:
            return lambda *_arguments, **_options: None

    st: Any = _Strategies()  # type: ignore[no-redef]

    def given(*_: Any, **__: Any) -> Any:  # type: ignore[no-redef]
        def skipped(_: Any) -> Any:
            @pytest.mark.skip(reason="hypothesis is not installed")
            def test() -> None:
                pass

            return test

        return skipped

    def settings(*_: Any, **__: Any) -> Any:  # type: ignore[no-redef]
        return lambda test: test


__all__ = ["given", "settings", "st"]
