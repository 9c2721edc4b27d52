"""`moirai pressure`: what is known of a program's memory pressure, one module a subcommand."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

__all__ = ["SUBCOMMANDS", "SUMMARY", "main"]

SUMMARY = "show how close memory use is to its limit, and where it is going"

# Each has a `SUMMARY` and a `main(arguments)`.
SUBCOMMANDS = {"watch": "moirai.cli.pressure_watch", "replay": "moirai.cli.pressure_replay"}


def main(arguments: Sequence[str]) -> int:
    """Run the subcommand that the arguments name; 2 for a mistake in them."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if not arguments or arguments[0] not in SUBCOMMANDS:
        got = repr(arguments[0]) if arguments else "nothing"
        expected = ", ".join(SUBCOMMANDS)
        print(f"moirai pressure: expected one of {expected}, got {got}", file=sys.stderr)
        return 2
    module = importlib.import_module(SUBCOMMANDS[arguments[0]])
    return int(module.main(list(arguments[1:])))


def _help() -> str:
    lines = "\n".join(
        f"  {name:<9}{importlib.import_module(module).SUMMARY}"
        for name, module in SUBCOMMANDS.items()
    )
    return (
        "usage: moirai pressure [-h] SUBCOMMAND …\n\n"
        f"subcommands:\n{lines}\n\n"
        "moirai pressure SUBCOMMAND --help describes one."
    )
