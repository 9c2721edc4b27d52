"""`moirai pressure watch`: how close a process is to the limit of its memory, live."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from moirai.errors import Closed, InvalidArgument, MoiraiError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moirai.pressure import Forecasts, Guard, Sample, Source
    from moirai.reports.pressure import FanRow, Watched

__all__ = ["SUMMARY", "main"]

SUMMARY = "show level, forecast, limits and stage until interrupted"
_HISTORY = 40


def main(arguments: Sequence[str]) -> int:
    """Watch until interrupted; 2 for a mistake in the arguments."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return _watch(options)
    except MoiraiError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moirai pressure watch",
        description="Shows how close a process is to the nearest limit of its memory, where use "
        "is going and the stage in which a guard would be, until interrupted.",
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("pid", nargs="?", type=int, help="the process (default: this one)")
    which.add_argument("--cgroup", metavar="PATH", help="a process of the group in that folder")
    parser.add_argument(
        "--interval",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="time between two looks (default: 1)",
    )
    parser.add_argument("--count", type=int, metavar="N", help="looks to take (default: no end)")
    return parser


def _watch(options: argparse.Namespace) -> int:
    from moirai import pressure

    if not 0 < options.interval <= 3600:
        raise InvalidArgument(f"--interval: must be > 0 and at most 3600, got {options.interval}")
    if options.count is not None and options.count < 1:
        raise InvalidArgument(f"--count: must be at least 1, got {options.count}")
    pid = _member(options.cgroup) if options.cgroup is not None else options.pid
    source = pressure.Source(process_id=pid)
    # Decides as a guard would, and does nothing.
    guard = pressure.Guard(
        source,
        forecaster=_forecaster(),
        registry=pressure.Registry(),
        built_in=(),
        dry_run=True,
        forecast_seconds=min(options.interval, 1.0),
    )
    name = f"process {os.getpid() if pid is None else pid}"
    try:
        _show(_looks(source, guard, name, options.interval, options.count))
    except KeyboardInterrupt:
        return 130
    return 0


def _forecaster() -> Forecasts | None:
    try:
        from moirai.pressure import Forecaster
    except ImportError:  # Without NumPy the level is all there is to see.
        return None
    return Forecaster()


def _fan(guard: Guard) -> tuple[list[FanRow], str | None]:
    """What the guard's forecaster said last, as shares of the limit."""
    from moirai.pressure import Forecast
    from moirai.reports.pressure import FanRow

    said = guard.outlook
    if not isinstance(said, Forecast) or not said.limit_bytes or said.horizons[30].confidence == 0:
        return [], None
    limit = said.limit_bytes
    rows = [
        FanRow(
            horizon,
            each.low_bytes / limit,
            each.value_bytes / limit,
            each.high_bytes / limit,
            said.p_critical[horizon],
        )
        for horizon, each in said.horizons.items()
    ]
    return rows, said.trend


def _member(folder: str) -> int:
    """Give a process of a control group."""
    path = os.path.join(folder, "cgroup.procs")
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            first = file.readline().strip()
    except OSError as error:
        raise InvalidArgument(
            f"--cgroup: must be the folder of a control group, got {folder}: {error.strerror}"
        ) from None
    try:
        return int(first)
    except ValueError:
        raise InvalidArgument(
            f"--cgroup: must have a process of its own, got {first!r} in {folder}"
        ) from None


def _looks(
    source: Source, guard: Guard, name: str, interval: float, count: int | None
) -> Iterator[Watched]:
    from moirai.reports.pressure import BoundRow, Watched

    history: deque[float] = deque(maxlen=_HISTORY)
    before: Sample | None = None
    taken = 0
    while True:
        try:
            sample = source.read()
        except Closed:
            if before is None:
                raise
            return
        stage = guard.step(sample)
        history.append(sample.used_ratio)
        bounds = [
            BoundRow(
                bound.kind,
                "" if bound.folder is None else str(bound.folder),
                bound.used_bytes,
                bound.without_cache_bytes,
                bound.limit_bytes,
            )
            for bound in source.bounds()
        ]
        fan, trend = _fan(guard)
        yield Watched(
            name=name,
            stage=stage.name.lower(),
            used_bytes=sample.used_bytes,
            limit_bytes=sample.limit_bytes,
            bound=sample.bound,
            resident_bytes=sample.resident_bytes,
            growth_bytes_per_second=_pace(before, sample),
            stalled_ratio=sample.stalled_ratio,
            total_kills=sample.total_kills,
            history=tuple(history),
            bounds=bounds,
            fan=fan,
            trend=trend,
        )
        before = sample
        taken += 1
        if taken == count:
            return
        time.sleep(interval)


def _pace(before: Sample | None, sample: Sample) -> float:
    if before is None:
        return 0.0
    elapsed = sample.time_seconds - before.time_seconds
    return (sample.used_bytes - before.used_bytes) / elapsed if elapsed > 0 else 0.0


def _show(looks: Iterator[Watched]) -> None:
    """Redraw in place on a terminal; elsewhere write one look after the other."""
    from moirai.reports.pressure import to_text

    if not sys.stdout.isatty():
        for watched in looks:
            print(to_text(watched), flush=True)
        return
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False) as live:
        for watched in looks:
            live.update(Text(to_text(watched)), refresh=True)
