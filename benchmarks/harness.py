"""What every benchmark shares: configurations, worker processes, medians, tables, results, goals.

A *configuration* is a way to run the same Python code under another source of memory: an
environment to start the process with, and what the process does before the code. A *worker* is a
process of one configuration that stays alive and is asked over a pipe, so that configurations can
be measured in interleaved rounds: what the machine does meanwhile hits all of them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "benchmarks.md"
SCHEMA_VERSION = 1

BASELINE = "glibc"
MOIRAI = "moirai"
MOIRAI_MALLOC = "moirai-malloc"

# Variables that choose an allocator; a configuration starts from an environment without them.
_ALLOCATOR_VARIABLES = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_CONF")

# One thread each: idle BLAS and OpenMP threads spin, which would be charged to the allocator.
_ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")

# jemalloc as it suits NumPy best: no purge of large blocks, no decay, huge pages.
_JEMALLOC_TUNED = "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always"
_JEMALLOC_BACKGROUND = "background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0"


# --- configurations -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """One way to give NumPy memory.

    `handler` names what the process does after it has started: "" (nothing), "libc" (NumPy's
    handler protocol, straight to libc's malloc) or "moirai" (`moirai.memory.install()`).
    """

    name: str
    label: str
    environment: Mapping[str, str] = field(default_factory=dict)
    handler: str = ""

    def full_environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a process of this configuration."""
        inherited = {k: v for k, v in os.environ.items() if k not in _ALLOCATOR_VARIABLES}
        return {
            **inherited,
            **_ONE_THREAD,
            "PYTHONHASHSEED": "0",
            **self.environment,
            **(extra or {}),
        }


def moirai_is_available() -> bool:
    """Whether the native module can be imported (checked without importing it here)."""
    probe = subprocess.run(
        [sys.executable, "-c", "import moirai.memory"], capture_output=True, check=False
    )
    return probe.returncode == 0


def find_configurations() -> dict[str, Configuration]:
    """Every configuration this machine can run, plain glibc first and Moirai last."""
    from moirai.cli import allocators

    found = allocators.find_all()
    configurations = [Configuration(BASELINE, "NumPy on glibc")]
    if "tuned" in found:
        tunables = allocators.with_allocator(found["tuned"], {})
        configurations.append(Configuration("glibc-tuned", "glibc, tuned", tunables))
    if "jemalloc" in found:
        preload = {"LD_PRELOAD": found["jemalloc"].library or ""}
        tuned = {**preload, "MALLOC_CONF": _JEMALLOC_TUNED}
        configurations.append(Configuration("jemalloc", "jemalloc, default", preload))
        configurations.append(Configuration("jemalloc-tuned", "jemalloc, tuned", tuned))
    for name in ("mimalloc", "tcmalloc"):
        if name in found:
            preload = {"LD_PRELOAD": found[name].library or ""}
            configurations.append(Configuration(name, name, preload))
    if importlib.util.find_spec("numpy_allocator") is not None:
        configurations.append(
            Configuration("handler-libc", "handler to libc malloc", handler="libc")
        )
    if "moirai" in found:
        preload = {"LD_PRELOAD": found["moirai"].library or ""}
        configurations.append(Configuration(MOIRAI_MALLOC, "Moirai's malloc, preloaded", preload))
    if moirai_is_available():
        configurations.append(Configuration(MOIRAI, "Moirai", handler="moirai"))
    return {configuration.name: configuration for configuration in configurations}


def with_jemalloc_background(
    configurations: Mapping[str, Configuration],
) -> dict[str, Configuration]:
    """Add jemalloc with its background thread and a decay of one second, after the tuned one."""
    joined = {}
    for name, configuration in configurations.items():
        joined[name] = configuration
        if name == "jemalloc-tuned":
            environment = {**configuration.environment, "MALLOC_CONF": _JEMALLOC_BACKGROUND}
            label = "jemalloc, background thread, 1 s decay"
            joined["jemalloc-background"] = Configuration("jemalloc-background", label, environment)
    return joined


def select_configurations(
    available: Mapping[str, Configuration], names: Sequence[str] | None
) -> dict[str, Configuration]:
    """Those asked for; all if `names` is None.

    Raises:
        ValueError: A name is not among those available.
    """
    if names is None:
        return dict(available)
    unknown = [name for name in names if name not in available]
    if unknown:
        raise ValueError(
            f"configurations: expected some of {', '.join(available)}, got {', '.join(unknown)}"
        )
    return {name: available[name] for name in names}


# The handler must stay referenced as long as its arrays live: until the process ends.
_entered: list[Any] = []


def enter_handler(handler: str) -> None:
    """Make this process draw its arrays as the configuration says; call before any measurement.

    Raises:
        ValueError: `handler` is none of "", "libc", "moirai".
    """
    if handler == "libc":
        import numpy_allocator

        libc = numpy_allocator.type("libc", (), {})
        libc.__enter__()
        _entered.append(libc)
    elif handler == "moirai":
        from moirai import memory

        memory.install()
    elif handler:
        raise ValueError(f"handler: expected '', 'libc' or 'moirai', got {handler!r}")


# --- workers ------------------------------------------------------------------------------------


class WorkerFailed(RuntimeError):
    """A worker process ended or answered with an error; the message has its own words."""


class Worker:
    """A process of one configuration that answers JSON requests, one line each.

    It runs `script --worker HANDLER`, which ends in `serve`. Not to be shared between threads.
    """

    def __init__(
        self, configuration: Configuration, script: str | Path, interpreter: str = sys.executable
    ) -> None:
        self.configuration = configuration
        self._process = subprocess.Popen(
            [interpreter, str(script), "--worker", configuration.handler],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=configuration.full_environment(),
        )

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise WorkerFailed(
                f"{self.configuration.name}: ended with status {status} at {request}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(f"{self.configuration.name}: {answer['error']} at {request}")
        return answer["value"]

    def close(self) -> None:
        """End the process; returns when it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def workers(
    configurations: Mapping[str, Configuration], script: str | Path
) -> Iterator[dict[str, Worker]]:
    """One worker for each configuration; all have ended when the block is left."""
    with contextlib.ExitStack() as stack:
        started = {}
        for name, configuration in configurations.items():
            worker = Worker(configuration, script)
            stack.callback(worker.close)
            started[name] = worker
        yield started


def serve(answer: Any) -> None:
    """Answer requests from standard input until it ends; the other side of `Worker`."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the measured code prints must not end up among the answers
    for line in sys.stdin:
        try:
            reply = {"value": answer(json.loads(line))}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def interleaved(names: Iterable[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name) pairs: every round visits all, each starting one further along."""
    ordered = list(names)
    for index in range(rounds):
        shift = index % len(ordered)
        for name in ordered[shift:] + ordered[:shift]:
            yield index, name


# --- numbers ------------------------------------------------------------------------------------


def median(values: Iterable[float]) -> float:
    """Median; NaN if there is no value."""
    ordered = list(values)
    return statistics.median(ordered) if ordered else math.nan


def spread(values: Iterable[float]) -> float:
    """Half the distance between the quartiles, as a share of the median; 0 below two values."""
    ordered = list(values)
    if len(ordered) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return (high - low) / 2 / middle if middle else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed; `share` in (0, 1]."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def round_ratios(
    samples: Mapping[str, Sequence[float]], baseline: str = BASELINE
) -> dict[str, list[float]]:
    """Each configuration's samples over the baseline's of the same round.

    Raises:
        ValueError: A configuration has not as many samples as the baseline.
    """
    base = samples[baseline]
    for name, values in samples.items():
        if len(values) != len(base):
            raise ValueError(
                f"{name}: expected {len(base)} samples, as {baseline}, got {len(values)}"
            )
    return {
        name: [
            value / reference for value, reference in zip(values, base, strict=True) if reference
        ]
        for name, values in samples.items()
    }


def best_peer(values: Mapping[str, float]) -> tuple[str, float]:
    """Name and value of the smallest among all but Moirai's; ("", NaN) if there is none."""
    ours = (MOIRAI, MOIRAI_MALLOC)
    peers = {k: v for k, v in values.items() if k not in ours and not math.isnan(v)}
    if not peers:
        return "", math.nan
    name = min(peers, key=peers.__getitem__)
    return name, peers[name]


@dataclass(frozen=True)
class Comparison:
    """One row of a digest: what was timed, and the times of each subject, by its label."""

    title: str
    samples: Mapping[str, Sequence[float]]
    usual: str
    ours: str


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:#.2g}"


def digest(comparisons: Iterable[Comparison], over: str) -> str:
    """One table for the README: our time and the fastest peer's over that of the usual tool."""
    rows = []
    for each in comparisons:
        times = {label: median(samples) for label, samples in each.samples.items() if samples}
        if not {each.usual, each.ours} <= times.keys():
            continue
        peers = {label: time for label, time in times.items() if "Moirai" not in label}
        peer, theirs = best_peer(peers)
        usual = times[each.usual]
        ratios = f"**{_ratio(times[each.ours] / usual)}** / {_ratio(theirs / usual)}"
        rows.append([each.title, peer, ratios])
    if not rows:
        return ""
    return markdown_table(["**Moirai** / fastest peer", "the fastest peer", over], rows)


# --- goals --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A number that should not exceed a limit."""

    text: str
    measured: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether the number is within the limit; a missing number is a miss."""
        return self.measured <= self.limit

    def __str__(self) -> str:
        verdict = "met   " if self.met else "MISSED"
        return f"{verdict} {self.text}: {self.measured:.4g}, limit {self.limit:.4g}"


def goals_markdown(goals: Sequence[Goal]) -> str:
    """Goals as a Markdown table, misses included."""
    rows = [
        [
            goal.text,
            f"{goal.measured:.3g}",
            f"{goal.limit:.3g}",
            "met" if goal.met else "**missed**",
        ]
        for goal in goals
    ]
    return markdown_table(["goal", "measured", "limit", ""], rows)


# --- text ---------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: first column to the left, the others to the right.

    Raises:
        ValueError: A row is not as long as the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"row {row!r}: expected {len(header)} cells, got {len(row)}")
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    rule = [
        "-" * width if column == 0 else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]
    lines = [cells[0], rule, *cells[1:]]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


def size_label(size_bytes: int) -> str:
    """64 B, 16 KiB, 256 MiB."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size_bytes >= unit and size_bytes % unit == 0:
            return f"{size_bytes // unit} {name}"
    return f"{size_bytes} B"


def write_section(path: Path, name: str, markdown: str) -> None:
    """Replace what stands between the markers of a section.

    The markers are `<!-- name:begin -->` and `<!-- name:end -->`, each alone on its line.

    Raises:
        ValueError: The page has no such section.
    """
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{path.name}: expected the markers {begin.strip()} and {end}")
    path.write_text(f"{before}{begin}\n{markdown.strip()}\n\n{end}{after}", encoding="utf-8")


# --- machine and results ------------------------------------------------------------------------


def _first_match(path: str, key: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return "unknown"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return run.stdout.strip() if run.returncode == 0 else "unknown"

    sources = git(
        "status", "--porcelain", "--untracked-files=no", "--", "crates", "python", "benchmarks"
    )
    changed = sources not in ("", "unknown")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def _version(distribution: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


def machine() -> dict[str, Any]:
    """What a reader needs to know to compare: machine, cores, versions, commit."""
    packages = ("numpy", "scipy", "scikit-learn", "scikit-image", "pandas", "cmeel-mimalloc",
                "numpy-allocator", "pondpond", "object-pool", "objpool", "generic-pool",
                "janus", "culsans", "aiologic", "faster-fifo", "pyzmq", "iceoryx2", "hyperq",
                "kickmsg", "subetha-ipc", "cloudtoid-interprocess", "moirai-runtime")  # fmt: skip
    huge_pages = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = huge_pages.partition("[")[2].partition("]")[0] or huge_pages
    return {
        "processor": _first_match("/proc/cpuinfo", "model name"),
        "core_count": len(os.sched_getaffinity(0)),
        "memory": _first_match("/proc/meminfo", "MemTotal"),
        "kernel": platform.release().partition("-")[0],
        "huge_pages": chosen,
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "packages": {name: version for name in packages if (version := _version(name))},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def machine_line(about: Mapping[str, Any]) -> str:
    """The machine in one line, for a terminal or a page."""
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    return (
        f"{about['processor']}, {about['core_count']} cores, {about['memory']}; "
        f"Linux {about['kernel']}, huge pages {about['huge_pages']}, {about['libc']}; "
        f"CPython {about['python']}, {packages}; commit {about['commit']}, {about['date']}"
    )


def short_machine_line(about: Mapping[str, Any]) -> str:
    """The same without the packages, which the docs page names."""
    return (
        f"{about['processor']}, {about['core_count']} cores; Linux {about['kernel']}, "
        f"{about['libc']}; CPython {about['python']}; commit {about['commit']}, {about['date']}"
    )


@dataclass(frozen=True)
class Report:
    """What a benchmark found: raw results for JSON, Markdown for people, goals."""

    name: str
    question: str
    parameters: Mapping[str, Any]
    results: Mapping[str, Any]
    markdown: str
    goals: Sequence[Goal]
    digest: str = ""  # one table in place of all, for the README

    def as_dict(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON document; `schema_version` changes when a key does."""
        return {
            "schema_version": SCHEMA_VERSION,
            "benchmark": self.name,
            "question": self.question,
            "machine": dict(about),
            "parameters": dict(self.parameters),
            "results": dict(self.results),
            "markdown": self.markdown,
            "digest": self.digest,
            "goals": [
                {
                    "text": g.text,
                    "measured": _finite(g.measured),
                    "limit": _finite(g.limit),
                    "met": g.met,
                }
                for g in self.goals
            ],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


# A list of numbers as `json` indents it, one to a line.
SAMPLES = re.compile(r"\[\n\s*(-?\d[^\]\[\"{}]*)\]")


def _in_one_line(samples: re.Match[str]) -> str:
    return f"[{' '.join(samples[1].split())}]"


def output_path(arguments: argparse.Namespace, name: str) -> Path:
    """Where the JSON goes: a quick run's does not replace a real one unless told so."""
    folder = RESULTS / "quick" if arguments.quick else RESULTS
    chosen: Path | None = arguments.output
    return chosen or folder / f"{name}.json"


def publish(report: Report, arguments: argparse.Namespace) -> None:
    """Print a report, write its JSON and, if asked, its section of the docs page."""
    about = machine()
    document = report.as_dict(about)
    path = output_path(arguments, report.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, allow_nan=False)
    path.write_text(SAMPLES.sub(_in_one_line, text) + "\n", encoding="utf-8")
    print(f"# {report.name}: {report.question}\n{machine_line(about)}\n")
    print(report.markdown)
    if report.goals:
        print()
        print("\n".join(str(goal) for goal in report.goals))
    if arguments.write_docs:
        write_section(DOCS, report.name, section(document))


def section(document: Mapping[str, Any]) -> str:
    """What the docs page shows of a JSON document that `Report.as_dict` made."""
    parts = [f"Measured on: {machine_line(document['machine'])}.", document["markdown"]]
    goals = [
        Goal(goal["text"], _number(goal["measured"]), _number(goal["limit"]))
        for goal in document["goals"]
    ]
    if goals:
        parts.append(goals_markdown(goals))
    return "\n\n".join(parts)


def progress(text: str) -> None:
    """One line on standard error about what is being measured."""
    print(text, file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """Refuses what does not go together before anything is measured."""

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        parsed = super().parse_args(*arguments, **options)
        if parsed.quick and parsed.write_docs:
            self.error("--write-docs: expected a full run, got --quick")
        return parsed


def argument_parser(question: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = _Parser(description=question)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that it runs, not more"
    )
    parser.add_argument(
        "--configurations",
        metavar="NAMES",
        type=lambda names: names.split(","),
        help="comma separated",
    )
    parser.add_argument("--write-docs", action="store_true", help="refresh docs/benchmarks.md")
    parser.add_argument(
        "--output", type=Path, help="where to write the JSON (benchmarks/results/NAME.json)"
    )
    parser.add_argument("--worker", metavar="HANDLER", help=argparse.SUPPRESS)
    return parser


def main_of_rounds(
    question: str,
    measure: Callable[[argparse.Namespace], Report],
    full: int,
    quick: int,
    what: str = "samples of each subject",
) -> int:
    """Measure and publish, for a benchmark that is asked for nothing but its rounds.

    Args:
        question: What it answers.
        measure: Measures `arguments.rounds` rounds.
        full: How many they are unless told.
        quick: How many of a quick run.
        what: What a round is, for people.
    """
    parser = argument_parser(question)
    parser.add_argument("--rounds", type=int, help=f"{what} ({full}; {quick} when quick)")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (quick if arguments.quick else full)
    publish(measure(arguments), arguments)
    return 0
