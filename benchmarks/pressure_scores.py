"""Replays recordings in virtual time and scores what was forecast, for `bench_pressure.py`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import harness
from moirai.pressure import Forecaster
from moirai.pressure.features import HORIZONS
from moirai.pressure.model import Model

sys.path.insert(0, str(harness.ROOT / "scripts"))
from train_forecaster import CRITICAL_RATIO, Trace

WARM_UP_SECONDS = 10
SILENT_SECONDS = 10
TRUE_WITHIN_SECONDS = 120
LEAST_LEAD_SECONDS = 5
OLS_SECONDS = 60
RELATIVE_FLOOR = 0.005  # of the limit: what a point forecast may not fall below
RAMP_SECONDS = 60  # a ramped event: above half of the line for so long, and no jump at the end
JUMP = 0.1

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Replay:
    """One recording, replayed under one limit; one line a second.

    Attributes:
        program: What ran.
        is_recorded: Whether the limit is the recorded one.
        used: Shares of the limit.
        values, lows, highs, odds: By horizon, of our forecasts.
        confidence: By horizon.
        ours: Whether our alarm was on.
        ols: By horizon, of the line through the last 60 s.
        ols_seconds: When that line meets 90 %.
        event: First second at 90 %; None if it never came.
    """

    program: str
    is_recorded: bool
    used: Array
    values: Array
    lows: Array
    highs: Array
    odds: Array
    confidence: Array
    ours: Array
    ols: Array
    ols_seconds: Array
    event: int | None
    truth: Array


def replay(trace: Trace, ratio: float, model: Model) -> Replay:
    """Run the forecaster over a recording whose limit is divided by `ratio`."""
    used = trace.used * ratio
    dead = np.flatnonzero(used >= 1.0)
    alive = int(dead[0]) if len(dead) else len(used)
    forecaster = Forecaster(model=model)
    limit = trace.limit_bytes / ratio
    columns: list[list[float]] = []
    for index in range(alive):
        forecaster.observe(float(trace.seconds[index]), float(used[index] * limit), limit)
        found = forecaster.forecast()
        each = [found.at(horizon) for horizon in HORIZONS]
        columns.append(
            [
                *(one.value_bytes / limit for one in each),
                *(one.low_bytes / limit for one in each),
                *(one.high_bytes / limit for one in each),
                *(found.p_critical[horizon] for horizon in HORIZONS),
                *(one.confidence for one in each),
                float(found.is_alarm),
            ]
        )
    table = np.array(columns)
    count = len(HORIZONS)
    values, lows, highs, odds, confidence = (
        table[:, start * count : (start + 1) * count] for start in range(5)
    )
    ols, ols_seconds = line_forecasts(used[:alive])
    reached = np.flatnonzero(used >= CRITICAL_RATIO)
    ahead = np.arange(alive)[:, None] + np.array(HORIZONS)
    truth = np.where(ahead < len(used), used[np.minimum(ahead, len(used) - 1)], np.nan)
    return Replay(
        trace.program,
        ratio == 1.0,
        used[:alive],
        values,
        lows,
        highs,
        odds,
        confidence,
        table[:, -1] > 0,
        ols,
        ols_seconds,
        int(reached[0]) if len(reached) else None,
        truth,
    )


def line_forecasts(used: Array) -> tuple[Array, Array]:
    """Values at each horizon, and seconds to 90 %, of the line through the last 60 s."""
    values = np.empty((len(used), len(HORIZONS)))
    seconds = np.full(len(used), np.inf)
    for index in range(len(used)):
        recent = used[max(0, index - OLS_SECONDS + 1) : index + 1]
        slope, level = 0.0, recent[-1]
        if len(recent) > 1:
            ago = np.arange(len(recent)) - (len(recent) - 1.0)
            centred = ago - ago.mean()
            slope = float(centred @ recent / (centred @ centred))
            level = float(recent.mean() - slope * ago.mean())
        values[index] = np.maximum(level + slope * np.array(HORIZONS), RELATIVE_FLOOR)
        if level >= CRITICAL_RATIO:
            seconds[index] = 0.0
        elif slope > 0.0:
            seconds[index] = (CRITICAL_RATIO - level) / slope
    return values, seconds


# === values, intervals, probabilities ===========================================================


def _pool(replays: Sequence[Replay], pick: Callable[[Replay], Array]) -> Array:
    return np.concatenate([pick(each)[WARM_UP_SECONDS:] for each in replays])


def value_table(replays: Sequence[Replay]) -> dict[str, dict[str, list[float]]]:
    """Errors by forecaster; lists are by horizon."""
    truth = _pool(replays, lambda each: each.truth)
    peaks = np.concatenate(
        [np.full(max(0, len(r.used) - WARM_UP_SECONDS), np.nanmax(r.used)) for r in replays]
    )
    now = _pool(replays, lambda each: np.repeat(each.used[:, None], len(HORIZONS), axis=1))
    candidates = {
        "persistence": now,
        "ols-60": _pool(replays, lambda each: each.ols),
        "moirai": _pool(replays, lambda each: np.maximum(each.values, RELATIVE_FLOOR)),
    }
    known = np.isfinite(truth)
    found: dict[str, dict[str, list[float]]] = {}
    for name, values in candidates.items():
        error = np.abs(values - truth)
        mape, mae, hits = [], [], []
        for column in range(len(HORIZONS)):
            rows = known[:, column]
            mape.append(100.0 * float((error[rows, column] / truth[rows, column]).mean()))
            mae.append(100.0 * float(error[rows, column].mean()))
            hits.append(float((error[rows, column] <= 0.05).mean()))
        found[name] = {"mape_percent": mape, "mae_percent": mae, "hits": hits}
    for each in found.values():
        base = found["persistence"]["mape_percent"]
        each["skill"] = [1 - a / b for a, b in zip(each["mape_percent"], base, strict=True)]
    lows, highs = _pool(replays, lambda r: r.lows), _pool(replays, lambda r: r.highs)
    sure = _pool(replays, lambda r: r.confidence)
    extra: dict[str, list[float]] = {
        "coverage": [],
        "mean_width": [],
        "median_width": [],
        "confidence_error": [],
    }
    for column in range(len(HORIZONS)):
        rows = known[:, column]
        inside = (lows[rows, column] <= truth[rows, column]) & (
            truth[rows, column] <= highs[rows, column]
        )
        width = (highs[rows, column] - lows[rows, column]) / peaks[rows]
        extra["coverage"].append(float(inside.mean()))
        extra["mean_width"].append(float(width.mean()))
        extra["median_width"].append(float(np.median(width)))
        hit = np.abs(candidates["moirai"][rows, column] - truth[rows, column]) <= 0.05
        extra["confidence_error"].append(calibration_error(sure[rows, column], hit))
    found["moirai"] |= extra
    return found


def calibration_error(odds: Array, label: Array) -> float:
    """Mean distance of stated and observed frequency over ten bins of stated probability."""
    bins = np.minimum((odds * 10).astype(int), 9)
    return float(
        sum(
            abs(odds[bins == index].mean() - label[bins == index].mean()) * (bins == index).mean()
            for index in np.unique(bins)
        )
    )


def crossing_table(replays: Sequence[Replay]) -> dict[str, list[float]]:
    """Probabilities of a crossing: rate, calibration error and Brier skill by horizon."""
    found: dict[str, list[float]] = {"rate": [], "calibration_error": [], "brier_skill": []}
    for column, horizon in enumerate(HORIZONS):
        odds, label = [], []
        for each in replays:
            end = len(each.used) if each.event is None else each.event
            at = np.arange(min(WARM_UP_SECONDS, end), end)
            will = np.zeros(len(at), bool) if each.event is None else each.event <= at + horizon
            sure = will | (at + horizon < len(each.truth))
            odds.append(each.odds[at[sure], column])
            label.append(will[sure])
        stated, came = np.concatenate(odds), np.concatenate(label).astype(float)
        rate = float(came.mean())
        found["rate"].append(rate)
        found["calibration_error"].append(calibration_error(stated, came))
        spread = rate * (1 - rate)
        brier = float(((stated - came) ** 2).mean())
        found["brier_skill"].append(1 - brier / spread if spread else math.nan)
    return found


# === alarms =====================================================================================

RULES: dict[str, tuple[str, Callable[[Replay], Array]]] = {
    "persistence": ("persistence: at 90 %", lambda r: r.used >= CRITICAL_RATIO),
    "static-70": ("level of 70 %", lambda r: r.used >= 0.70),
    "static-80": ("level of 80 %", lambda r: r.used >= 0.80),
    "static-85": ("level of 85 %", lambda r: r.used >= 0.85),
    "ols-60": ("OLS-60 within 120 s", lambda r: r.ols_seconds <= 120.0),
    "p60": ("Moirai, p60 ≥ .5", lambda r: r.odds[:, 1] >= 0.5),
    "p120": ("Moirai, p120 ≥ .5", lambda r: r.odds[:, 2] >= 0.5),
    "moirai": ("Moirai, is_alarm", lambda r: r.ours),
}


def episodes(on: Array) -> list[tuple[int, int]]:
    """First and last second of each alarm; a silence of up to 10 s does not end one."""
    found: list[tuple[int, int]] = []
    for at in np.flatnonzero(on).tolist():
        if found and at - found[-1][1] <= SILENT_SECONDS:
            found[-1] = (found[-1][0], at)
        else:
            found.append((at, at))
    return found


def is_ramped(each: Replay) -> bool:
    """Whether an event came after a climb rather than by a jump."""
    if each.event is None or each.event < RAMP_SECONDS:
        return False
    before = each.used[each.event - RAMP_SECONDS : each.event + 1]
    return bool(before.min() >= CRITICAL_RATIO / 2 and np.diff(before[-11:]).max() < JUMP)


def alarm_table(replays: Sequence[Replay]) -> dict[str, dict[str, float]]:
    """How each rule did over all cases."""
    found = {}
    for name, (_, rule) in RULES.items():
        leads, ramped_leads = [], []
        true = false = missed = events = ramped = benign = benign_alarmed = 0
        seconds = 0
        for each in replays:
            end = len(each.used) if each.event is None else each.event
            seconds += end
            alarms = [(a, b) for a, b in episodes(rule(each)[:end]) if a >= WARM_UP_SECONDS]
            lead = None
            wrong = 0
            for start, last in alarms:
                if each.event is not None and (
                    each.event - start <= TRUE_WITHIN_SECONDS or last >= each.event - SILENT_SECONDS
                ):
                    true += 1
                    lead = each.event - start if lead is None else lead
                elif start + TRUE_WITHIN_SECONDS < len(each.truth) or each.event is not None:
                    wrong += 1
            false += wrong
            if each.event is None:
                benign += 1
                benign_alarmed += wrong > 0
                continue
            events += 1
            if lead is None or lead < LEAST_LEAD_SECONDS:
                missed += 1
                lead = 0 if lead is None else lead
            leads.append(lead)
            if is_ramped(each):
                ramped += 1
                ramped_leads.append(lead)
        found[name] = {
            "events": events,
            "missed": missed / max(events, 1),
            "median_lead_seconds": harness.median(leads),
            "ramped_events": ramped,
            "ramped_median_lead_seconds": harness.median(ramped_leads),
            "ramped_with_30_s": sum(x >= 30 for x in ramped_leads) / max(ramped, 1),
            "alarms": true + false,
            "false_discovery": false / max(true + false, 1),
            "benign_runs": benign,
            "benign_alarmed": benign_alarmed / max(benign, 1),
            "false_per_hour": false / (seconds / 3600.0),
        }
    return found


# === in sum =====================================================================================


def score(replays: Sequence[Replay]) -> dict[str, Any]:
    """Values and probabilities for the recorded limits, alarms for all."""
    recorded = [each for each in replays if each.is_recorded]
    return {
        "values": value_table(recorded),
        "crossing": crossing_table(recorded),
        "alarms": alarm_table(replays),
    }


def render_scores(scored: Mapping[str, Any], title: str) -> str:
    """The tables of values, intervals and alarms, as Markdown."""

    def three(values: Sequence[float], digits: int) -> str:
        return "/".join(f"{value:.{digits}f}" for value in values)

    values = scored["values"]
    labels = {"persistence": "no change", "ols-60": "OLS-60", "moirai": "Moirai"}
    rows = [
        [
            labels[name],
            three(each["mape_percent"], 1),
            three(each["skill"], 2),
            three(each["mae_percent"], 1),
            three(each["hits"], 2),
        ]
        for name, each in values.items()
    ]
    ours = values["moirai"]
    crossing = scored["crossing"]
    quality = [
        ["90 % interval: coverage", three(ours["coverage"], 2)],
        ["its median width, share of the peak", three(ours["median_width"], 2)],
        ["its mean width, share of the peak", three(ours["mean_width"], 2)],
        ["confidence: calibration error", three(ours["confidence_error"], 3)],
        ["P(reach 90 %): rate of crossings", three(crossing["rate"], 3)],
        ["P(reach 90 %): calibration error", three(crossing["calibration_error"], 3)],
        ["P(reach 90 %): Brier skill", three(crossing["brier_skill"], 2)],
    ]
    alarms = []
    for name, each in scored["alarms"].items():
        alarms.append(
            [
                RULES[name][0],
                f"{100 * each['missed']:.0f} %",
                f"{each['median_lead_seconds']:.0f}",
                f"{each['ramped_median_lead_seconds']:.0f}",
                f"{100 * each['ramped_with_30_s']:.0f} %",
                f"{100 * each['false_discovery']:.0f} %",
                f"{100 * each['benign_alarmed']:.0f} %",
                f"{each['false_per_hour']:.2f}",
            ]
        )
    one = next(iter(scored["alarms"].values()))
    return "\n\n".join(
        [
            f"**{title}values at 30/60/120 s** (MAPE in %, skill against no change, mean error in "
            "% of the limit, share of forecasts within 5 % of the limit)",
            harness.markdown_table(["", "MAPE", "skill", "error", "hits"], rows),
            f"**{title}intervals and probabilities at 30/60/120 s**",
            harness.markdown_table(["", "Moirai"], quality),
            f"**{title}alarms**: {one['events']} events, {one['ramped_events']} of them ramped; "
            f"{one['benign_runs']} cases without one",
            harness.markdown_table(
                [
                    "",
                    "missed",
                    "lead, s",
                    "ramped: lead, s",
                    "ramped: ≥ 30 s",
                    "false discovery",
                    "benign with alarm",
                    "false an hour",
                ],
                alarms,
            ),
        ]
    )
