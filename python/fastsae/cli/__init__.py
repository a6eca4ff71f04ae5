"""The `fastsae` command: one module per subcommand, each with `add_to(subparsers)` and `run`.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. An error is one line on stderr that
starts with `fastsae:`; FASTSAE_DEBUG=1 shows the traceback instead. Progress and messages go to
stderr, results to stdout; with --json the result is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import fastsae
from fastsae.cli import (
    convert,
    demo,
    evaluate,
    harvest,
    info,
    inspect,
    interpret,
    plan,
    report,
    serve,
    train,
    verify,
)

COMMANDS = (
    demo,
    harvest,
    train,
    plan,
    evaluate,
    report,
    interpret,
    inspect,
    serve,
    convert,
    verify,
    info,
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print what was wrong and exit with 2."""
        self.exit(2, f"fastsae: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = Parser(
        prog="fastsae",
        description="Train and use sparse autoencoders, fast.",
        epilog="new here? run: fastsae demo",
    )
    parser.add_argument("--version", action="version", version=f"fastsae {fastsae.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        args = make_parser().parse_args(argv)
        args.argv = [*(sys.argv[1:] if argv is None else argv)]
    except SystemExit as exit:  # argparse has said what was wrong, or printed --help
        return exit.code if isinstance(exit.code, int) else 2
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        return _fail(f"interrupted; {error}" if str(error) else "interrupted", 130)
    except BrokenPipeError:
        # The reader of our output (`| head`) is gone; closing stdout must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("FASTSAE_DEBUG"):
            raise
        return _fail(_message(error), 1)
    return 0


def _message(error: Exception) -> str:
    """Return an error as one line; what is not a deliberate message gets its type in front."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and not error.filename:
        text = error.strerror
    if isinstance(error, (ValueError, TypeError, OSError, RuntimeError, ImportError)) and text:
        return text.removeprefix("fastsae: ")
    return f"{type(error).__name__}: {text} (FASTSAE_DEBUG=1 shows where)"


def _fail(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")  # of torchrun
    where = f"process {rank}: " if rank != "0" else ""
    print(f"fastsae: {where}{message}", file=sys.stderr)
    return code
