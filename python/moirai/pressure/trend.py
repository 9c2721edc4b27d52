"""The class of a trend, with hysteresis, so that noise does not make it flip."""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["CLASSES", "Trend", "TrendClass"]

TrendClass = Literal["decreasing", "stable", "increasing", "critical"]

CLASSES: tuple[TrendClass, ...] = ("decreasing", "stable", "increasing", "critical")
# Percent of the limit per unit of time, between each class and the next.
THRESHOLDS = (-0.5, 0.5, 2.0)
# How far past a threshold the trend must go before the class changes, as a share of it.
BAND = 0.2
# Memory of the smoothed trend; a step of the whole limit fades to a tenth in twice this time.
SMOOTHING_SECONDS = 10.0


class Trend:
    """Smoothed change in percent of a reference, and its class. Not for several threads at once.

    A class is left when the trend is past its threshold by a fifth of it: upwards from stable at
    0.6, back again at 0.4.
    """

    __slots__ = ("_class", "_rate", "_reference", "_time", "_unit", "_used")

    def __init__(self, unit_seconds: float) -> None:
        self._unit = unit_seconds
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self._time = math.nan
        self._used = 0.0
        self._rate = 0.0
        self._reference = 1.0
        self._class = 1

    @property
    def kind(self) -> TrendClass:
        """The class."""
        return CLASSES[self._class]

    @property
    def percent(self) -> float:
        """Change in percent of the reference per unit."""
        return 100.0 * self._rate * self._unit / self._reference

    def observe(self, time_seconds: float, used: float, reference: float) -> None:
        """Take an observation; `reference` is the limit, or the peak without one."""
        self._reference = reference if reference > 0.0 else 1.0
        elapsed = time_seconds - self._time
        if elapsed > 0.0:
            # Change since the last observation, spread evenly over the time since.
            share = -math.expm1(-elapsed / SMOOTHING_SECONDS)
            self._rate += share * ((used - self._used) / elapsed - self._rate)
        elif elapsed <= 0.0:
            return
        self._time, self._used = time_seconds, used
        percent = self.percent
        while self._class < len(THRESHOLDS):
            threshold = THRESHOLDS[self._class]
            if percent <= threshold + BAND * abs(threshold):
                break
            self._class += 1
        while self._class > 0:
            threshold = THRESHOLDS[self._class - 1]
            if percent >= threshold - BAND * abs(threshold):
                break
            self._class -= 1
