"""A recording under the forecaster: a chart in characters, a summary, JSON."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from moirai.reports.quantities import bytes_text

__all__ = ["SCHEMA", "Moment", "Replay", "summary", "to_json", "to_text"]

SCHEMA = "moirai.pressure.replay/1"

_HEIGHT = 18
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Moment:
    """An observation and what was forecast from it; `fan` has (seconds ahead, low, value, high)."""

    seconds: float
    used_bytes: float
    limit_bytes: float | None
    fan: tuple[tuple[float, float, float, float], ...]
    p_critical: float
    trend: str
    is_alarm: bool


@dataclass(frozen=True)
class Replay:
    """A recording's moments and the forecaster's record as plain numbers; at least one moment."""

    name: str
    horizon_seconds: int
    moments: tuple[Moment, ...]
    score: dict[str, Any]


def to_json(replay: Replay) -> str:
    """Write the forecaster's record as JSON of the schema `SCHEMA`."""
    content = {"schema": SCHEMA, "name": replay.name, "moments": len(replay.moments)}
    return json.dumps({**content, "score": replay.score}, indent=1)


def to_text(replay: Replay, *, width: int = 100) -> str:
    """Draw use over time, the interval forecast for each moment, and the probability."""
    columns = max(20, width - 12)
    return "\n".join([*_chart(replay, columns), *_strip(replay, columns), "", summary(replay)])


def summary(replay: Replay) -> str:
    """Say how the forecasts turned out."""
    score = replay.score
    lines = []
    for horizon, each in score["horizons"].items():
        if not each["count"]:
            continue
        skill = "" if each["skill"] is None else f", skill against no change {each['skill']:.2f}"
        lines.append(
            f"{horizon} s ahead: {each['inside_count']} of {each['count']} outcomes within the "
            f"90 % interval{skill}"
        )
    lines.append(
        f"alarms: {score['alarm_count']}, {score['true_alarm_count']} true, "
        f"{score['false_alarm_count']} false; crossings of 90 %: {score['crossing_count']}, "
        f"{score['missed_count']} without an alarm"
    )
    if score["median_lead_seconds"] is not None:
        lines.append(f"median lead: {score['median_lead_seconds']:.0f} s")
    return "\n".join(lines)


def _chart(replay: Replay, columns: int) -> list[str]:
    moments = replay.moments
    start, end = moments[0].seconds, moments[-1].seconds
    top = 1.1 * max(max(m.used_bytes, m.limit_bytes or 0.0) for m in moments) or 1.0
    cells = [[" "] * columns for _ in range(_HEIGHT)]

    def row(value: float) -> int:
        return max(0, min(_HEIGHT - 1, round((1.0 - value / top) * (_HEIGHT - 1))))

    made = [_interval(m, replay.horizon_seconds) for m in moments]
    for column in range(columns):
        moment = moments[_at(replay, start, end, column, columns)]
        earlier = moment.seconds - replay.horizon_seconds
        if earlier >= start:
            low, high = made[_nearest(moments, earlier)]
            for line in range(row(min(high, top)), row(low) + 1):
                cells[line][column] = "░"
        if moment.limit_bytes is not None:
            cells[row(0.9 * moment.limit_bytes)][column] = "╌"
            cells[row(moment.limit_bytes)][column] = "─"
        cells[row(moment.used_bytes)][column] = "█" if moment.is_alarm else "●"
    lines = [f"{replay.name}: use ●, under alarm █, forecast {replay.horizon_seconds} s before ░"]
    for index, drawn in enumerate(cells):
        value = top * (1.0 - index / (_HEIGHT - 1))
        label = bytes_text(round(value)) if index % 4 == 0 else ""
        lines.append(f"{label:>10} |{''.join(drawn).rstrip()}")
    return lines


def _strip(replay: Replay, columns: int) -> list[str]:
    moments = replay.moments
    start, end = moments[0].seconds, moments[-1].seconds
    bars = [
        _BARS[round(moments[_at(replay, start, end, c, columns)].p_critical * (len(_BARS) - 1))]
        for c in range(columns)
    ]
    axis = f"{start:.0f} s"
    return [
        f"{'P(90 %)':>10} |{''.join(bars).rstrip()}",
        f"{'':>11} {axis}{end:>{columns - len(axis) - 2}.0f} s",
    ]


def _interval(moment: Moment, horizon: float) -> tuple[float, float]:
    for ahead, low, _, high in moment.fan:
        if ahead >= horizon:
            return low, high
    return moment.used_bytes, math.inf


def _nearest(moments: tuple[Moment, ...], seconds: float) -> int:
    index = bisect_left(moments, seconds, key=lambda moment: moment.seconds)
    return min(index, len(moments) - 1)


def _at(replay: Replay, start: float, end: float, column: int, columns: int) -> int:
    return _nearest(replay.moments, start + (end - start) * column / (columns - 1))
