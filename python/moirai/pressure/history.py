"""Recent use on an even grid of one-second bins, whatever the rhythm of the observations."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["BIN_SECONDS", "WINDOW_BINS", "History"]

BIN_SECONDS = 1.0
WINDOW_BINS = 300


class History:
    """The last `WINDOW_BINS` seconds of a series, in bounded memory.

    A bin holds the last value seen in it; bins without an observation are interpolated. A pause
    longer than the window, or a clock that goes backwards by more than a bin, starts the window
    afresh: what lay before says nothing about now. Not for several threads at once.

    Invariant: `1 <= bin_count <= WINDOW_BINS` once something was added.
    """

    __slots__ = ("_bins", "_end", "_index", "bin_count", "peak", "restarts")

    def __init__(self) -> None:
        # Twice as long as the window, so that the window is one slice; moved once per lap.
        self._bins: NDArray[np.float64] = np.zeros(2 * WINDOW_BINS)
        self._end = 0
        self._index = 0
        self.bin_count = 0
        self.peak = 0.0
        self.restarts = 0

    def add(self, time_seconds: float, value: float) -> int:
        """Add an observation; returns how many bins began with it, or -1 for a new window."""
        index = math.floor(time_seconds / BIN_SECONDS + 1e-6)
        if value > self.peak:
            self.peak = value
        step = index - self._index
        if self.bin_count == 0:
            return self._restart(index, value)
        if step <= 0:
            if step < -1:
                self.restarts += 1
                return self._restart(index, value)
            self._bins[self._end - 1] = value
            return 0
        if step > WINDOW_BINS:
            self.restarts += 1
            return self._restart(index, value)
        if self._end + step > len(self._bins):
            kept = min(self.bin_count, WINDOW_BINS)
            self._bins[:kept] = self._bins[self._end - kept : self._end].copy()
            self._end = kept
        if step == 1:
            self._bins[self._end] = value
        else:
            last = self._bins[self._end - 1]
            self._bins[self._end : self._end + step] = last + (value - last) * (
                np.arange(1, step + 1) / step
            )
        self._end += step
        self._index = index
        self.bin_count = min(self.bin_count + step, WINDOW_BINS)
        return step

    def window(self) -> NDArray[np.float64]:
        """The bins, oldest first; a view that the next `add` may change."""
        return self._bins[self._end - self.bin_count : self._end]

    def _restart(self, index: int, value: float) -> int:
        self._bins[0] = value
        self._end = self.bin_count = 1
        self._index = index
        self.peak = value
        return -1
