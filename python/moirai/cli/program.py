"""The program a command is to start: told apart from the command's own options, and started alike.

A started program is a new image of Python, not code run inside ours: `python` itself makes
`__main__`, `sys.path`, tracebacks and the exit status what they would be without Moirai.
"""

from __future__ import annotations

import os
import sys

from moirai.errors import InvalidArgument, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:  # Each import here would delay every `moirai run`.
    from argparse import ArgumentParser
    from collections.abc import Mapping, Sequence

__all__ = [
    "STARTUP_DIRECTORY",
    "Program",
    "build_name",
    "interpreter_options",
    "parse_program",
    "split_arguments",
    "with_startup",
]

STARTUP_DIRECTORY = os.path.join(
    os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "_startup"
)

_OPTIONS_WITH_VALUE = "XW"
_OPTIONS_AGAINST_STARTUP = {"-E": "the environment", "-I": "the environment", "-S": "site"}


class Program:
    """A program as given to `python`: its interpreter's options, then target and arguments."""

    def __init__(self, options: Sequence[str], target: Sequence[str]) -> None:
        self.options = tuple(options)
        self.target = tuple(target)

    @property
    def command(self) -> list[str]:
        """The command that starts it with the interpreter that runs us."""
        return [sys.executable, *self.options, *self.target]


def split_arguments(
    parser: ArgumentParser, arguments: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Split a command's arguments where its program begins.

    argparse would take options after the script for its own. The program begins at the first
    argument that is no option and no option's value, at -m or -c, at - (standard input), or
    after --.
    """
    takes_value = {
        name for action in parser._actions for name in action.option_strings if action.nargs is None
    }
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        if argument == "--":
            return list(arguments[:index]), list(arguments[index + 1 :])
        if not argument.startswith("-") or argument == "-" or argument.startswith(("-m", "-c")):
            break
        index += 2 if argument in takes_value else 1
    return list(arguments[:index]), list(arguments[index:])


def parse_program(arguments: Sequence[str], *, options: Sequence[str] = ()) -> Program:
    """Check what follows a command's options.

    Args:
        arguments: `script.py args…`, `-m module args…`, `-c code args…` or `- args…`.
        options: Options of the interpreter, such as -X dev.

    Raises:
        InvalidArgument: Nothing is to be started, or -m or -c lacks its value.
        Unsupported: An option keeps the startup hook from being loaded.
    """
    expected = "expected a script, -m module, -c code or - for standard input"
    if not arguments:
        raise InvalidArgument(f"program: {expected}, got nothing")
    first = arguments[0]
    if first in ("-m", "-c") and len(arguments) == 1:
        raise InvalidArgument(f"program: expected a value after {first}, got nothing")
    if first.startswith("-") and first != "-" and not first.startswith(("-m", "-c")):
        raise InvalidArgument(f"program: {expected}, got {first!r}")
    for option in _single_flags(options):
        if option in _OPTIONS_AGAINST_STARTUP:
            raise Unsupported(
                f"python: option {option} keeps Moirai out of the program, because it ignores "
                f"{_OPTIONS_AGAINST_STARTUP[option]}: leave it out"
            )
    return Program(options, arguments)


def interpreter_options(command_line: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a Python command line, as in `sys.orig_argv`, behind the interpreter's own options.

    Returns:
        The options, and the rest from -m, -c, - or the script on.
    """
    index = 1
    while index < len(command_line):
        argument = command_line[index]
        if argument == "--check-hash-based-pycs":
            index += 2
            continue
        if not argument.startswith("-") or argument == "-":
            break
        if argument.startswith("--"):
            index += 1
            continue
        letters = argument[1:]
        end = next(
            (i for i, letter in enumerate(letters) if letter in "mc" + _OPTIONS_WITH_VALUE), None
        )
        if end is None:
            index += 1
        elif letters[end] in _OPTIONS_WITH_VALUE:
            index += 1 if letters[end + 1 :] else 2
        elif end == 0:
            break
        else:  # -um module: the flags before the m are options, the rest is the target.
            options = [*command_line[1:index], "-" + letters[:end]]
            return options, ["-" + letters[end:], *command_line[index + 1 :]]
    return list(command_line[1:index]), list(command_line[index:])


def with_startup(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that have Python load `_startup/sitecustomize.py` first."""
    entries = (
        environment.get("PYTHONPATH", "").split(os.pathsep) if environment.get("PYTHONPATH") else []
    )
    others = [entry for entry in entries if entry != STARTUP_DIRECTORY]
    return {
        "PYTHONPATH": os.pathsep.join([STARTUP_DIRECTORY, *others]),
        "MOIRAI_BUILD": build_name(),
    }


def build_name() -> str:
    """Name the kind of interpreter that can load our native module, as `sitecustomize` does."""
    return f"{sys.implementation.cache_tag}{sys.abiflags}"


def _single_flags(options: Sequence[str]) -> list[str]:
    """Spell out -IE as -I -E; values of -X and -W are skipped."""
    flags: list[str] = []
    is_value = False
    for option in options:
        if is_value or option.startswith("--"):
            is_value = False
            continue
        for position, letter in enumerate(option[1:], start=1):
            if letter in _OPTIONS_WITH_VALUE:
                is_value = position == len(option) - 1
                break
            flags.append("-" + letter)
    return flags
