"""Whether nothing helps: an emergency that lasts while the use does not fall."""

from __future__ import annotations

from moirai.pressure.samples import Sample
from moirai.pressure.stages import Stage

__all__ = ["StallClock"]

# Use below this share of where it stood has fallen.
_FALLEN_SHARE = 0.98


class StallClock:
    """Tells of each stall once. Not for several threads at once.

    Attributes:
        count: Stalls so far.

    Args:
        stall_seconds: How long an emergency lasts until it is one, by the clock of the samples.
    """

    def __init__(self, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._since: tuple[float, int] | None = None
        self._has_stalled = False
        self.count = 0

    def update(self, sample: Sample, stage: Stage) -> bool:
        """Take a sample and its stage into account; say whether a stall has begun with it."""
        if stage is not Stage.EMERGENCY:
            self._since = None
            self._has_stalled = False
            return False
        used = sample.without_cache_bytes
        if self._since is None or used < _FALLEN_SHARE * self._since[1]:
            self._since = (sample.time_seconds, used)
        if self._has_stalled or sample.time_seconds - self._since[0] < self._stall_seconds:
            return False
        self._has_stalled = True
        self.count += 1
        return True
