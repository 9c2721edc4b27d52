"""Train the constants of `moirai.pressure.Forecaster` from recordings of memory use.

    python scripts/train_forecaster.py TRACES [--output FILE]

TRACES is a folder of CSV files with the columns t_seconds, rss_bytes and limit_bytes, named
KIND-OUTCOME-PROGRAM-RUN.csv. Recordings are stretched by `TIME_SCALE`: one recorded second stands
for ten. Intervals and confidence are calibrated on forecasts for programs that the trees have not
seen (folds by program).

The trees see the shape of use, never the limit. Those for a crossing learn from the recorded limit
and from lines drawn at other heights of the same recordings, so that they cannot learn how the
recordings' limits were chosen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from boosting import Array, Settings, fit
from numpy.typing import NDArray

from moirai.pressure.features import HORIZONS, LEAST_BINS, NAMES, crossing_features, describe
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
FOLD_COUNT = 4
CONFIDENCE_GROUPS = 16
# Relative errors below this use, as a share of the scale, are not weighted up further.
LEAST_SHARE = 0.02

MIDDLE = Settings(quantile=0.5, depth=4, rounds=200, rate=0.06, bins=128)
LOW = Settings(quantile=0.08, depth=4, rounds=60, rate=0.15)
HIGH = Settings(quantile=0.92, depth=4, rounds=60, rate=0.15)
CROSSING = Settings(quantile=None, depth=3, rounds=120, rate=0.08, bins=48, row_share=0.4)


@dataclass(frozen=True)
class Trace:
    """A recording on a grid of one second.

    Attributes:
        name: The file's.
        program: What ran; runs of the same program are never split between folds.
        seconds: Times, stretched.
        used: Shares of the limit.
        limit_bytes: The limit.
    """

    name: str
    program: str
    seconds: Array
    used: Array
    limit_bytes: float


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


def program_folds(traces: Sequence[Trace], count: int) -> NDArray[np.int64]:
    """A fold for each recording; all of a program in the same one."""
    programs = np.unique([trace.program for trace in traces])
    shuffled = np.random.default_rng(3).permutation(programs)
    fold_of = {program: index % count for index, program in enumerate(shuffled)}
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
    """Describe every `step`-th second of each recording up to its limit."""
    rows, facts = [], []
    for number, trace in enumerate(traces):
        history = History()
        alive = life(trace)
        for index in range(alive):
            history.add(float(trace.seconds[index]), float(trace.used[index]))
            if index % step or history.bin_count < LEAST_BINS:
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
    each = 1.0 / np.bincount(known.trace, minlength=len(traces))[known.trace]
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
    trace: NDArray[np.int64]


def find_crossings(table: Table, traces: Sequence[Trace]) -> Crossings:
    """Label each described moment for the recorded limit and for the other lines."""
    parts = []
    for number, trace in enumerate(traces):
        members = np.flatnonzero(table.trace == number)
        for line, weight in _lines(float(trace.used.max())):
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
                    np.full(len(near), weight),
                    np.full(len(near), number),
                )
            )
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
    """Margins and confidence from forecasts for programs held out, fold by fold.

    Margins: pooled conformal quantiles (Romano, Patterson, Candès, 2019) over all folds, each
    recording with the same weight. Confidence: how often the error was within 5 % of the limit, by
    the interval's width over the limit, never rising with it.
    """
    folds = program_folds(traces, FOLD_COUNT)[table.trace]
    raw = np.empty((len(table.rows), 3))
    for fold in range(FOLD_COUNT):
        value = fit_values(table.where(folds != fold), traces)
        ensemble = Ensemble([value["low"], value["middle"], value["high"]])
        raw[folds == fold] = np.sort(ensemble.predict(table.rows[folds == fold]), axis=1)
    change = (table.then - table.now) / table.scale
    margins, confidence = {}, {}
    for horizon in HORIZONS:
        kept = np.isfinite(change) & (table.horizon == horizon)
        low, middle, high = raw[kept].T
        truth = change[kept]
        width = np.maximum(high - low, 0.01)
        excess = np.maximum(low - truth, truth - high) / width
        weights = 1.0 / np.bincount(table.trace[kept], minlength=len(traces))[table.trace[kept]]
        margin = _quantile(excess, weights, 0.9)
        margins[str(horizon)] = float(f"{margin:.3g}")
        calibrated = (width * (1 + 2 * margin)) * table.scale[kept]
        within = np.abs(truth - middle) * table.scale[kept] <= 0.05
        confidence[str(horizon)] = _shares_by_width(calibrated, within)
    return {"margins": margins, "confidence": confidence}


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
    table = describe_traces(traces)
    write(options.output, train(table, traces), traces)
    return 0


if __name__ == "__main__":
    sys.exit(main())
