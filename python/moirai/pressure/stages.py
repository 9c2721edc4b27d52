"""How hard to respond: thresholds and probabilities in, a stage out, with hysteresis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Protocol

from moirai._arguments import check_number
from moirai.errors import InvalidArgument
from moirai.pressure.samples import Sample

__all__ = ["Forecasts", "Outlook", "Stage", "StageClock", "Thresholds"]


class Stage(IntEnum):
    """How hard the guard responds; each does what the ones below it do."""

    CALM = 0
    MONITOR = 1
    GENTLE = 2
    AGGRESSIVE = 3
    EMERGENCY = 4


class Outlook(Protocol):
    """The part of a forecast that a guard reads."""

    @property
    def p_critical(self) -> Mapping[int, float]:
        """Probability that the limit is close within so many seconds, by horizon: 30, 60, 120."""
        ...  # pragma: no cover


class Forecasts(Protocol):
    """What a guard may ask about the future; see `moirai.pressure.Guard`."""

    def observe(self, time_seconds: float, used_bytes: int, limit_bytes: int) -> object:
        """Take one observation."""
        ...  # pragma: no cover

    def forecast(self) -> Outlook | None:
        """Say what is to come, as of the last observation; None if it cannot be said yet."""
        ...  # pragma: no cover


@dataclass(frozen=True)
class Thresholds:
    """Shares of the limit and probabilities at which a stage begins.

    Attributes:
        monitor, gentle, aggressive, emergency: Shares of the limit; growing, in (0, 1]. The two
            last count without any file cache, which the kernel drops before it kills.
        monitor_p120, gentle_p60, aggressive_p30: Probabilities of the forecast; in (0, 1].
        forecast_from: Probabilities count from this share of the limit on: below it a program that
            grows fast is more often one that starts; in [0, 1].
        irreversible, irreversible_p30: Actions that cannot be undone are taken from this share of
            the limit on, or from this probability on.
        calm_below: A stage ends so far below the share at which it begins.
        calm_seconds: And after so long there.
    """

    monitor: float = 0.70
    gentle: float = 0.80
    aggressive: float = 0.90
    emergency: float = 0.95
    monitor_p120: float = 0.5
    gentle_p60: float = 0.5
    aggressive_p30: float = 0.7
    irreversible: float = 0.90
    irreversible_p30: float = 0.85
    forecast_from: float = 0.5
    calm_below: float = 0.05
    calm_seconds: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_number(f"thresholds: {field.name}", getattr(self, field.name))
        shares = (self.monitor, self.gentle, self.aggressive, self.emergency)
        if not 0 < shares[0] < shares[1] < shares[2] < shares[3] <= 1:
            raise InvalidArgument(f"thresholds: shares must grow within (0, 1], got {shares}")
        rest = (self.monitor_p120, self.gentle_p60, self.aggressive_p30, self.irreversible,
                self.irreversible_p30)  # fmt: skip
        if not all(0 < value <= 1 for value in rest):
            raise InvalidArgument(f"thresholds: probabilities must be in (0, 1], got {rest}")
        if not 0 <= self.forecast_from <= 1:
            raise InvalidArgument(
                f"thresholds: forecast_from must be in [0, 1], got {self.forecast_from}"
            )
        if not (0 <= self.calm_below < self.monitor and self.calm_seconds >= 0):
            raise InvalidArgument(
                "thresholds: must be 0 <= calm_below < monitor and calm_seconds >= 0, got "
                f"{self.calm_below} and {self.calm_seconds}"
            )

    def stage(
        self,
        sample: Sample,
        p_critical: Mapping[int, float],
        *,
        slack: float = 0,
        is_confirmed: bool = False,
    ) -> Stage:
        """Give the stage that a sample and a forecast call for, with shares less `slack`.

        `is_confirmed` says that the kernel itself has been short: then what is gentle without any
        file cache is aggressive. By itself it says nothing, as streaming a file looks alike.
        """
        used = sample.used_ratio + slack
        hard = sample.without_cache_ratio + slack
        counts = sample.used_ratio >= self.forecast_from
        p30, p60, p120 = (counts * p_critical.get(horizon, 0.0) for horizon in (30, 60, 120))
        if hard >= self.emergency:
            return Stage.EMERGENCY
        if (
            hard >= self.aggressive
            or p30 >= self.aggressive_p30
            or (is_confirmed and hard >= self.gentle)
        ):
            return Stage.AGGRESSIVE
        if used >= self.gentle or p60 >= self.gentle_p60:
            return Stage.GENTLE
        if used >= self.monitor or p120 >= self.monitor_p120:
            return Stage.MONITOR
        return Stage.CALM

    def allows_irreversible(self, sample: Sample, p_critical: Mapping[int, float]) -> bool:
        """Whether actions that cannot be undone may be taken."""
        certain = p_critical.get(30, 0.0) >= self.irreversible_p30
        return certain or sample.without_cache_ratio >= self.irreversible


class StageClock:
    """The current stage: it rises at once, and falls when it was lower for a while."""

    # Threads waited for memory for so much of the last ten seconds: the kernel confirms.
    STALLED_RATIO = 0.1

    def __init__(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._limit_hits: int | None = None
        self._lower_since: float | None = None
        self.stage = Stage.CALM

    def update(self, sample: Sample, p_critical: Mapping[int, float]) -> Stage:
        """Take a sample and a forecast into account; give the stage now."""
        wanted = self._thresholds.stage(sample, p_critical, is_confirmed=self._is_confirmed(sample))
        slack = self._thresholds.calm_below
        held = min(self.stage, self._thresholds.stage(sample, p_critical, slack=slack))
        if wanted >= self.stage or held >= self.stage:
            self._lower_since = None
            self.stage = max(wanted, self.stage)
        elif self._lower_since is None:
            self._lower_since = sample.time_seconds
        if (
            self._lower_since is not None
            and sample.time_seconds - self._lower_since >= self._thresholds.calm_seconds
        ):
            self.stage = max(wanted, Stage(held))
            self._lower_since = None
        return self.stage

    def _is_confirmed(self, sample: Sample) -> bool:
        """Whether the group ran into its limit since the last sample, or threads waited for it."""
        before, self._limit_hits = self._limit_hits, sample.total_limit_hits
        has_hit = (
            before is not None
            and sample.total_limit_hits is not None
            and sample.total_limit_hits > before
        )
        return has_hit or (sample.stalled_ratio or 0.0) >= self.STALLED_RATIO
