"""The forecaster's own record: what it said, and what then happened."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from moirai.pressure.features import HORIZONS

__all__ = ["ALARM_SECONDS", "ForecastScore", "HorizonScore", "Record"]

# An alarm is true if the line is reached while it lasts or within this time, false if not.
ALARM_SECONDS = 120.0
# After a crossing, use must fall below this share of the line before the next one counts.
_REARM_SHARE = 0.95
_KEPT_LEADS = 64


@dataclass(frozen=True)
class HorizonScore:
    """How forecasts for one horizon turned out.

    Attributes:
        count: Forecasts whose time has come.
        inside_count: Of those, outcomes within the interval.
        total_error_ratio, total_unchanged_ratio: Sums of |error| over the outcome, of the forecast
            and of "no change"; outcomes of zero bytes are not in them.
    """

    count: int = 0
    inside_count: int = 0
    total_error_ratio: float = 0.0
    total_unchanged_ratio: float = 0.0

    @property
    def coverage(self) -> float | None:
        """Share of outcomes within the interval; None before the first."""
        return self.inside_count / self.count if self.count else None

    @property
    def skill(self) -> float | None:
        """1 - error over the error of "no change": above 0 is better; None if that made none."""
        if not self.total_unchanged_ratio:
            return None
        return 1.0 - self.total_error_ratio / self.total_unchanged_ratio


@dataclass(frozen=True)
class ForecastScore:
    """What a forecaster said, and what came of it.

    Attributes:
        horizons: By horizon in seconds.
        alarm_count: Alarms that were raised: `true + false + open`.
        true_alarm_count: Use reached 90 % of the limit while it lasted, or within 120 s.
        false_alarm_count: It did not.
        open_alarm_count: Neither has happened yet (0 or 1).
        crossing_count: Times that use reached 90 % of the limit.
        missed_count: Of those, times without an alarm before.
        lead_seconds: Time from alarm to crossing of the newest true alarms, oldest first.
    """

    horizons: dict[int, HorizonScore]
    alarm_count: int
    true_alarm_count: int
    false_alarm_count: int
    open_alarm_count: int
    crossing_count: int
    missed_count: int
    lead_seconds: tuple[float, ...]

    @property
    def median_lead_seconds(self) -> float | None:
        """Median of the newest leads; None without one."""
        ordered = sorted(self.lead_seconds)
        count = len(ordered)
        return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2 if count else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, ratios included, as plain numbers for metrics and JSON."""
        found = asdict(self)
        found["lead_seconds"] = list(self.lead_seconds)
        found["median_lead_seconds"] = self.median_lead_seconds
        found["horizons"] = {
            str(horizon): {**asdict(score), "coverage": score.coverage, "skill": score.skill}
            for horizon, score in self.horizons.items()
        }
        return found


class Record:
    """Keeps the score of one forecaster in bounded memory. Not for several threads at once."""

    def __init__(self) -> None:
        # One promise a horizon for each time it is asked to remember, due in order of time.
        self._due: dict[int, deque[tuple[float, float, float, float, float]]] = {
            horizon: deque(maxlen=horizon) for horizon in HORIZONS
        }
        self._counts = {horizon: [0, 0, 0.0, 0.0] for horizon in HORIZONS}
        self._raised_at: float | None = None
        self._has_crossed = self._is_on = False
        self._alarms = self._true = self._false = self._crossings = self._missed = 0
        self._leads: deque[float] = deque(maxlen=_KEPT_LEADS)

    def promise(
        self, now: float, horizon: int, value: float, low: float, high: float, unchanged: float
    ) -> None:
        """Remember a forecast until its time comes; made at least a second after the one before."""
        self._due[horizon].append((now + horizon, value, low, high, unchanged))

    def alarm(self, now: float, is_on: bool) -> None:
        """Say whether the alarm is on; one that comes on above the line warns of nothing."""
        if is_on and not self._is_on and self._raised_at is None and not self._has_crossed:
            self._raised_at = now
            self._alarms += 1
        self._is_on = is_on

    def observe(self, now: float, used: float, line: float | None) -> None:
        """Settle what is due; `line` is 90 % of the limit, None without one."""
        for horizon, due in self._due.items():
            while due and due[0][0] <= now:
                at, value, low, high, unchanged = due.popleft()
                if now - at > 1.5:  # nobody looked when it was due
                    continue
                counts = self._counts[horizon]
                counts[0] += 1
                counts[1] += low <= used <= high
                if used > 0.0:
                    counts[2] += abs(value - used) / used
                    counts[3] += abs(unchanged - used) / used
        if line is not None and used >= line:
            if not self._has_crossed:
                self._has_crossed = True
                self._crossings += 1
                if self._raised_at is None:
                    self._missed += 1
                else:
                    self._true += 1
                    self._leads.append(now - self._raised_at)
                    self._raised_at = None
        else:
            if line is None or used < _REARM_SHARE * line:
                self._has_crossed = False
            lasted = -1.0 if self._raised_at is None else now - self._raised_at
            if lasted > ALARM_SECONDS and not self._is_on:
                self._false += 1
                self._raised_at = None

    def restart(self) -> None:
        """Forget what is not settled: the series has a new beginning."""
        for due in self._due.values():
            due.clear()
        if self._raised_at is not None:
            self._alarms -= 1
            self._raised_at = None
        self._has_crossed = self._is_on = False

    def score(self) -> ForecastScore:
        """Everything settled so far."""
        return ForecastScore(
            {
                horizon: HorizonScore(int(c[0]), int(c[1]), c[2], c[3])
                for horizon, c in self._counts.items()
            },
            self._alarms,
            self._true,
            self._false,
            int(self._raised_at is not None),
            self._crossings,
            self._missed,
            tuple(self._leads),
        )
