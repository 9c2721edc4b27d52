"""`moirai pressure replay`: run the forecaster over a recording and draw what it said."""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moirai.reports import replay as report

__all__ = ["SUMMARY", "main", "read_trace", "run"]

SUMMARY = "run the forecaster over a recording (CSV) and draw it"

_USED_COLUMNS = ("used_bytes", "rss_bytes")
_FAN_COUNT = 10


def main(arguments: Sequence[str]) -> int:
    """Draw a recording; 2 for a file that cannot be read as one."""
    parser = argparse.ArgumentParser(
        prog="moirai pressure replay",
        description="Runs the forecaster over a recording and draws use, the interval forecast for "
        "each moment, the probability of reaching 90 % of the limit, and the forecaster's own "
        "record. The CSV has the columns t_seconds, used_bytes (or rss_bytes) and limit_bytes "
        "(empty or 0: none).",
        allow_abbrev=False,
    )
    parser.add_argument("trace", type=Path, metavar="TRACE.csv")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw to a file (matplotlib)")
    parser.add_argument("--json", action="store_true", help="write the record as JSON")
    parser.add_argument(
        "--horizon", type=int, choices=(30, 60, 120), default=60, help="seconds ahead (60)"
    )
    parser.add_argument(
        "--time-scale",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="seconds that one recorded second stands for (1)",
    )
    options = parser.parse_args(arguments)
    if not (math.isfinite(options.time_scale) and options.time_scale > 0.0):
        parser.error(f"--time-scale: must be finite and above 0, got {options.time_scale}")
    try:
        rows = read_trace(options.trace)
    except (OSError, ValueError) as problem:
        print(f"moirai pressure replay: {problem}", file=sys.stderr)
        return 2
    replay = run(options.trace.name, rows, options.horizon, options.time_scale)
    if options.json:
        print(report.to_json(replay))
        return 0
    if options.png is not None:
        if importlib.util.find_spec("matplotlib") is not None:
            try:
                _draw(replay, options.png)
            except (OSError, ValueError) as problem:
                print(f"moirai pressure replay: --png: {problem}", file=sys.stderr)
                return 2
            print(report.summary(replay))
            return 0
        print(
            "moirai pressure replay: matplotlib is not installed, drawing here instead of to "
            f"{options.png}",
            file=sys.stderr,
        )
    print(report.to_text(replay, width=shutil.get_terminal_size((100, 24)).columns))
    return 0


def read_trace(path: Path) -> list[tuple[float, float, float | None]]:
    """Read time, use and limit of each line.

    Raises:
        ValueError: A column is missing, a field is no number of at least 0, or there is no line.
    """
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        try:
            return _rows(csv.DictReader(lines), path)
        except csv.Error as problem:
            raise ValueError(f"{path}: {problem}") from None


def _rows(reader: csv.DictReader[str], path: Path) -> list[tuple[float, float, float | None]]:
    columns = reader.fieldnames or []
    used_name = next((name for name in _USED_COLUMNS if name in columns), None)
    if used_name is None or "t_seconds" not in columns:
        raise ValueError(
            f"{path}: expected the columns t_seconds and used_bytes (or rss_bytes), "
            f"got {', '.join(columns) or 'none'}"
        )
    found = []
    for row in reader:
        try:
            numbers = [float(row[name]) for name in ("t_seconds", used_name)]
            numbers.append(float(row.get("limit_bytes") or 0.0))
            if not all(map(math.isfinite, numbers)) or min(numbers[1:]) < 0.0:
                raise ValueError(f"expected finite numbers of at least 0, got {numbers}")
            found.append((numbers[0], numbers[1], numbers[2] or None))
        except (TypeError, ValueError) as problem:
            raise ValueError(f"{path}:{reader.line_num}: {problem}") from None
    if not found:
        raise ValueError(f"{path}: expected at least one line of numbers, got none")
    return found


def run(
    name: str,
    rows: Sequence[tuple[float, float, float | None]],
    horizon_seconds: int,
    time_scale: float = 1.0,
) -> report.Replay:
    """Run the forecaster over a recording in virtual time."""
    from moirai.pressure import Forecaster

    forecaster = Forecaster()
    moments = []
    for seconds, used, limit in rows:
        forecaster.observe(seconds * time_scale, used, limit)
        forecast = forecaster.forecast()
        moments.append(
            report.Moment(
                seconds * time_scale,
                used,
                limit,
                tuple(
                    (at, each.low_bytes, each.value_bytes, each.high_bytes)
                    for at, each in forecast.horizons.items()
                ),
                forecast.p_critical[horizon_seconds],
                forecast.trend,
                forecast.is_alarm,
            )
        )
    return report.Replay(name, horizon_seconds, tuple(moments), forecaster.score().to_dict())


def _draw(replay: report.Replay, path: Path) -> None:
    """Draw use, fans of forecasts from a few moments and the probability, with matplotlib."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    mib = 1 << 20
    times = [moment.seconds for moment in replay.moments]
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(11, 6), height_ratios=(4, 1), layout="constrained"
    )
    above.plot(times, [moment.used_bytes / mib for moment in replay.moments], "k", lw=1.2)
    limits = [math.nan if m.limit_bytes is None else m.limit_bytes / mib for m in replay.moments]
    above.plot(times, limits, "r", lw=1, label="limit")
    above.plot(times, [0.9 * limit for limit in limits], "r:", lw=1, label="90 %")
    step = max(1, len(replay.moments) // _FAN_COUNT)
    for moment in replay.moments[step // 2 :: step]:
        now = moment.used_bytes / mib
        at = [moment.seconds] + [moment.seconds + fan[0] for fan in moment.fan]
        low, middle, high = ([now] + [fan[i] / mib for fan in moment.fan] for i in (1, 2, 3))
        above.fill_between(at, low, high, color="tab:blue", alpha=0.15, lw=0)
        above.plot(at, middle, color="tab:blue", lw=1)
    above.set_ylim(0, 1.15 * max(m.limit_bytes or m.used_bytes for m in replay.moments) / mib)
    above.set_ylabel("MiB")
    above.set_title(f"{replay.name}: use, and 90 % intervals 30, 60 and 120 s ahead")
    above.legend(loc="upper left")
    below.fill_between(times, [moment.p_critical for moment in replay.moments], color="tab:red")
    below.set_ylim(0, 1)
    below.set_ylabel(f"P(90 % in\n{replay.horizon_seconds} s)")
    below.set_xlabel("s")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
