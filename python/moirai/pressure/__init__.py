"""Staying within the limit: where memory use is going, and how likely it is to get there."""

from __future__ import annotations

from moirai.pressure.forecaster import (
    CRITICAL_RATIO,
    Forecast,
    Forecaster,
    TimeRange,
    ValueForecast,
)
from moirai.pressure.record import ForecastScore, HorizonScore

__all__ = [
    "CRITICAL_RATIO",
    "Forecast",
    "ForecastScore",
    "Forecaster",
    "HorizonScore",
    "TimeRange",
    "ValueForecast",
]
