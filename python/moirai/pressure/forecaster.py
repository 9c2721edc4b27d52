"""Where memory use is going: values with intervals, and the probability of reaching the limit."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moirai._arguments import LARGEST_FLOAT, check_instance, check_number
from moirai.errors import InvalidArgument
from moirai.pressure.features import HORIZONS, LEAST_BINS, describe
from moirai.pressure.history import History
from moirai.pressure.model import Model, trained
from moirai.pressure.record import ForecastScore, Record
from moirai.pressure.trend import Trend, TrendClass

__all__ = ["CRITICAL_RATIO", "Forecast", "Forecaster", "TimeRange", "ValueForecast"]

# "Critical" is this share of the limit.
CRITICAL_RATIO = 0.9
# A forecast is made at least so often, asked for or not, so that there is a record.
_OWN_SECONDS = 20
# Forecasts closer together than this are one promise in the record.
_PROMISE_SECONDS = 10
# An alarm: p_critical for this horizon from the first number on, at this share of the limit or
# more; over below the second number.
_ALARM_HORIZON = 60
_ALARM_RAISED = 0.6
_ALARM_OVER = 0.25
_ALARM_LEVEL = 0.8


_forecasters: weakref.WeakSet[Forecaster] = weakref.WeakSet()
_forking = threading.Lock()
_held: list[Forecaster] = []


@dataclass(frozen=True)
class ValueForecast:
    """Use at one horizon.

    Attributes:
        horizon_seconds: How far ahead.
        value_bytes: What use will be, by half of the odds.
        low_bytes, high_bytes: Nine times in ten it will lie between.
        confidence: Probability that the value is off by at most 5 % of the limit (of the recent
            peak without a limit).
    """

    horizon_seconds: float
    value_bytes: float
    low_bytes: float
    high_bytes: float
    confidence: float


@dataclass(frozen=True)
class TimeRange:
    """Seconds until use reaches 90 % of the limit; `math.inf` means later than 120 s, or never.

    Attributes:
        low_seconds: It happens earlier with a probability of 10 %.
        middle_seconds: Earlier with 50 %.
        high_seconds: Earlier with 90 %.
    """

    low_seconds: float
    middle_seconds: float
    high_seconds: float


@dataclass(frozen=True)
class Forecast:
    """What a forecaster expected at one moment; immutable.

    Attributes:
        time_seconds: The moment of the newest observation, in the caller's time; NaN before one.
        used_bytes: What was observed then.
        limit_bytes: The limit then; None without one.
        horizons: A forecast for each of 30, 60 and 120 s.
        p_critical: By the same horizons, the probability that use reaches 90 % of the limit by
            then; 1 if it has, 0 without a limit.
        trend: "decreasing", "stable", "increasing" or "critical", by `trend_percent`.
        trend_percent: Change in percent of the limit per second, or per the forecaster's unit.
        time_to_critical: When it will be reached.
        is_alarm: From 80 % of the limit on, once the odds of a crossing within 60 s are three in
            five, until they are below one in four.
    """

    time_seconds: float
    used_bytes: float
    limit_bytes: float | None
    horizons: Mapping[int, ValueForecast]
    p_critical: Mapping[int, float]
    trend: TrendClass
    trend_percent: float
    time_to_critical: TimeRange
    is_alarm: bool

    @property
    def confidence(self) -> float:
        """Probability that the value at 60 s is off by at most 5 % of the limit."""
        return self.horizons[60].confidence

    def at(self, horizon_seconds: float) -> ValueForecast:
        """Forecast for a horizon between the three: linear in between, and from now.

        Raises:
            InvalidArgument: `horizon_seconds` is not in (0, 120].
            WrongType: It is no number.
        """
        check_number("horizon_seconds", horizon_seconds)
        known = self.horizons.get(horizon_seconds)  # type: ignore[call-overload]
        if known is not None:
            return known  # type: ignore[no-any-return]
        if not 0.0 < horizon_seconds <= HORIZONS[-1]:
            raise InvalidArgument(
                f"horizon_seconds: must be above 0 and at most {HORIZONS[-1]}, "
                f"got {horizon_seconds!r}"
            )
        now = ValueForecast(0.0, self.used_bytes, self.used_bytes, self.used_bytes, 1.0)
        before, after = now, self.horizons[HORIZONS[-1]]
        for horizon in HORIZONS:
            if horizon >= horizon_seconds:
                after = self.horizons[horizon]
                break
            before = self.horizons[horizon]
        span = after.horizon_seconds - before.horizon_seconds
        share = (horizon_seconds - before.horizon_seconds) / span

        def between(start: float, end: float) -> float:
            return end if math.isinf(end) else start + share * (end - start)

        return ValueForecast(
            horizon_seconds,
            between(before.value_bytes, after.value_bytes),
            between(before.low_bytes, after.low_bytes),
            between(before.high_bytes, after.high_bytes),
            between(before.confidence, after.confidence),
        )


class Forecaster:
    """Watches one series of memory use and says where it is going.

    Time is the caller's: seconds on any clock that goes forwards. Observations may come in any
    rhythm; they are laid on a grid of one second, of which the last five minutes count. A gap
    longer than that, or a clock that goes back by more than a second, starts afresh. Memory is
    bounded (about 10 KiB), whatever the number of observations.

    Any number of threads may use one at once; a lock is held for some hundred microseconds. A
    forked child has its own copy, which goes on from what it had seen.

    Args:
        trend_unit_seconds: Trend classes are in percent of the limit per this time; > 0.
        model: Trained constants; default: those of the package.

    Raises:
        InvalidArgument: `trend_unit_seconds` is not above 0.
        WrongType: An argument is of another kind.
    """

    def __init__(self, *, trend_unit_seconds: float = 1.0, model: Model | None = None) -> None:
        check_number("trend_unit_seconds", trend_unit_seconds)
        check_instance("model", model, Model, or_none=True)
        if not 0.0 < trend_unit_seconds <= LARGEST_FLOAT:
            raise InvalidArgument(
                f"trend_unit_seconds: must be finite and above 0, got {trend_unit_seconds!r}"
            )
        self._model = trained() if model is None else model
        self._lock = threading.Lock()
        self._history = History()
        self._trend = Trend(trend_unit_seconds)
        self._record = Record()
        self._time = math.nan
        self._used = 0.0
        self._limit: float | None = None
        self._bins_until_record = 0
        self._promised_at = -math.inf
        self._is_alarm = False
        self._ignored = 0
        self._newest: Forecast | None = None
        _forecasters.add(self)

    def observe(self, time_seconds: float, used_bytes: float, limit_bytes: float | None) -> None:
        """Tell what use and limit are at a time.

        A time or a use that is not finite is no observation: it is counted and ignored.

        Args:
            time_seconds: On the caller's clock.
            used_bytes: Use; >= 0.
            limit_bytes: Limit; None, 0, infinity or NaN for none.

        Raises:
            InvalidArgument: `used_bytes` or `limit_bytes` is negative.
            WrongType: An argument is no number.
        """
        check_number("time_seconds", time_seconds)
        check_number("used_bytes", used_bytes)
        check_number("limit_bytes", limit_bytes, or_none=True)
        limit = None
        if limit_bytes and -LARGEST_FLOAT <= limit_bytes <= LARGEST_FLOAT:
            limit = float(limit_bytes)
            if limit < 0.0:
                raise InvalidArgument(f"limit_bytes: must be at least 0 or None, got {limit_bytes}")
        if used_bytes < 0.0:
            raise InvalidArgument(f"used_bytes: must be at least 0, got {used_bytes}")
        with self._lock:
            if not (
                -LARGEST_FLOAT <= time_seconds <= LARGEST_FLOAT and used_bytes <= LARGEST_FLOAT
            ):
                self._ignored += 1
                return
            now, used = float(time_seconds), float(used_bytes)
            began = self._history.add(now, used)
            if began < 0:
                self._trend.restart()
                self._record.restart()
                self._is_alarm = False
                self._bins_until_record = 0
                self._promised_at = -math.inf
            self._time, self._used, self._limit = now, used, limit
            self._newest = None
            self._trend.observe(now, used, limit or self._history.peak)
            self._record.observe(now, used, None if limit is None else CRITICAL_RATIO * limit)
            self._bins_until_record -= began
            if self._bins_until_record <= 0 and began:
                self._bins_until_record = _OWN_SECONDS
                self._forecast()

    def forecast(self) -> Forecast:
        """Say what to expect from here; cheap if nothing was observed since the last call.

        In the first five seconds of a series nothing is known: values are what was observed last
        (0 before the first), intervals go from 0 to the limit, the odds of a crossing and the
        confidence are 0.
        """
        with self._lock:
            return self._forecast()

    def score(self) -> ForecastScore:
        """What this forecaster has said so far, and what came of it."""
        with self._lock:
            return self._record.score()

    @property
    def ignored_count(self) -> int:
        """Observations that were ignored because a number was not finite."""
        return self._ignored

    def _forecast(self) -> Forecast:
        if self._newest is None:
            known = self._history.bin_count >= LEAST_BINS
            self._newest = self._compute() if known else self._unknown()
        return self._newest

    def _unknown(self) -> Forecast:
        used, limit = self._used, self._limit
        high = max(limit, used) if limit is not None and self._history.bin_count else math.inf
        odds = 1.0 if limit is not None and used >= CRITICAL_RATIO * limit else 0.0
        p_critical = dict.fromkeys(HORIZONS, odds)
        horizons = {h: ValueForecast(h, used, 0.0, high, 0.0) for h in HORIZONS}
        return Forecast(
            self._time,
            used,
            limit,
            horizons,
            p_critical,
            self._trend.kind,
            self._trend.percent,
            _time_range(p_critical),
            False,
        )

    def _compute(self) -> Forecast:
        used, limit = self._used, self._limit
        rows, scale = describe(self._history.window())
        bounds = np.maximum(used + self._model.changes(rows) * scale, 0.0)
        reference = limit or max(self._history.peak, 1.0)
        confidence = self._model.confidence((bounds[:, 2] - bounds[:, 0]) / reference).tolist()
        horizons = {
            horizon: ValueForecast(horizon, value, low, high, sure)
            for horizon, (low, value, high), sure in zip(
                HORIZONS, bounds.tolist(), confidence, strict=True
            )
        }
        p_critical = dict.fromkeys(HORIZONS, 0.0)
        if limit is not None:
            gap = (CRITICAL_RATIO * limit - used) / scale
            found = self._model.crossing(rows, gap).tolist() if gap > 0.0 else [1.0] * len(HORIZONS)
            p_critical = dict(zip(HORIZONS, found, strict=True))
        odds = p_critical[_ALARM_HORIZON]
        if self._is_alarm:
            self._is_alarm = odds >= _ALARM_OVER
        elif limit is not None:
            self._is_alarm = odds >= _ALARM_RAISED and used >= _ALARM_LEVEL * limit
        self._remember(horizons)
        return Forecast(
            self._time,
            used,
            limit,
            horizons,
            p_critical,
            self._trend.kind,
            self._trend.percent,
            _time_range(p_critical),
            self._is_alarm,
        )

    def _remember(self, horizons: Mapping[int, ValueForecast]) -> None:
        self._record.alarm(self._time, self._is_alarm)
        if self._time - self._promised_at < _PROMISE_SECONDS - 0.5:
            return
        self._promised_at = self._time
        for horizon, each in horizons.items():
            self._record.promise(
                self._time, horizon, each.value_bytes, each.low_bytes, each.high_bytes, self._used
            )


def _time_range(p_critical: Mapping[int, float]) -> TimeRange:
    """When the probability of having crossed passes 10, 50 and 90 %; linear between horizons."""

    def reached(share: float) -> float:
        before_at, before = 0.0, 0.0
        for horizon, odds in p_critical.items():
            if odds >= share:
                if odds >= 1.0 and before == 0.0:
                    return 0.0
                return before_at + (horizon - before_at) * (share - before) / (odds - before)
            before_at, before = horizon, odds
        return math.inf

    return TimeRange(reached(0.1), reached(0.5), reached(0.9))


def _before_fork() -> None:
    """Let every forecaster finish what it is at, so that a child finds none half done or locked."""
    _forking.acquire()
    for forecaster in list(_forecasters):
        forecaster._lock.acquire()
        _held.append(forecaster)


def _after_fork() -> None:
    for forecaster in _held:
        forecaster._lock.release()
    _held.clear()
    _forking.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
