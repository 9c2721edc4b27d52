"""Train the constants of `moirai.pressure.Forecaster` from recordings of memory use.

    python scripts/train_forecaster.py TRACES [--output FILE]

TRACES is a folder of CSV files with the columns t_seconds, rss_bytes and limit_bytes, named
KIND-OUTCOME-PROGRAM-RUN.csv. Recordings are stretched by `TIME_SCALE`: one recorded second stands
for ten. Intervals and confidence are calibrated on forecasts for programs that the trees have not
seen (folds by program).

The trees see the shape of use, never the limit. Those for a crossing learn from the recorded limit
and from lines drawn at other heights of the same recordings, so that they cannot learn how the
recordings' limits were chosen. All learn from each recording at other speeds besides, so that they
cannot learn how long its program's cycles take; calibration sees the recorded speed alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from boosting import Array, Settings, fit
from numpy.typing import NDArray

from moirai.pressure.features import (
    CROSSING_NAMES,
    HORIZONS,
    LEAST_BINS,
    NAMES,
    crossing_features,
    describe,
)
from moirai.pressure.history import History
from moirai.pressure.model import Ensemble

OUTPUT = Path(__file__).parents[1] / "python" / "moirai" / "pressure" / "forecaster.json"

TIME_SCALE = 10.0
STEP = 2
CRITICAL_RATIO = 0.9
# Other lines and their weights. A run that stays below the line is also seen under a limit of which
# its peak is 85 %, under generous limits, and with lines below its peak; one that reaches the line
# under lower limits.
RECORDED_WEIGHT = 2.0
LINES_OF_PEAK = ((CRITICAL_RATIO / 0.85, 1.0), (1.5, 0.5), (2.5, 0.5), (0.75, 0.5), (0.85, 0.5),
                 (0.95, 0.5))  # fmt: skip
LINES_OF_LIMIT = ((0.54, 0.5), (0.675, 0.5))
# Each recording is also learnt from with its time stretched so, with this weight.
SPEEDS = (0.6, 0.8, 1.3, 1.7)
STRETCHED_WEIGHT = 0.6
# Straight ramps that no program made, for values alone: recordings have few, and a steady leak is
# one. Speeds are in shares of the limit a second, noise is in seconds of climbing.
RAMP = "ramp"
RAMP_COUNT = 80
RAMP_WEIGHT = 0.5
RAMP_SPEEDS = (0.0008, 0.035)
RAMP_NOISE = (0.0, 0.0, 0.3, 1.0)
RAMPS_THAT_STOP = 0.25
RAMP_LAST_SECONDS = 180
FOLD_COUNT = 4
CONFIDENCE_GROUPS = 16
# Relative errors below this use, as a share of the scale, are not weighted up further.
LEAST_SHARE = 0.02

MIDDLE = Settings(quantile=0.5, depth=4, rounds=200, rate=0.06, bins=128, row_share=0.15)
LOW = Settings(quantile=0.08, depth=4, rounds=100, rate=0.1, bins=64, row_share=0.2)
HIGH = Settings(quantile=0.92, depth=4, rounds=100, rate=0.1, bins=64, row_share=0.2)
CROSSING = Settings(quantile=None, depth=3, rounds=120, rate=0.08, bins=48, row_share=0.2)
# For these horizons, log odds of a crossing are multiplied by one number, fitted to forecasts for
# programs held out; in two splits of the programs the third was worse for it.
SHARPENED = (30, 60)


@dataclass(frozen=True)
class Trace:
    """A recording on a grid of one second.

    Attributes:
        name: The file's.
        program: What ran; runs of the same program are never split between folds.
        seconds: Times, stretched.
        used: Shares of the limit.
        limit_bytes: The limit.
        weight: What it counts when learnt from; below 1 for what is not as recorded.
    """

    name: str
    program: str
    seconds: Array
    used: Array
    limit_bytes: float
    weight: float = 1.0


def read_traces(folder: Path) -> list[Trace]:
    """Read all recordings of a folder, by name."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        seconds, used, limit = np.loadtxt(path, delimiter=",", skiprows=1, unpack=True)
        seconds = seconds * TIME_SCALE
        grid = np.arange(0.0, seconds[-1] + 1e-9, 1.0)
        newest = np.searchsorted(seconds, grid + 1e-9, side="right") - 1
        ratios = used[newest] / limit[newest]
        found.append(Trace(path.stem, path.stem.split("-")[2], grid, ratios, float(limit[0])))
    if not found:
        raise SystemExit(f"{folder}: expected CSV files, found none")
    return found


def with_other_speeds(traces: Sequence[Trace]) -> list[Trace]:
    """The recordings, and after them their copies at other speeds."""
    return [*traces, *(_stretched(trace, speed) for speed in SPEEDS for trace in traces)]


def _stretched(trace: Trace, factor: float) -> Trace:
    last = len(trace.used) - 1
    grid = np.arange(0.0, last * factor + 1e-9, 1.0)
    used = np.interp(grid / factor, np.arange(last + 1), trace.used)
    return Trace(trace.name, trace.program, grid, used, trace.limit_bytes, STRETCHED_WEIGHT)


def ramps() -> list[Trace]:
    """Straight ramps past the limit or to a stop, of many speeds, from many levels, with noise.

    Some begin at once and some after up to two minutes of stillness. One that stops does so
    anywhere on its way, so that nothing foreshadows it.
    """
    random = np.random.default_rng(11)
    found = []
    for number in range(RAMP_COUNT):
        begin = random.uniform(0.02, 0.6)
        still = int(random.choice([0, random.integers(1, 120)]))
        speed = math.exp(random.uniform(*map(math.log, RAMP_SPEEDS)))
        stops = number < RAMP_COUNT * RAMPS_THAT_STOP
        end = random.uniform(begin, 1.0) if stops else 1.1
        count = still + math.ceil((end - begin) / speed) + RAMP_LAST_SECONDS
        seconds = np.arange(count, dtype=np.float64)
        used = np.clip(begin + speed * (seconds - still), begin, end)
        used += speed * random.choice(RAMP_NOISE) * random.normal(size=count)
        found.append(
            Trace(f"{RAMP}-{number}", RAMP, seconds, np.maximum(used, 0.0), 1e9, RAMP_WEIGHT)
        )
    return found


def lessons(traces: Sequence[Trace]) -> list[Trace]:
    """All that is learnt from: the recordings, and after them their copies and the ramps."""
    return [*with_other_speeds(traces), *ramps()]


def program_folds(traces: Sequence[Trace], count: int) -> NDArray[np.int64]:
    """A fold for each recording, all of a program in the same one; ramps are never held out: -1."""
    programs = np.unique([trace.program for trace in traces if trace.program != RAMP])
    shuffled = np.random.default_rng(3).permutation(programs)
    fold_of = {program: index % count for index, program in enumerate(shuffled)}
    fold_of[RAMP] = -1
    return np.array([fold_of[trace.program] for trace in traces])


def life(trace: Trace) -> int:
    """Samples before use exceeds the limit, where the program would have been killed."""
    over = np.flatnonzero(trace.used >= 1.0)
    return int(over[0]) if len(over) else len(trace.used)


@dataclass(frozen=True)
class Table:
    """Described moments, one line a moment and horizon.

    Attributes:
        rows: Features.
        trace: Index of the recording.
        index: Sample at which the forecast is made.
        horizon: In seconds.
        now, scale, then: Use at the moment, the features' scale, use at the horizon (NaN: the
            recording ended); shares of the limit.
    """

    rows: Array
    trace: NDArray[np.int64]
    index: NDArray[np.int64]
    horizon: NDArray[np.int64]
    now: Array
    scale: Array
    then: Array

    def where(self, kept: NDArray[np.bool_]) -> Table:
        """Only some of the lines."""
        return Table(*(getattr(self, name)[kept] for name in self.__dataclass_fields__))


def describe_traces(traces: Sequence[Trace], step: int = STEP) -> Table:
    """Describe every `step`-th second of each recording up to its limit; of others half as many."""
    rows, facts = [], []
    for number, trace in enumerate(traces):
        history = History()
        alive = life(trace)
        pace = step if trace.weight == 1.0 else 2 * step
        for index in range(alive):
            history.add(float(trace.seconds[index]), float(trace.used[index]))
            if index % pace or history.bin_count < LEAST_BINS:
                continue
            described, scale = describe(history.window())
            rows.append(described)
            for horizon in HORIZONS:
                ahead = index + horizon
                then = trace.used[ahead] if ahead < len(trace.used) else np.nan
                facts.append((number, index, horizon, trace.used[index], scale, then))
    number_, index_, horizon_, now, scale_, then_ = np.array(facts).T
    whole = (each.astype(np.int64) for each in (number_, index_, horizon_))
    return Table(np.concatenate(rows), *whole, now, scale_, then_)


def fit_values(table: Table, traces: Sequence[Trace]) -> dict[str, Any]:
    """Grow the three ensembles of a value's change, in units of the scale."""
    known = table.where(np.isfinite(table.then))
    target = (known.then - known.now) / known.scale
    weights = np.array([trace.weight for trace in traces])
    each = (weights / np.maximum(np.bincount(known.trace, minlength=len(traces)), 1))[known.trace]
    peaks = np.array([trace.used.max() for trace in traces])[known.trace]
    # The middle minimises relative errors, the bounds errors in shares of the program's peak.
    relative = each * known.scale / np.maximum(known.then, LEAST_SHARE)
    absolute = each * known.scale / peaks
    return {
        "low": fit(known.rows, target, absolute, LOW),
        "middle": fit(known.rows, target, relative, MIDDLE),
        "high": fit(known.rows, target, absolute, HIGH),
    }


@dataclass(frozen=True)
class Crossings:
    """Moments below a line: what was seen, whether the line was reached within the horizon."""

    rows: Array
    label: Array
    weight: Array
    horizon: NDArray[np.int64]


def find_crossings(
    table: Table, traces: Sequence[Trace], lines: Sequence[tuple[float, float]] | None = None
) -> Crossings:
    """Label each described moment for some lines; default: the recorded limit and the others.

    Ramps are left out: with them, programs that climb and stop had odds as high, and a fifth of the
    alarms on recordings was false instead of a seventh. `moirai.pressure.straight` speaks for them.
    """
    parts = []
    for number, trace in enumerate(traces):
        if trace.program == RAMP:
            continue
        members = np.flatnonzero(table.trace == number)
        for line, weight in lines or _lines(float(trace.used.max())):
            dead = np.flatnonzero(trace.used >= line / CRITICAL_RATIO)
            alive = int(dead[0]) if len(dead) else len(trace.used)
            at = table.index[members]
            near = members[(table.now[members] < line) & (at < alive)]
            if not len(near):
                continue
            at, horizon = table.index[near], table.horizon[near]
            reaches = np.flatnonzero(trace.used >= line)
            nearest = np.searchsorted(reaches, at + 1)
            padded = np.append(reaches, 1 << 40)
            label = padded[nearest] <= at + horizon
            sure = label | (at + horizon < len(trace.used))
            near, label = near[sure], label[sure]
            gaps = (line - table.now[near]) / table.scale[near]
            parts.append(
                (
                    crossing_features(table.rows[near], gaps),
                    label.astype(np.float64),
                    np.full(len(near), weight * trace.weight),
                    horizon[sure],
                )
            )
    if not parts:
        none = np.empty(0)
        return Crossings(np.empty((0, len(CROSSING_NAMES))), none, none, none.astype(np.int64))
    return Crossings(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _lines(peak: float) -> list[tuple[float, float]]:
    """Lines to cross, as shares of the recorded limit, with their weights."""
    recorded = (CRITICAL_RATIO, RECORDED_WEIGHT)
    if peak < CRITICAL_RATIO:
        return [recorded, *((share * peak, weight) for share, weight in LINES_OF_PEAK)]
    return [recorded, *LINES_OF_LIMIT]


def fit_crossing(crossings: Crossings) -> dict[str, Any]:
    """Grow the ensemble for the log odds of a crossing."""
    return fit(crossings.rows, crossings.label, crossings.weight, CROSSING)


def calibrate(table: Table, traces: Sequence[Trace]) -> dict[str, Any]:
    """Margins, confidence and sharpness from forecasts for programs held out, fold by fold.

    Margins: pooled conformal quantiles (Romano, Patterson, Candès, 2019) over all folds, each
    recording with the same weight. Confidence: how often the error was within 5 % of the limit, by
    the interval's width over the limit, never rising with it. Sharpness: what makes the odds of
    crossing the recorded limit likeliest.
    """
    folds = program_folds(traces, FOLD_COUNT)[table.trace]
    as_recorded = np.array([trace.weight == 1.0 for trace in traces])[table.trace]
    lines = [(CRITICAL_RATIO, 1.0)]
    parts, raws, crossings = [], [], []
    for fold in range(FOLD_COUNT):
        known, held = table.where(folds != fold), table.where((folds == fold) & as_recorded)
        if not len(held.rows):  # Fewer programs than folds.
            continue
        value = fit_values(known, traces)
        ensemble = Ensemble([value["low"], value["middle"], value["high"]])
        raws.append(np.sort(ensemble.predict(held.rows), axis=1))
        parts.append(held)
        reached = find_crossings(held, traces, lines)
        logits = Ensemble([fit_crossing(find_crossings(known, traces))]).predict(reached.rows)
        kept = np.isin(reached.horizon, SHARPENED)
        crossings.append((logits[kept, 0], reached.label[kept]))
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    margins, confidence = _margins(Table(*map(np.concatenate, columns)), np.concatenate(raws))
    logits, label = map(np.concatenate, zip(*crossings, strict=True))
    factor = _sharpness(logits, label)
    return {
        "margins": margins,
        "confidence": confidence,
        "sharpness": {str(h): factor if h in SHARPENED else 1.0 for h in HORIZONS},
    }


def _margins(held: Table, raw: Array) -> tuple[dict[str, float], dict[str, Any]]:
    change = (held.then - held.now) / held.scale
    margins, confidence = {}, {}
    for horizon in HORIZONS:
        kept = np.isfinite(change) & (held.horizon == horizon)
        low, middle, high = raw[kept].T
        truth = change[kept]
        width = np.maximum(high - low, 0.01)
        excess = np.maximum(low - truth, truth - high) / width
        trace = held.trace[kept]
        margin = _quantile(excess, 1.0 / np.bincount(trace)[trace], 0.9)
        margins[str(horizon)] = float(f"{margin:.3g}")
        calibrated = (width * (1 + 2 * margin)) * held.scale[kept]
        within = np.abs(truth - middle) * held.scale[kept] <= 0.05
        confidence[str(horizon)] = _shares_by_width(calibrated, within)
    return margins, confidence


def _sharpness(logits: Array, label: Array) -> float:
    """The factor on log odds under which the labels are likeliest."""
    if not len(label):
        return 1.0
    factors = np.linspace(0.5, 2.0, 151)
    signed = np.where(label > 0.5, -logits, logits)
    losses = [float(np.logaddexp(0.0, factor * signed).sum()) for factor in factors]
    return float(f"{factors[int(np.argmin(losses))]:.3g}")


def _quantile(values: Array, weights: Array, share: float) -> float:
    order = np.argsort(values)
    totals = np.cumsum(weights[order])
    return float(values[order[np.searchsorted(totals, share * totals[-1])]])


def _shares_by_width(widths: Array, within: NDArray[np.bool_]) -> list[list[float]]:
    """Centres of groups of about equal widths, and the share within, made to fall (pooling)."""
    order = np.argsort(widths)
    groups = [
        [float(np.median(widths[part])), float(within[part].mean()), float(len(part))]
        for part in np.array_split(order, CONFIDENCE_GROUPS)
    ]
    pooled: list[list[float]] = []
    for group in groups:
        pooled.append(group)
        while len(pooled) > 1 and pooled[-1][1] >= pooled[-2][1]:
            centre, share, count = pooled.pop()
            other = pooled[-1]
            total = count + other[2]
            pooled[-1] = [
                (centre * count + other[0] * other[2]) / total,
                (share * count + other[1] * other[2]) / total,
                total,
            ]
    return [[float(f"{group[column]:.3g}") for group in pooled] for column in (0, 1)]


def train(table: Table, traces: Sequence[Trace]) -> dict[str, Any]:
    """All constants from the described moments of some recordings."""
    return {
        "value": fit_values(table, traces),
        "crossing": fit_crossing(find_crossings(table, traces)),
        **calibrate(table, traces),
    }


def write(path: Path, constants: dict[str, Any], traces: Sequence[Trace]) -> None:
    """Write the constants, one tree a line, with how they were made."""
    programs = sorted({trace.program for trace in traces})
    head = {
        "made_by": "scripts/train_forecaster.py",
        "made_from": f"{len(traces)} recordings of {len(programs)} programs",
        "programs": programs,
        "features": list(NAMES),
        "margins": constants["margins"],
        "sharpness": constants["sharpness"],
        "confidence": constants["confidence"],
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    lines.append(f' "crossing": {_ensemble_text(constants["crossing"])}')
    value = ",\n ".join(
        f"{json.dumps(name)}: {_ensemble_text(each)}" for name, each in constants["value"].items()
    )
    lines.append(f' "value": {{\n {value}}}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _ensemble_text(ensemble: dict[str, Any]) -> str:
    trees = ",\n  ".join(json.dumps(tree, separators=(",", ":")) for tree in ensemble["trees"])
    return f'{{"base": {ensemble["base"]}, "trees": [\n  {trees}]}}'


def main(arguments: Sequence[str] | None = None) -> int:
    """Train on all recordings of a folder and write the constants."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("traces", type=Path, help="folder of recordings")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    traces = read_traces(options.traces)
    shown = lessons(traces)
    write(options.output, train(describe_traces(shown), shown), traces)
    return 0


if __name__ == "__main__":
    sys.exit(main())
