"""`moirai run`: start a program with its arrays in Moirai's memory and say what came of it."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time

from moirai.cli.options import ALLOCATORS, add_memory_options, check_memory_options
from moirai.cli.program import (
    interpreter_options,
    parse_program,
    split_arguments,
    with_startup,
)
from moirai.errors import InvalidArgument, MoiraiError

TYPE_CHECKING = False
if TYPE_CHECKING:  # Each import here would delay every `moirai run`.
    from collections.abc import Mapping, Sequence
    from typing import Any

__all__ = ["SUMMARY", "main"]

SUMMARY = "run a program with its NumPy arrays in Moirai's memory"


def main(arguments: Sequence[str]) -> int:
    """Replace this process by the program; returns only if it cannot be started."""
    parser = _parser()
    ours, rest = split_arguments(parser, arguments)
    options = parser.parse_args(ours)
    try:
        program = parse_program(rest, options=interpreter_options(sys.orig_argv)[0])
        _separate_guard_limit(options)
        check_memory_options(options)
        _check_summary_options(options)
        variables = _variables(options, os.environ)
    except MoiraiError as error:
        parser.error(str(error))
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # The descriptor may be closed.
            stream.flush()
    try:
        os.execve(sys.executable, program.command, {**_cleared(os.environ), **variables})
    except OSError as error:  # For one, the arguments may be too long once our variables are added.
        parser.error(f"{sys.executable}: cannot be started: {error.strerror}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moirai run",
        usage="moirai run [options] (script.py | -m module | -c code | -) [arguments…]",
        description="Runs a Python program as `python` would, with its NumPy arrays in Moirai's "
        "memory. Options after the script belong to the script.",
        allow_abbrev=False,
    )
    add_memory_options(parser)
    parser.add_argument(
        "--allocator",
        choices=("auto", *ALLOCATORS),
        default="auto",
        help="what serves the process's malloc: auto is the system's, kept warm; NumPy is left to "
        "any but auto and system, unless --memory is given too (default: auto)",
    )
    parser.add_argument(
        "--guard",
        action="store_true",
        help="watch the memory limit (of the control group, the machine, or --limit for the "
        "program and its children together), respond before it is reached, and have what would "
        "cross it raise MemoryError",
    )
    parser.add_argument(
        "--summary",
        choices=("text", "json", "none"),
        default="text",
        help="what to write to standard error at exit (default: text)",
    )
    parser.add_argument("--summary-file", metavar="PATH", help="write the summary there instead")
    return parser


def _separate_guard_limit(options: argparse.Namespace) -> None:
    """With --guard, --limit is for all of the program, not for its arrays alone."""
    options.guard_limit = None
    if options.guard:
        options.guard_limit, options.limit = options.limit, None


def _check_summary_options(options: argparse.Namespace) -> None:
    """Make the summary's path absolute, and see that it can be written, before the program runs."""
    if options.summary_file is None:
        return
    if options.summary == "none":
        raise InvalidArgument("--summary-file: expected with --summary text or json, got none")
    options.summary_file = os.path.abspath(options.summary_file)
    try:
        with open(options.summary_file, "ab"):
            pass
    except OSError as error:
        raise InvalidArgument(
            f"--summary-file: must be a file that can be written, got {options.summary_file}: "
            f"{error.strerror}"
        ) from None


def _variables(options: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what the program's environment must say besides what it says already."""
    variables = {
        **_malloc_variables(options.allocator, environment),
        **_arena_variables(options.guard, environment),
        **with_startup(environment),
        "MOIRAI_RUN": json.dumps(_settings(options)),
    }
    if options.summary != "none":
        variables["MOIRAI_RECORDS"] = _records()
    return variables


def _arena_variables(is_guarded: bool, environment: Mapping[str, str]) -> dict[str, str]:
    """Keep a free-threaded interpreter from mapping 1 GiB ahead, in which no fence can stand."""
    name = "MIMALLOC_ARENA_RESERVE"
    return {name: "0"} if is_guarded and name not in environment else {}


def _malloc_variables(name: str, environment: Mapping[str, str]) -> dict[str, str]:
    if name in ("auto", "system"):
        return {}
    from moirai.cli import allocators

    return allocators.with_allocator(allocators.select(name, allocators.find_all()), environment)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "memory": options.memory,
        "limit_bytes": options.limit,
        "guard": options.guard,
        "guard_limit_bytes": options.guard_limit,
        "main_process_id": os.getpid(),
        "soft_data_limit": _soft_data_limit(),
        "cache_cap_bytes": options.cache_cap,
        "huge_pages": options.huge_pages or "auto",
        "allocator": options.allocator,
        "summary": options.summary,
        "summary_file": options.summary_file,
        # The program starts now: what this process used before is the launcher's.
        "started_seconds": time.monotonic(),
        "launcher_user_seconds": used.ru_utime,
        "launcher_system_seconds": used.ru_stime,
        "launcher_minor_faults": used.ru_minflt,
        "launcher_major_faults": used.ru_majflt,
    }


def _soft_data_limit() -> int:
    """Return the soft RLIMIT_DATA as the user set it, also within a guarded program."""
    try:
        return int(json.loads(os.environ["MOIRAI_RUN"])["soft_data_limit"])
    except (KeyError, ValueError):
        return resource.getrlimit(resource.RLIMIT_DATA)[0]


def _records() -> str:
    """Name the main process and the directory of its children's records, which the first makes."""
    from moirai.cli.session import start_time

    directory = os.path.join(_temporary_directory(), f"moirai-{os.urandom(8).hex()}")
    return f"{os.getpid()}:{start_time(os.getpid())}:{directory}"


def _temporary_directory() -> str:
    """Return the first folder that can be written, as an absolute path: children may go elsewhere.

    As `tempfile`, which would be slow to import.
    """
    named = (os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    for folder in (*filter(None, named), "/tmp", "/var/tmp", "/dev/shm"):
        if os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            return os.path.abspath(folder)
    return "/tmp"  # Children are not counted then.


def _cleared(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what is no part of the program's.

    That is what a `moirai run` around this one has set, and the LC_CTYPE that an interpreter sets
    at its start where the locale is C (PEP 538): the program's does that itself, and would not be
    in UTF-8 mode if it found it set.
    """
    names = {"MOIRAI_RUN", "MOIRAI_RECORDS"}
    if "LC_CTYPE" in environment and not _came_with("LC_CTYPE"):
        names.add("LC_CTYPE")
    return {name: value for name, value in environment.items() if name not in names}


def _came_with(name: str) -> bool:
    """Whether a variable was in the environment that this process was started with."""
    try:
        with open("/proc/self/environ", "rb") as file:
            return b"\0" + name.encode() + b"=" in b"\0" + file.read()
    except OSError:
        return True
