"""`moirai compare`: run one program under several allocators and say which serves it best."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from moirai._arguments import LONGEST_SECONDS
from moirai.cli import allocators
from moirai.cli.measure import Measurement, ProgramFailed, measure
from moirai.cli.options import ALLOCATORS
from moirai.cli.program import (
    Program,
    interpreter_options,
    parse_program,
    split_arguments,
    with_startup,
)
from moirai.cli.progress import Progress
from moirai.errors import InvalidArgument, MoiraiError, Timeout
from moirai.reports import comparison as report

__all__ = ["SUMMARY", "Choice", "choices", "main", "round_order"]

SUMMARY = "run a program under several allocators and say which serves it best"

# The memory options of `moirai run` by configuration name.
_MOIRAI = {
    "moirai": (),
    "moirai-malloc": ("--allocator", "moirai"),
    "moirai-slab": ("--memory", "slab"),
    "moirai-large": ("--memory", "large"),
    "moirai-huge-always": ("--huge-pages", "always"),
    "moirai-huge-never": ("--huge-pages", "never"),
    "moirai-cap32": ("--cache-cap", "32MiB"),
    "moirai-cap64": ("--cache-cap", "64MiB"),
    "moirai-cap256": ("--cache-cap", "256MiB"),
}
# Allocators that are no configuration of their own: plain Python's, and ours, run by `moirai run`.
_OURS = ("system", "moirai")
_TIMEOUT_STATUS = 124


@dataclass(frozen=True)
class Choice:
    """A configuration to measure: what starts the program, and the line a user keeps it with."""

    name: str
    command: tuple[str, ...]
    variables: Mapping[str, str]
    command_line: str


@dataclass
class _Measured:
    """What was measured so far, so that Ctrl-C can still show it."""

    runs: dict[str, list[report.Run]] = field(default_factory=dict)
    is_complete: bool = False


class _ProgramFailedUnder(Exception):
    """The program failed under one configuration."""

    def __init__(self, name: str, failure: ProgramFailed, has_plain_passed: bool) -> None:
        super().__init__(name)
        self.name = name
        self.failure = failure
        self.has_plain_passed = has_plain_passed

    def show(self) -> int:
        """Write the program's own output and what happened; return its exit status."""
        status = self.failure.status
        sys.stderr.flush()
        sys.stderr.buffer.write(self.failure.errors or self.failure.output)
        sys.stderr.flush()
        how = (
            f"by signal {signal.Signals(-status).name}"
            if status < 0
            else f"with exit status {status}"
        )
        line = f"moirai compare: the program ended {how} under {self.name}"
        if self.name != "plain" and self.has_plain_passed:
            line += ", though not under plain"
        print(line, file=sys.stderr)
        return 128 - status if status < 0 else status


class _Terminated(BaseException):
    """SIGTERM or SIGHUP came: leave as Ctrl-C would, with the status of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table to standard output, return the exit status."""
    parser = _parser()
    ours, rest = split_arguments(parser, arguments)
    options = parser.parse_args(ours)
    try:
        program = _program(rest)
        picked = choices(options.configs, program, allocators.find_all(), os.environ)
        _check_json(options)
    except MoiraiError as error:
        parser.error(str(error))
    measured = _Measured({choice.name: [] for choice in picked})
    with _terminable():
        try:
            _measure_all(picked, options, measured)
        except _ProgramFailedUnder as failure:
            return failure.show()
        except (KeyboardInterrupt, _Terminated) as interruption:
            _show(program, picked, options, measured)
            number = interruption.number if isinstance(interruption, _Terminated) else signal.SIGINT
            return 128 + number
        except Timeout as error:
            _show(program, picked, options, measured)
            print(f"moirai compare: {error}", file=sys.stderr)
            return _TIMEOUT_STATUS
    _show(program, picked, options, measured)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moirai compare",
        usage="moirai compare [options] ([python …] script.py | -m module | -c code) [arguments…]",
        description="Runs the same program under plain Python, each allocator found and Moirai's "
        "memory, in turn, and compares CPU time, memory and page faults. "
        "Its output is not shown; its standard input is empty.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--runs", type=_run_count, default=5, metavar="N", help="measured rounds (default: 5)"
    )
    parser.add_argument(
        "--configs",
        type=lambda text: text.split(","),
        metavar="A,B,…",
        help=f"of {', '.join(_configuration_names())} "
        "(default: plain, tuned, each allocator found, moirai)",
    )
    parser.add_argument(
        "--json", metavar="PATH", help="write all measurements there too; -: to standard output"
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="kill the program and stop if one run takes longer (default: never)",
    )
    parser.add_argument(
        "--no-warm-up", action="store_true", help="measure the first run of each, too"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _run_count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_SECONDS:
        raise argparse.ArgumentTypeError(
            f"must be a number of seconds > 0, at most {LONGEST_SECONDS:.0e}, got {text!r}"
        )
    return seconds


def _check_json(options: argparse.Namespace) -> None:
    if options.json in (None, "-"):
        return
    try:
        with open(options.json, "ab"):
            pass
    except OSError as error:
        raise InvalidArgument(
            f"--json: must be a file that can be written, got {options.json}: {error.strerror}"
        ) from None


def _program(rest: Sequence[str]) -> Program:
    """Take the program from what follows the options; `python` in front of it may have its own.

    Raises:
        InvalidArgument: It is for another interpreter, or reads standard input.
    """
    options, _ = interpreter_options(sys.orig_argv)
    if rest and Path(rest[0]).name.rstrip("0123456789.") == "python":
        found = shutil.which(rest[0])
        version = Path(rest[0]).name.removeprefix("python")
        is_other_version = version not in ("", "3", f"3.{sys.version_info.minor}")
        if is_other_version or (
            "/" in rest[0]
            and (found is None or Path(found).resolve() != Path(sys.executable).resolve())
        ):
            raise InvalidArgument(
                f"program: expected the interpreter that Moirai is installed in "
                f"({sys.executable}), got {rest[0]}"
            )
        options, rest = interpreter_options(rest)
    program = parse_program(rest, options=options)
    if program.target[0] == "-":
        raise InvalidArgument("program: expected a file, -m or -c that can run again, got -")
    return program


def _configuration_names() -> list[str]:
    return ["plain", *(name for name in ALLOCATORS if name not in _OURS), *_MOIRAI]


def choices(
    names: Sequence[str] | None,
    program: Program,
    found: Mapping[str, allocators.Allocator],
    environment: Mapping[str, str],
) -> list[Choice]:
    """Return what to measure; plain Python is always part of it and comes first.

    Raises:
        InvalidArgument: A name is not known or comes twice.
        Unsupported: A named allocator is not on this machine.
    """
    if names is None:
        names = [name for name in found if name not in _OURS]
        names += ["moirai-malloc", "moirai"] if "moirai" in found else ["moirai"]
    for name in names:
        if name not in _configuration_names():
            raise InvalidArgument(
                f"--configs: expected names of {', '.join(_configuration_names())}, got {name!r}"
            )
        if names.count(name) > 1:
            raise InvalidArgument(f"--configs: expected each name once, got {name!r} twice")
    ordered = ["plain", *(name for name in names if name != "plain")]
    return [_choice(name, program, found, environment) for name in ordered]


def _choice(
    name: str,
    program: Program,
    found: Mapping[str, allocators.Allocator],
    environment: Mapping[str, str],
) -> Choice:
    if name == "moirai-malloc":
        allocators.select("moirai", found)
    if name in _MOIRAI:
        run = ["-m", "moirai", "run"]
        advised = ["python", *program.options, *run] if program.options else ["moirai", "run"]
        return Choice(
            name,
            (
                sys.executable,
                *program.options,
                *run,
                "--summary",
                "none",
                *_MOIRAI[name],
                *program.target,
            ),
            {},
            shlex.join([*advised, *_MOIRAI[name], *program.target]),
        )
    variables = {}
    if name != "plain":
        variables = allocators.with_allocator(allocators.select(name, found), environment)
    assignments = [f"{key}={shlex.quote(value)}" for key, value in variables.items()]
    command_line = " ".join(
        [*assignments, shlex.join(["python", *program.options, *program.target])]
    )
    return Choice(name, tuple(program.command), variables, command_line)


def round_order(names: Sequence[str], round_index: int) -> list[str]:
    """Return the order of one round: each starts one further, so that none is always first."""
    start = round_index % len(names)
    return [*names[start:], *names[:start]]


def _measure_all(
    picked: Sequence[Choice], options: argparse.Namespace, measured: _Measured
) -> None:
    """Measure every configuration in every round; what is there after an error stays there."""
    by_name = {choice.name: choice for choice in picked}
    warm_up_count = 0 if options.no_warm_up else 1
    base = {key: value for key, value in os.environ.items() if not key.startswith("MOIRAI_")}
    base.update(with_startup(base))
    passed: set[str] = set()
    with (
        tempfile.TemporaryDirectory(prefix="moirai-compare-") as directory,
        Progress(len(picked) * (options.runs + warm_up_count), is_quiet=options.quiet) as progress,
    ):
        for turn in range(options.runs + warm_up_count):
            round_index = turn - warm_up_count
            for name in round_order(list(by_name), turn):
                progress.announce(
                    name, "warm-up" if round_index < 0 else f"round {round_index + 1}"
                )
                try:
                    measurement = measure(
                        by_name[name].command,
                        {**base, **by_name[name].variables},
                        directory=Path(directory),
                        timeout_seconds=options.timeout,
                    )
                except ProgramFailed as failure:
                    raise _ProgramFailedUnder(name, failure, "plain" in passed) from None
                except Timeout as error:
                    raise Timeout(f"{error} (under {name})") from None
                passed.add(name)
                if round_index >= 0:
                    measured.runs[name].append(_run(measurement, round_index))
                progress.advance()
    measured.is_complete = True


def _run(measurement: Measurement, round_index: int) -> report.Run:
    return report.Run(
        round_index=round_index,
        wall_seconds=measurement.wall_seconds,
        cpu_seconds=measurement.cpu_seconds,
        peak_rss_bytes=measurement.peak_rss_bytes,
        end_rss_bytes=measurement.end_rss_bytes,
        minor_faults=measurement.minor_faults,
        major_faults=measurement.major_faults,
    )


def _show(
    program: Program, picked: Sequence[Choice], options: argparse.Namespace, measured: _Measured
) -> None:
    """Print the table, unless nothing was measured; write the JSON where it was asked for."""
    if not any(measured.runs.values()):
        print("moirai compare: nothing was measured", file=sys.stderr)
        return
    comparison = report.Comparison(
        program=shlex.join(program.target),
        round_count=options.runs,
        is_complete=measured.is_complete,
        configurations=tuple(
            report.Configuration(
                choice.name, choice.command_line, tuple(measured.runs[choice.name])
            )
            for choice in picked
        ),
    )
    if options.json == "-":
        print(report.to_json(comparison))
        return
    if options.json is not None:  # First: whoever reads the table may leave meanwhile.
        Path(options.json).write_text(report.to_json(comparison) + "\n", "utf-8")
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    width = shutil.get_terminal_size((100, 24)).columns if is_terminal else 100
    print(report.to_text(comparison, width=width, has_color=is_terminal))


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the measurement as Ctrl-C does, so that no child is left."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated(number)

    previous = {
        number: signal.signal(number, terminate) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
