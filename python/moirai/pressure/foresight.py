"""What a guard knows of the future: it asks a forecaster now and then, and does without one."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from moirai.pressure.samples import Sample
from moirai.pressure.stages import Forecasts, Outlook

__all__ = ["Foresight"]

log = logging.getLogger("moirai.pressure")


class Foresight:
    """What a forecaster says of the samples it is shown. One thread at a time may show them.

    Attributes:
        forecaster: Who is asked; None: nobody.
        interval_seconds: Time between two observations, by the clock of the samples; > 0.
        outlook: What was said last; None without a forecaster, and after it failed.
        p_critical: Its probabilities by horizon in seconds; empty without one.
    """

    def __init__(self, forecaster: Forecasts | None, interval_seconds: float) -> None:
        self.forecaster = forecaster
        self.interval_seconds = interval_seconds
        self._observed_seconds = float("-inf")
        self._failure_count = 0
        self._know(None)

    def _know(self, outlook: Outlook | None) -> None:
        # Copied where a fault of the forecaster is caught.
        said = {} if outlook is None else outlook.p_critical
        self.p_critical: Mapping[int, float] = {
            horizon: float(odds) for horizon, odds in said.items()
        }
        self.outlook = outlook

    def look(self, sample: Sample) -> None:
        """Show the forecaster a sample, if it is time for one, and ask it."""
        if self.forecaster is None or sample.limit_bytes is None:
            self._know(None)
            return
        # After failures it is asked twice as seldom each time, as there may be no memory for it.
        rest = self.interval_seconds * 2 ** min(self._failure_count, 6)
        if sample.time_seconds - self._observed_seconds < rest:
            return
        self._observed_seconds = sample.time_seconds
        try:
            # File cache is not what a process dies of.
            used = sample.without_cache_bytes
            self.forecaster.observe(sample.time_seconds, used, sample.limit_bytes)
            self._know(self.forecaster.forecast())
            self._failure_count = 0
        except Exception:
            self._know(None)
            self._failure_count += 1
            log.exception("no forecast: responding to the level alone")
