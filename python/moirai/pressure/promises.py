"""Bytes promised to reservations, which nobody else is promised until they are given back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from moirai._arguments import LONGEST_SECONDS
from moirai.errors import OutOfMemory
from moirai.pressure.samples import Sample

__all__ = ["Promises"]


# An int may be too large for a float.


class Promises:
    """The sum of what is promised. Any number of threads may use it at once.

    A forked child makes its own: what was promised to its parent is given back there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total_bytes = 0

    @property
    def total_bytes(self) -> int:
        """What is promised now."""
        return self._total_bytes

    def make(
        self,
        wanted_bytes: int,
        spare_bytes: int,
        timeout_seconds: float,
        *,
        read_now: Callable[[], Sample],
        free: Callable[[Sample, int], int],
    ) -> None:
        """Promise so much as soon as it fits, making room for it.

        Args:
            wanted_bytes: What to promise.
            spare_bytes: What to leave below the limit besides.
            timeout_seconds: How long to go on; at least one try to free is made.
            read_now: Says how much room there is.
            free: Called with that sample and the bytes missing; gives those known to be freed.

        Raises:
            OutOfMemory: There is no room; nothing is promised.
        """
        deadline = time.monotonic() + min(timeout_seconds, LONGEST_SECONDS)
        least: int | None = None
        while True:
            sample = read_now()
            room = None if sample.room_bytes is None else sample.room_bytes - spare_bytes
            missing = self.take(wanted_bytes, room)
            if missing == 0:
                return
            # What actions say that they freed may be in use again by now: only room counts.
            has_more_room = least is None or missing < least
            is_late = time.monotonic() >= deadline
            if is_late and not has_more_room:
                raise OutOfMemory(
                    f"cannot reserve {wanted_bytes} bytes: {sample.used_bytes} of "
                    f"{sample.limit_bytes} are in use, {self.total_bytes} reserved, {spare_bytes} "
                    "kept free, and nothing more could be freed"
                )
            least = missing if least is None else min(least, missing)
            if free(sample, missing) == 0 and not is_late:
                time.sleep(0.05)

    def take(self, wanted_bytes: int, room_bytes: int | None) -> int:
        """Promise so much if it fits what room there is; give the bytes missing, 0 if it did.

        Without a limit, `room_bytes` is None, and everything fits.
        """
        with self._lock:
            if room_bytes is not None:
                missing = wanted_bytes - (room_bytes - self._total_bytes)
                if missing > 0:
                    return missing
            self._total_bytes += wanted_bytes
            return 0

    def give_back(self, wanted_bytes: int) -> None:
        """End a promise."""
        with self._lock:
            self._total_bytes -= wanted_bytes
