"""Staying within the memory limit: what is used of it, responses in stages, a fence before it.

Every object here may be used by any number of threads at once, with or without the GIL. What runs
in the parent of a fork goes on in the child.
"""

from __future__ import annotations

from moirai.pressure.actions import Action, ActionRecord
from moirai.pressure.concurrency import ConcurrencyCap
from moirai.pressure.fence import Fence
from moirai.pressure.forecaster import (
    CRITICAL_RATIO,
    Forecast,
    Forecaster,
    TimeRange,
    ValueForecast,
)
from moirai.pressure.guard import Guard, GuardStatus
from moirai.pressure.process import current, reserve, start, stop
from moirai.pressure.record import ForecastScore, HorizonScore
from moirai.pressure.registry import Registration, Registry, register
from moirai.pressure.sampler import Sampler, SamplerStatistics
from moirai.pressure.samples import Bound, ReadsSamples, Sample, TraceSource
from moirai.pressure.serving import AsgiCap, WsgiCap
from moirai.pressure.source import Source
from moirai.pressure.stages import Forecasts, Outlook, Stage, Thresholds

__all__ = [
    "CRITICAL_RATIO",
    "Action",
    "ActionRecord",
    "AsgiCap",
    "Bound",
    "ConcurrencyCap",
    "Fence",
    "Forecast",
    "ForecastScore",
    "Forecaster",
    "Forecasts",
    "Guard",
    "GuardStatus",
    "HorizonScore",
    "Outlook",
    "ReadsSamples",
    "Registration",
    "Registry",
    "Sample",
    "Sampler",
    "SamplerStatistics",
    "Source",
    "Stage",
    "Thresholds",
    "TimeRange",
    "TraceSource",
    "ValueForecast",
    "WsgiCap",
    "current",
    "register",
    "reserve",
    "start",
    "stop",
]
