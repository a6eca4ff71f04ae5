"""What all commands share: progress, results, and options that mean the same everywhere."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


@contextmanager
def progress(what: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal; yields the function that moves it on."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    with tqdm(total=total, desc=what, unit=unit, disable=quiet, leave=False) as bar:

        def advance(n: int) -> None:
            bar.update(n)

        yield advance


def say(message: str) -> None:
    """Print a message for people, to stderr."""
    print(message, file=sys.stderr, flush=True)


class _Narrator(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextmanager
def narrated() -> Iterator[None]:
    """Print what the library logs meanwhile, as a command's own messages."""
    logger, narrator = logging.getLogger("fastsae"), _Narrator()
    level = logger.level
    logger.addHandler(narrator)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(narrator)
        logger.setLevel(level)


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print the result of a command: as JSON, or as text."""
    print(json.dumps(result, indent=1) if as_json else text, flush=True)


def table(rows: list[tuple[str, str]]) -> str:
    """Return two aligned columns."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def subcommand(
    subparsers: Any, name: str, help: str, example: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    """Add a subcommand with --json and examples in its --help."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in example.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=run)
    return parser


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


class Duration(NamedTuple):
    """A time as it was given, and in seconds."""

    text: str
    seconds: float


def duration(text: str) -> Duration:
    """Parse a time above 0: `90s`, `10m`, `1.5h`, or seconds alone."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text, re.ASCII)
    seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 10m or 1.5h, got {text!r}")
    return Duration(text, seconds)


def device_named(name: str) -> torch.device:
    """Return the device of --device.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no such device"
        raise ValueError(f"expected --device to be here, got {name} ({reason})") from None
    return device
