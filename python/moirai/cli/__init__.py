"""The `moirai` command: one module a command, each with a `SUMMARY` and a `main(arguments)`."""

from __future__ import annotations

import importlib
import io
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

COMMANDS = ("run", "compare", "doctor", "pressure")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name.

    Args:
        arguments: Without the program's name; default: those of this process.

    Returns:
        The exit status: 2 for a mistake in the arguments.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Where the locale has no such sign, a question mark will do, as backslashes on stderr.
        sys.stdout.reconfigure(errors="replace")
    if not arguments:
        return _refuse("expected a command, got nothing")
    name, rest = arguments[0], list(arguments[1:])
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name in ("-V", "--version"):
        print(f"moirai {importlib.import_module('moirai').__version__}")
        return 0
    if name not in COMMANDS:
        return _refuse(f"unknown command {name!r}, expected one of {', '.join(COMMANDS)}")
    try:
        command = importlib.import_module(f"moirai.cli.{name}")
        return int(command.main(rest))
    except BrokenPipeError:
        # Whoever read our output has left; what is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:  # Before the command could say what it does then.
        return 130


def _help() -> str:
    commands = "\n".join(
        f"  {name:<9}{importlib.import_module(f'moirai.cli.{name}').SUMMARY}" for name in COMMANDS
    )
    return (
        "usage: moirai [-h] [-V] COMMAND …\n\n"
        "Gives a Python program command of its memory.\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n  -h, --help     show this help\n  -V, --version  show the version\n\n"
        "moirai COMMAND --help describes a command."
    )


def _refuse(problem: str) -> int:
    print(f"moirai: {problem} (moirai --help lists them)", file=sys.stderr)
    return 2
