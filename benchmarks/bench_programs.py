"""Do real programs take less CPU time and no more memory under Moirai than under any allocator?

Eight programs, three of them the examples, run whole in a fresh process each: start-up and imports
count, as they do for a user. Configurations take turns in each round. CPU is user and system time
of the process; peak and end RSS are read at the end of the program's own code, and RSS once more
after it was idle for 1.1 s, as a service would be. Every program must print the same under every
configuration, or the benchmark stops.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
from harness import BASELINE, MOIRAI, Configuration, Goal
from run_scenario import IDLE_SECONDS

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_programs"

_HERE = Path(__file__).resolve().parent
_EXAMPLES = _HERE.parent / "examples"
_SCENARIOS = _HERE / "scenarios"


@dataclass(frozen=True)
class Program:
    """A program to run: its title in tables, its command line, a shorter one for quick runs."""

    title: str
    path: Path
    arguments: tuple[str, ...] = ()
    quick_arguments: tuple[str, ...] = ()


PROGRAMS = {
    "wave": Program("wave equation", _SCENARIOS / "wave_equation.py"),
    "blocks": Program("64 x 64 blocks", _SCENARIOS / "small_blocks.py"),
    "black-scholes": Program("Black-Scholes", _SCENARIOS / "black_scholes.py"),
    "mixture": Program(
        "sklearn GaussianMixture",
        _EXAMPLES / "photo_segmentation.py",
        quick_arguments=("--photographs", "coffee", "--iterations", "1"),
    ),
    "image": Program(
        "scikit-image chain",
        _EXAMPLES / "image_pipeline.py",
        quick_arguments=("--photographs", "chelsea"),
    ),
    "signal": Program(
        "scipy signal chain", _EXAMPLES / "signal_chain.py", quick_arguments=("--exercises", "1")
    ),
    "pandas": Program("pandas merge, groupby", _SCENARIOS / "pandas_merge.py"),
    "boosting": Program("HistGradientBoosting", _SCENARIOS / "gradient_boosting.py"),
}


@dataclass(frozen=True)
class Run:
    """What one process cost, and what it printed."""

    cpu_seconds: float
    wall_seconds: float
    peak_rss_bytes: int
    end_rss_bytes: int
    idle_rss_bytes: int
    faults: int
    printed: str


METRICS = (
    *("cpu_seconds", "wall_seconds", "peak_rss_bytes", "end_rss_bytes", "idle_rss_bytes"),
    "faults",
)


class ProgramFailed(RuntimeError):
    """A program did not end well, or printed something else than under plain NumPy."""


def command(configuration: Configuration, report: Path, program: Path) -> list[str]:
    """The command line that runs a program under a configuration and leaves a report."""
    runner = str(_HERE / "run_scenario.py")
    if configuration.handler == "moirai":
        moirai = ["-m", "moirai", "run", "--summary", "none"]
        return [sys.executable, *moirai, runner, str(report), "", str(program)]
    return [sys.executable, runner, str(report), configuration.handler, str(program)]


def run_once(configuration: Configuration, program: Program, *, quick: bool) -> Run:
    """Run a program in a process of its own.

    Raises:
        ProgramFailed: It ended with another status than 0; the message has its standard error.
    """
    arguments = program.quick_arguments if quick else program.arguments
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        report = Path(folder) / "report.json"
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command(configuration, report, program.path), *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=configuration.full_environment(),
        )
        assert process.stdout is not None
        printed = process.stdout.read()
        # wait4 and not wait: it returns this child's own resource usage.
        _, status, usage = os.wait4(process.pid, 0)
        # The probe waits for what goes back by age; that is none of the program's time.
        wall = time.perf_counter() - start - IDLE_SECONDS
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
        if process.returncode != 0:
            errors.seek(0)
            raise ProgramFailed(
                f"{program.title} under {configuration.name}: status {process.returncode}\n"
                + errors.read()
            )
        measured = json.loads(report.read_text(encoding="utf-8"))
    return Run(
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        wall_seconds=wall,
        peak_rss_bytes=measured["peak_rss_bytes"],
        end_rss_bytes=measured["end_rss_bytes"],
        idle_rss_bytes=measured["idle_rss_bytes"],
        faults=usage.ru_minflt,
        printed=printed,
    )


def measure_program(
    configurations: Mapping[str, Configuration], program: Program, rounds: int, *, quick: bool
) -> dict[str, list[Run]]:
    """Runs of one program by configuration, one in each round."""
    runs: dict[str, list[Run]] = defaultdict(list)
    expected: str | None = None
    for index, name in harness.interleaved(configurations, rounds):
        if not any(index < len(done) for done in runs.values()):
            harness.progress(f"{program.title}, round {index + 1} of {rounds}")
        run = run_once(configurations[name], program, quick=quick)
        expected = run.printed if expected is None else expected
        if run.printed != expected:
            raise ProgramFailed(
                f"{program.title} under {name}: expected\n{expected}\nbut it printed\n{run.printed}"
            )
        runs[name].append(run)
    return {name: runs[name] for name in configurations}


def summarise(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, float]]:
    """Medians, the spread of CPU, and ratios to glibc within the round."""
    summary: dict[str, dict[str, float]] = {}
    for name, done in runs.items():
        summary[name] = {
            metric: harness.median(getattr(r, metric) for r in done) for metric in METRICS
        }
    if BASELINE in runs:
        for metric in METRICS:
            samples = {name: [getattr(r, metric) for r in done] for name, done in runs.items()}
            for name, ratios in harness.round_ratios(samples).items():
                summary[name][f"{metric}_ratio"] = harness.median(ratios)
                summary[name][f"{metric}_ratio_spread"] = harness.spread(ratios)
    return summary


def _table(results: Mapping[str, Any], labels: Mapping[str, str], cell: Any) -> str:
    header = ["", *labels.values()]
    rows = [
        [PROGRAMS[program].title, *(cell(summary, name) for name in labels)]
        for program, summary in results.items()
    ]
    return harness.markdown_table(header, rows)


def _ratio_cell(summary: Mapping[str, Mapping[str, float]], name: str) -> str:
    ratio, spread = summary[name]["cpu_seconds_ratio"], summary[name]["cpu_seconds_ratio_spread"]
    shown = f"{ratio:.3f} ± {spread:.3f}"
    best = min(entry["cpu_seconds_ratio"] for entry in summary.values())
    return f"**{shown}**" if ratio == best else shown


def _megabytes_cell(metric: str) -> Any:
    def cell(summary: Mapping[str, Mapping[str, float]], name: str) -> str:
        return f"{summary[name][metric] / 1e6:.0f} ({summary[name][metric + '_ratio']:.2f})"

    return cell


def _faults_cell(summary: Mapping[str, Mapping[str, float]], name: str) -> str:
    return f"{summary[name]['faults'] / 1000:.0f}"


def render(results: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """The tables, as Markdown; needs glibc among the configurations."""
    if BASELINE not in labels:
        return "No table: ratios need glibc among the configurations."
    seconds = ", ".join(
        f"{PROGRAMS[name].title} {summary[BASELINE]['cpu_seconds']:.1f} s"
        for name, summary in results.items()
    )
    return "\n\n".join(
        [
            "**CPU time over plain NumPy on glibc** (median of the ratios within a round, half the "
            "interquartile range; best in bold)",
            _table(results, labels, _ratio_cell),
            f"CPU time on glibc: {seconds}.",
            "**Wall time over plain NumPy on glibc**",
            _table(results, labels, lambda s, n: f"{s[n]['wall_seconds_ratio']:.3f}"),
            "**Peak RSS, MB** (ratio to glibc)",
            _table(results, labels, _megabytes_cell("peak_rss_bytes")),
            "**RSS at the end of the program, MB** (ratio to glibc)",
            _table(results, labels, _megabytes_cell("end_rss_bytes")),
            "**RSS after 1.1 s more of idleness, MB** (ratio to glibc)",
            _table(results, labels, _megabytes_cell("idle_rss_bytes")),
            "**Page faults, thousands**",
            _table(results, labels, _faults_cell),
        ]
    )


def digest(results: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """One table: Moirai beside the peer that takes the least CPU time, by program."""
    if not {BASELINE, MOIRAI} <= labels.keys():
        return ""
    rows = []
    for program, summary in results.items():
        ours = summary[MOIRAI]
        peer, _ = harness.best_peer({k: v["cpu_seconds_ratio"] for k, v in summary.items()})
        row = [PROGRAMS[program].title, labels.get(peer, "")]
        for metric in ("cpu_seconds", "peak_rss_bytes", "end_rss_bytes", "idle_rss_bytes"):
            theirs = summary[peer][metric + "_ratio"] if peer else float("nan")
            row.append(f"**{ours[metric + '_ratio']:.2f}** / {theirs:.2f}")
        rows.append(row)
    header = ["**Moirai** / fastest peer", "the fastest peer", "CPU time", "peak RSS", "end RSS",
              "RSS idle for 1.1 s"]  # fmt: skip
    return (
        "Ratios to plain NumPy on glibc; the fastest peer is, of the allocators measured, the one "
        "that takes the least CPU time of that program.\n\n" + harness.markdown_table(header, rows)
    )


def goals(results: Mapping[str, Any]) -> list[Goal]:
    """CPU at most the best peer's; peak RSS at most 1.05 of glibc's, later ones at most 1."""
    found = []
    for program, summary in results.items():
        if MOIRAI not in summary or BASELINE not in summary:
            continue
        title, ours = PROGRAMS[program].title, summary[MOIRAI]
        ratios = {name: entry["cpu_seconds_ratio"] for name, entry in summary.items()}
        peer, value = harness.best_peer(ratios)
        text = f"{title}: CPU over the best peer's ({peer})"
        found.append(Goal(text, ours["cpu_seconds_ratio"] / value, 1.0))
        found.append(Goal(f"{title}: peak RSS over glibc's", ours["peak_rss_bytes_ratio"], 1.05))
        found.append(Goal(f"{title}: end RSS over glibc's", ours["end_rss_bytes_ratio"], 1.0))
        found.append(Goal(f"{title}: idle RSS over glibc's", ours["idle_rss_bytes_ratio"], 1.0))
    return found


def measure(arguments: argparse.Namespace) -> harness.Report:
    """Run the programs asked for under the configurations asked for."""
    chosen = harness.select_configurations(harness.find_configurations(), arguments.configurations)
    results, raw = {}, {}
    for name in arguments.programs:
        runs = measure_program(chosen, PROGRAMS[name], arguments.rounds, quick=arguments.quick)
        results[name] = summarise(runs)
        raw[name] = {
            configuration: [{k: v for k, v in asdict(r).items() if k != "printed"} for r in done]
            for configuration, done in runs.items()
        }
    labels = {name: configuration.label for name, configuration in chosen.items()}
    parameters = {
        "rounds": arguments.rounds,
        "programs": list(arguments.programs),
        "quick": arguments.quick,
        "labels": labels,
    }
    document = {"summary": results, "runs": raw}
    return harness.Report(
        NAME,
        QUESTION,
        parameters,
        document,
        render(results, labels),
        goals(results),
        digest(results, labels),
    )


def main() -> int:
    parser = harness.argument_parser(QUESTION)
    parser.add_argument("--rounds", type=int, help="runs of each (10; 1 when quick)")
    parser.add_argument(
        "--programs",
        type=lambda names: names.split(","),
        help=f"comma separated, of: {','.join(PROGRAMS)} (all; image when quick)",
    )
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 10)
    arguments.programs = arguments.programs or (["image"] if arguments.quick else list(PROGRAMS))
    unknown = [name for name in arguments.programs if name not in PROGRAMS]
    if unknown:
        expected, came = ",".join(PROGRAMS), ",".join(unknown)
        parser.error(f"--programs: expected some of {expected}, got {came}")
    harness.publish(measure(arguments), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
