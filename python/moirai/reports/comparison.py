"""The table of `moirai compare`: the same program under several allocators."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from rich.console import Console
from rich.table import Table

from moirai.reports.quantities import bytes_text, count_text, seconds_text

__all__ = [
    "SCHEMA",
    "TIE_RATIO",
    "Comparison",
    "Configuration",
    "Run",
    "best",
    "to_json",
    "to_text",
]

SCHEMA = "moirai.comparison/1"

# Below this the fixed cost of starting `moirai run` (a second interpreter) shows in the ratio.
_SHORT_SECONDS = 2.0

# CPU ratios this close are no difference: the same program on the same machine varies as much.
TIE_RATIO = 0.02


@dataclass(frozen=True)
class Run:
    """One measured run; `end_rss_bytes` is None if the program ended by os._exit."""

    round_index: int
    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    end_rss_bytes: int | None
    minor_faults: int
    major_faults: int


@dataclass(frozen=True)
class Configuration:
    """A way to run the program: its name, the command line that keeps it, and its runs."""

    name: str
    command_line: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Comparison:
    """All configurations, plain Python among them; `is_complete` is False after Ctrl-C."""

    program: str
    round_count: int
    is_complete: bool
    configurations: tuple[Configuration, ...]


def ratios(comparison: Comparison, configuration: Configuration) -> list[float]:
    """Return CPU time over plain's in the same round, a number for each round that has both."""
    plain = {run.round_index: run for run in _plain(comparison).runs}
    return [
        run.cpu_seconds / plain[run.round_index].cpu_seconds
        for run in configuration.runs
        if run.round_index in plain and plain[run.round_index].cpu_seconds > 0
    ]


def best(comparison: Comparison) -> Configuration | None:
    """Return the configuration to prefer.

    The lowest median CPU ratio wins. One within `TIE_RATIO` of it whose spread (lowest to highest
    ratio) overlaps the winner's, or is not known after a single round, is a tie, and of those the
    lowest peak RSS wins. None if no round is complete.
    """
    measured = {
        configuration.name: values
        for configuration in comparison.configurations
        if (values := ratios(comparison, configuration))
    }
    if len(measured) < len(comparison.configurations):
        return None
    fastest = min(measured.values(), key=median)
    tied = [
        configuration
        for configuration in comparison.configurations
        if _is_tie(measured[configuration.name], fastest)
    ]
    return min(tied, key=lambda each: _median(each, lambda run: run.peak_rss_bytes))


def to_text(comparison: Comparison, *, width: int = 100, has_color: bool = False) -> str:
    """Write the table, the best configuration and how to keep it."""
    chosen = best(comparison)
    console = Console(
        width=width, force_terminal=has_color, no_color=not has_color, highlight=False
    )
    with console.capture() as capture:
        console.print(_table(comparison, chosen))
        for line in _notes(comparison, chosen):
            console.print(line, markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def to_json(comparison: Comparison) -> str:
    """Write everything measured as JSON of the schema `SCHEMA`."""
    chosen = best(comparison)
    content = asdict(comparison)
    for entry, configuration in zip(
        content["configurations"], comparison.configurations, strict=True
    ):
        values = ratios(comparison, configuration)
        entry["cpu_ratio"] = (
            {"median": median(values), "lowest": min(values), "highest": max(values)}
            if values
            else None
        )
    return json.dumps(
        {"schema": SCHEMA, **content, "best": chosen.name if chosen else None}, indent=1
    )


def _table(comparison: Comparison, chosen: Configuration | None) -> Table:
    rounds = comparison.round_count
    measured = "one round" if rounds == 1 else f"median of {rounds} rounds"
    table = Table(title=f"{comparison.program}: {measured}")
    table.title_justify = "left"
    table.add_column("config", no_wrap=True)
    for heading in ("CPU", "wall", "peak RSS", "end RSS", "faults", "CPU / plain", "spread"):
        table.add_column(heading, justify="right", no_wrap=True)
    for configuration in comparison.configurations:
        is_best = configuration is chosen
        table.add_row(
            configuration.name + (" *" if is_best else ""),
            *_cells(comparison, configuration),
            style="bold green" if is_best else None,
        )
    return table


def _cells(comparison: Comparison, configuration: Configuration) -> list[str]:
    if not configuration.runs:
        return ["-"] * 7
    values = ratios(comparison, configuration)
    has_end = all(run.end_rss_bytes is not None for run in configuration.runs)
    return [
        seconds_text(_median(configuration, lambda run: run.cpu_seconds)),
        seconds_text(_median(configuration, lambda run: run.wall_seconds)),
        bytes_text(_median(configuration, lambda run: run.peak_rss_bytes)),
        bytes_text(_median(configuration, lambda run: run.end_rss_bytes or 0)) if has_end else "-",
        count_text(round(_median(configuration, lambda run: run.minor_faults + run.major_faults))),
        f"{median(values):.2f}" if values else "-",
        f"{min(values):.2f}-{max(values):.2f}" if len(values) > 1 else "-",
    ]


def _notes(comparison: Comparison, chosen: Configuration | None) -> list[str]:
    notes = []
    if not comparison.is_complete:
        counts = [len(configuration.runs) for configuration in comparison.configurations]
        notes.append(
            f"Interrupted: between {min(counts)} and {max(counts)} of {comparison.round_count} "
            "rounds measured."
        )
    if chosen is None:
        return notes
    notes.append(_reason(comparison, chosen))
    if not _has_spreads(comparison):
        notes.append("One round does not say how far runs differ: `--runs 3` and more do.")
    plain_seconds = _median(_plain(comparison), lambda run: run.cpu_seconds)
    if plain_seconds < _SHORT_SECONDS and any(
        each.name.startswith("moirai") for each in comparison.configurations
    ):
        notes.append(
            f"The program is short ({seconds_text(plain_seconds)} CPU, less than "
            f"{_SHORT_SECONDS:.0f} s): starting `moirai run` is a visible part of its ratio."
        )
    notes.append(f"Keep it with:  {chosen.command_line}")
    return notes


def _reason(comparison: Comparison, chosen: Configuration) -> str:
    fastest = min(comparison.configurations, key=lambda each: median(ratios(comparison, each)))
    tied = [
        each.name
        for each in comparison.configurations
        if each is not chosen and _is_tie(ratios(comparison, each), ratios(comparison, fastest))
    ]
    if not tied:
        return f"* {chosen.name}: the lowest CPU time."
    within = f"ratios within {TIE_RATIO * 100:.0f} %"
    if _has_spreads(comparison):
        within += ", spreads overlap"
    return (
        f"* {chosen.name}: no clear difference in CPU time from {', '.join(tied)} ({within}), and "
        "the lowest peak RSS of these."
    )


def _is_tie(values: Sequence[float], fastest: Sequence[float]) -> bool:
    is_close = median(values) - median(fastest) <= TIE_RATIO
    has_spread = len(values) > 1 and len(fastest) > 1
    return is_close and (not has_spread or min(values) <= max(fastest))


def _has_spreads(comparison: Comparison) -> bool:
    return all(len(each.runs) > 1 for each in comparison.configurations)


def _plain(comparison: Comparison) -> Configuration:
    return next(each for each in comparison.configurations if each.name == "plain")


def _median(configuration: Configuration, value: Callable[[Run], float]) -> float:
    return median(value(run) for run in configuration.runs)
