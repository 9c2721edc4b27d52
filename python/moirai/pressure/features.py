"""What the forecaster looks at: a few numbers about the shape of recent use, free of its scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moirai.pressure.history import WINDOW_BINS

__all__ = [
    "CROSSING_NAMES",
    "HORIZONS",
    "LEAST_BINS",
    "NAMES",
    "SHAPE_BINS",
    "crossing_features",
    "describe",
]

HORIZONS = (30, 60, 120)
WINDOWS = (5, 10, 20, 40, 80, 160)
SHAPE_BINS = 16
DROP_SHARE = 0.05
# Fewer bins show no shape; constants are trained from here on.
LEAST_BINS = 5
# What is smaller, as a share of the scale, is no shape: whether a still program touches a page now
# and then tells the recordings' programs apart, and nothing else.
GRAIN = 1e-3
# A series is old from here on: what happens later has no age.
AGE_BINS = 60
# A fall is a loss of this much within so many bins; a cycle goes from fall to fall.
FALL_SHARE = 0.1
FALL_BINS = 10
RECENT_BINS = 60
# How far ahead a cycle's outcome lies, if there is but one of them.
LONE_SPREAD = 0.3

_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
_RECENT_SHARES = (0.1, 0.5, 0.9)
_LAST = np.array(WINDOWS) - 1
_AGO = np.arange(WINDOW_BINS, dtype=np.float64)
_AGO_SUMS = np.cumsum(_AGO)
_AGO_SQUARES = np.cumsum(_AGO * _AGO)
_SHARES_OF_ALL = np.array(_SHARES)
_SHARES_OF_RECENT = np.array(_RECENT_SHARES)

_COMMON = (
    "level",
    "age",
    "rising",
    "falling",
    "roughness",
    "since_drop",
    "drops",
    "largest_drop",
    "largest_rise",
    "drop_phase",
    "before_drop",
    "after_drop",
    *(f"rms_{w}" for w in WINDOWS),
    *(f"below_max_{w}" for w in WINDOWS),
    *(f"above_min_{w}" for w in WINDOWS),
    "rank",
    *(f"quantile_{share:.2g}" for share in _SHARES),
    *(f"recent_quantile_{share:.2g}" for share in _RECENT_SHARES),
    "falls",
    "since_fall",
    "period",
    "last_top",
    "mean_top",
    "mean_bottom",
    "height",
)
_OWN = (
    "horizon",
    *(f"trend_{w}" for w in WINDOWS),
    "change",
    "changes_low",
    "changes_mid",
    "changes_high",
    "similar",
    "similar_distance",
    "similar_spread",
    "cycles_ahead",
    "phase_ahead",
    "cycle_change",
    "cycle_spread",
    "cycle_count",
)
NAMES = _COMMON + _OWN

# What says most about a rise by a given gap, each over that gap.
_OVER_GAP = (
    *(f"trend_{w}" for w in WINDOWS),
    *(f"below_max_{w}" for w in WINDOWS),
    *(f"rms_{w}" for w in WINDOWS),
    "change",
    "changes_mid",
    "changes_high",
    "similar",
    "similar_spread",
    "largest_rise",
    "roughness",
    "last_top",
    "mean_top",
    "quantile_0.9",
    "cycle_change",
)
# What counts as it is.
_PLAIN = ("horizon", "age", "rank", "height", "phase_ahead")
CROSSING_NAMES = (*_PLAIN, "gap", *(f"{name}_over_gap" for name in _OVER_GAP))
_OVER_GAP_COLUMNS = [NAMES.index(name) for name in _OVER_GAP]
_PLAIN_COLUMNS = [NAMES.index(name) for name in _PLAIN]
_OWN_START = len(_COMMON)


def describe(window: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Describe the shape of a window of one-second bins.

    Args:
        window: Use in bytes, oldest first; shape (n,), 1 <= n <= WINDOW_BINS, finite, >= 0.

    Returns:
        Features, one row a horizon and one column a name, and the scale in bytes (the window's
        peak) that all levels, slopes (per horizon) and distances were divided by.
    """
    n = len(window)
    scale = float(window.max())
    if scale <= 0.0:
        scale = 1.0
    w = np.rint(window * (1.0 / (GRAIN * scale))) * GRAIN
    now = w[-1]
    back = w[::-1] - now
    rows = np.empty((len(HORIZONS), len(NAMES)))
    last = np.minimum(_LAST, n - 1)
    counts = last + 1.0
    sums = back.cumsum()[last]
    means = sums / counts
    moments = (back * _AGO[:n]).cumsum()[last]
    squares = (back * back).cumsum()[last]
    ago_means = _AGO_SUMS[last] / counts
    ago_variances = _AGO_SQUARES[last] / counts - ago_means * ago_means
    covariances = moments / counts - ago_means * means
    slopes = -covariances / (ago_variances + 1e-12)
    residuals = squares / counts - means * means - slopes * slopes * ago_variances
    rms = np.sqrt(np.maximum(residuals, 0.0))
    highs = np.maximum.accumulate(back)[last]
    lows = np.minimum.accumulate(back)[last]
    rows[:, 0] = now
    rows[:, 1] = min(n, AGE_BINS)
    if n > 1:
        steps = w[1:] - w[:-1]
        recent = steps[-60:]
        count = len(recent)
        rows[:, 2] = np.count_nonzero(recent > 1e-4) / count
        rows[:, 3] = np.count_nonzero(recent < -1e-4) / count
        rows[:, 4] = np.abs(recent).sum() / count
        drops = np.flatnonzero(steps < -DROP_SHARE)
        drop_count = len(drops)
        since = n - 2 - int(drops[-1]) if drop_count else 2 * WINDOW_BINS
        rows[:, 5] = since
        rows[:, 6] = drop_count
        rows[:, 7] = -min(steps.min(), 0.0)
        rows[:, 8] = max(steps.max(), 0.0)
        if drop_count:
            rows[:, 10] = w[drops].sum() / drop_count - now
            rows[:, 11] = w[drops + 1].sum() / drop_count - now
        else:
            rows[:, 10] = 2.0
            rows[:, 11] = -2.0
        if drop_count > 1:
            rows[:, 9] = since * (drop_count - 1) / float(drops[-1] - drops[0])
        else:
            rows[:, 9] = -1.0
    else:
        rows[:, 2:12] = (0.0, 0.0, 0.0, 2 * WINDOW_BINS, 0.0, 0.0, 0.0, -1.0, 2.0, -2.0)
    rows[:, 12:18] = rms
    rows[:, 18:24] = highs
    rows[:, 24:30] = -lows
    _quantiles(w, rows[:, 30:39])
    starts, cycles = _cycles(w)
    rows[:, 39:_OWN_START] = cycles
    distances = _distances(w) if n > SHAPE_BINS else None
    for index, horizon in enumerate(HORIZONS):
        row = rows[index, _OWN_START:]
        row[0] = horizon
        row[1:7] = slopes * horizon
        row[7:14] = _past(w, distances, horizon)
        row[14:] = _next_cycle(w, starts, cycles, horizon)
    return rows, scale


def crossing_features(
    rows: NDArray[np.float64], gap: float | NDArray[np.float64]
) -> NDArray[np.float64]:
    """What a crossing depends on.

    Args:
        rows: Rows of `describe`; shape (n, len(NAMES)).
        gap: Distance up to the line in units of the scale, > 0; one, or one a row.

    Returns:
        Shape (n, len(CROSSING_NAMES)).
    """
    found = np.empty((len(rows), len(CROSSING_NAMES)))
    plain = len(_PLAIN)
    found[:, :plain] = rows[:, _PLAIN_COLUMNS]
    found[:, plain] = gap
    np.divide(rows[:, _OVER_GAP_COLUMNS], found[:, plain : plain + 1], out=found[:, plain + 1 :])
    return found


def _quantiles(w: NDArray[np.float64], found: NDArray[np.float64]) -> None:
    """The newest value's rank among all, and quantiles of all and of the last minute, above it."""
    ordered, recent = np.sort(w), np.sort(w[-RECENT_BINS:])
    n = len(ordered)
    found[:, 0] = ordered.searchsorted(w[-1]) / n
    found[:, 1:6] = ordered[(_SHARES_OF_ALL * (n - 1)).astype(np.int64)]
    found[:, 6:] = recent[(_SHARES_OF_RECENT * (len(recent) - 1)).astype(np.int64)]
    found[:, 1:] -= w[-1]


def _cycles(w: NDArray[np.float64]) -> tuple[NDArray[np.int64], tuple[float, ...]]:
    """Where falls began, and what the cycles between them have in common."""
    # The highest of the last FALL_BINS + 1 bins, for each bin.
    tops = w.copy()
    covered = 1
    while covered <= FALL_BINS:
        shift = min(covered, FALL_BINS + 1 - covered)
        tops[shift:] = np.maximum(tops[shift:], tops[:-shift])
        covered += shift
    falling = w < tops - FALL_SHARE
    starts = (falling[1:] & ~falling[:-1]).nonzero()[0] + 1
    count = len(starts)
    if not count:
        return starts, (0.0, 2.0 * WINDOW_BINS, -1.0, 2.0, 2.0, -2.0, -1.0)
    now = w[-1]
    since = len(w) - 1 - int(starts[-1])
    period = float(starts[-1] - starts[0]) / (count - 1) if count > 1 else -1.0
    reached = tops[starts]
    top = float(reached.sum()) / count
    bottom = float(np.minimum.reduceat(w, starts).sum()) / count
    height = (now - bottom) / max(top - bottom, 0.05)
    return starts, (count, since, period, reached[-1] - now, top - now, bottom - now, height)


def _next_cycle(
    w: NDArray[np.float64],
    starts: NDArray[np.int64],
    cycles: tuple[float, ...],
    horizon: int,
) -> tuple[float, ...]:
    """How many cycles ahead the horizon lies, and the change if cycles go as those before."""
    if len(starts) < 2:
        return (-1.0, -1.0, 0.0, 0.0, 0.0)
    _, since, period, *_ = cycles
    ahead = (since + horizon) / period
    now = w[-1]
    places = starts[:-1] + int(since + horizon)
    places = places[places < len(w)]
    count = len(places)
    if not count:
        place = int(starts[-2]) + round((since + horizon) % period)
        return (ahead, ahead % 1.0, w[min(place, len(w) - 1)] - now, LONE_SPREAD, 0.0)
    then = w[places]
    mean = float(then.sum()) / count
    spread = LONE_SPREAD
    if count > 1:
        spread = max(float(then @ then) / count - mean * mean, 0.0) ** 0.5
    return (ahead, ahead % 1.0, mean - now, spread, count)


def _distances(w: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean distance of each stretch of `SHAPE_BINS` bins from the newest one, by every second."""
    count = len(w) - SHAPE_BINS + 1
    total = np.zeros(count)
    apart = np.empty(count)
    for start in range(1, SHAPE_BINS, 2):
        np.subtract(w[start : start + count], w[start - SHAPE_BINS], out=apart)
        np.abs(apart, out=apart)
        total += apart
    total *= 2.0 / SHAPE_BINS
    return total


def _past(
    w: NDArray[np.float64], distances: NDArray[np.float64] | None, horizon: int
) -> tuple[float, ...]:
    """How use changed over the horizon before: last, ordered, and after similar stretches."""
    n = len(w)
    if n <= horizon:
        return (w[-1] - w[0], 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    changes = w[horizon:] - w[: n - horizon]
    ordered = np.sort(changes)
    count = len(ordered)
    low, mid, high = ordered[count // 10], ordered[count // 2], ordered[count - 1 - count // 10]
    similar, nearest, spread = 0.0, 1.0, 0.0
    if distances is not None and n > SHAPE_BINS + horizon:
        after = changes[SHAPE_BINS - 1 :]
        apart = distances[: len(after)]
        nearest = float(apart.min())
        weights = np.exp(apart * (-1.0 / (0.3 * nearest + 0.01)))
        total = weights.sum()
        similar = float(weights @ after) / total
        spread = max(float(weights @ (after * after)) / total - similar * similar, 0.0) ** 0.5
    return (changes[-1], low, mid, high, similar, nearest, spread)
