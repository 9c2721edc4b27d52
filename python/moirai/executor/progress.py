"""How far an executor has come with what it was given, for those who show it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moirai._arguments import check_number
from moirai.errors import InvalidArgument

__all__ = ["Counter", "Progress"]


@dataclass(frozen=True)
class Progress:
    """Calls of an executor.

    Attributes:
        completed: Calls that are over: returned, failed or cancelled.
        total: Calls that it was given.
    """

    completed: int
    total: int

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left."""
        return self.completed == self.total


class Counter:
    """Counts calls, and wakes those who watch. Any thread may use it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew, with nobody who watches."""
        # Entered by itself: a condition does that in Python, which takes longer than all the rest.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._completed = self._total = self._watchers = 0

    def add(self, call_count: int) -> None:
        """More was given to the executor."""
        with self._lock:
            self._total += call_count

    def complete(self, call_count: int) -> None:
        """So much of it is over."""
        with self._lock:
            self._completed += call_count
            if self._watchers:
                self._changed.notify_all()

    def now(self) -> Progress:
        """Give both counts as they are."""
        with self._lock:
            return Progress(self._completed, self._total)

    def watch(self, interval_seconds: float) -> Iterator[Progress]:
        """Give the counts when they change, until they are equal, that included."""
        check_number("interval_seconds", interval_seconds)
        if not interval_seconds >= 0:
            raise InvalidArgument(f"interval_seconds: must be at least 0, got {interval_seconds!r}")
        return self._watch(interval_seconds)

    def _watch(self, interval_seconds: float) -> Iterator[Progress]:
        now = self.now()
        while True:
            yield now
            if now.is_complete:
                return
            # Not again for a while, unless all is over before.
            self._wait(lambda: self._completed == self._total, interval_seconds)
            now = self._wait(functools.partial(self._differs_from, now), None)

    def _differs_from(self, seen: Progress) -> bool:
        return self._completed != seen.completed or self._completed == self._total

    def _wait(self, condition: Callable[[], bool], timeout_seconds: float | None) -> Progress:
        with self._changed:
            self._watchers += 1
            try:
                self._changed.wait_for(condition, timeout_seconds)
            finally:
                self._watchers -= 1
            return Progress(self._completed, self._total)
