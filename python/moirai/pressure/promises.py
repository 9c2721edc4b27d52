"""Bytes promised to reservations, which nobody else is promised until they are given back."""

from __future__ import annotations

import threading

__all__ = ["Promises"]


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
