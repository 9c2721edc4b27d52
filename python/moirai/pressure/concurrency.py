"""Caps on work in flight that fall under pressure and rise in calm: additive, multiplicative."""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moirai._arguments import LARGEST_FLOAT, check_bool, check_int, check_number
from moirai.errors import InvalidArgument, Timeout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    class Cappable(Protocol):
        """What runs several pieces of work at once and can be told how many."""

        @property
        def max_workers(self) -> int:
            """How many at most."""

        @property
        def running_count(self) -> int:
            """How many run now."""

        def allow(self, task_count: int) -> None:
            """Let so many run from now on."""


__all__ = ["ConcurrencyCap", "Rhythm", "adapt_executor"]


class Rhythm:
    """How many pieces of work are allowed: 0.7 times what is in flight, then one more each time.

    Not for several threads at once.

    Source:
        Chiu and Jain (1989), Computer Networks and ISDN Systems 17(1).
    """

    DECREASE = 0.7
    DECREASE_SECONDS = 0.5
    INCREASE_SECONDS = 0.5

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.limit = maximum
        self._changed_seconds: float | None = None

    def adapt(self, time_seconds: float, in_flight: int, *, under_pressure: bool) -> bool:
        """Take the state of the memory into account; whether the limit is another now."""
        before = self.limit
        since = self._changed_seconds
        if under_pressure:
            if since is None or before == self.maximum or self._passed(time_seconds, since):
                busy = min(before, max(1, in_flight))
                self.limit = max(1, int(busy * self.DECREASE))
                self._changed_seconds = time_seconds
        elif before < self.maximum and (
            since is None or time_seconds - since >= self.INCREASE_SECONDS
        ):
            self.limit += 1
            self._changed_seconds = time_seconds
        return self.limit != before

    def _passed(self, time_seconds: float, since: float) -> bool:
        return time_seconds - since >= self.DECREASE_SECONDS


def adapt_executor(
    rhythm: Rhythm, executor: Cappable, time_seconds: float, *, under_pressure: bool
) -> None:
    """Have an executor run as many tasks at once as its rhythm allows now."""
    if rhythm.adapt(time_seconds, executor.running_count, under_pressure=under_pressure):
        executor.allow(rhythm.limit)


class ConcurrencyCap:
    """How many pieces of work may be in flight at once.

    Under pressure the cap becomes 0.7 times what is in flight; each calm half second adds one. One
    piece may always run, so that what holds memory can end. Any number of threads may use it at
    once; a forked child starts with nothing in flight.
    """

    def __init__(self, maximum: int) -> None:
        """Allow `maximum` pieces of work until there is pressure; at least 1."""
        check_int("maximum", maximum)
        if maximum < 1:
            raise InvalidArgument(f"maximum: must be at least 1, got {maximum}")
        self._rhythm = Rhythm(maximum)
        self._renew()
        _caps.add(self)

    def _renew(self) -> None:
        """Forget the work and the waiters, in a child those of its parent."""
        self._in_flight = 0
        self._condition = threading.Condition()

    @property
    def maximum(self) -> int:
        """Pieces of work allowed without pressure."""
        return self._rhythm.maximum

    @property
    def limit(self) -> int:
        """Pieces of work allowed now; from 1 to `maximum`."""
        return self._rhythm.limit

    @property
    def in_flight(self) -> int:
        """Pieces of work under way."""
        return self._in_flight

    @property
    def is_capped(self) -> bool:
        """Whether fewer are allowed than at first."""
        return self._rhythm.limit < self.maximum

    def try_acquire(self) -> bool:
        """Begin a piece of work if one more is allowed."""
        with self._condition:
            if self._in_flight >= self._rhythm.limit:
                return False
            self._in_flight += 1
            return True

    def acquire(self, *, timeout_seconds: float | None = None) -> None:
        """Begin a piece of work as soon as one more is allowed.

        Raises:
            InvalidArgument: The time is no number from 0 to 1e9.
            Timeout: The time has passed; nothing was begun.
        """
        check_number("timeout_seconds", timeout_seconds, or_none=True)
        if timeout_seconds is not None and not 0 <= timeout_seconds <= 1e9:
            raise InvalidArgument(
                f"timeout_seconds: must be None or a number from 0 to 1e9, got {timeout_seconds}"
            )
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        with self._condition:
            while self._in_flight >= self._rhythm.limit:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise Timeout(
                        f"no work was begun within {timeout_seconds} seconds: {self._in_flight} in "
                        f"flight, {self._rhythm.limit} of {self.maximum} allowed"
                    )
                try:
                    self._condition.wait(left)
                except (
                    BaseException
                ):  # Ctrl-C: the call that it may have been woken by is passed on.
                    self._condition.notify()
                    raise
            self._in_flight += 1

    def release(self) -> None:
        """End a piece of work."""
        with self._condition:
            if self._in_flight == 0:
                raise InvalidArgument("release: nothing is in flight")
            self._in_flight -= 1
            self._condition.notify()

    @contextmanager
    def slot(self, *, timeout_seconds: float | None = None) -> Iterator[None]:
        """Hold a piece of work's place for the `with` block."""
        self.acquire(timeout_seconds=timeout_seconds)
        condition = self._condition
        try:
            yield
        finally:
            if condition is self._condition:  # Else this is a child, and the place its parent's.
                self.release()

    def adapt(self, time_seconds: float, *, under_pressure: bool) -> None:
        """Take the state of the memory into account; a guard calls this at each sample.

        Raises:
            InvalidArgument: The time is not finite.
            WrongType: An argument is of another kind.
        """
        check_number("time_seconds", time_seconds)
        check_bool("under_pressure", under_pressure)
        if not -LARGEST_FLOAT <= time_seconds <= LARGEST_FLOAT:
            raise InvalidArgument(f"time_seconds: must be finite, got {time_seconds}")
        with self._condition:
            before = self.limit
            self._rhythm.adapt(time_seconds, self._in_flight, under_pressure=under_pressure)
            if self.limit > before:
                self._condition.notify()

    def lift(self) -> None:
        """Allow as many as at first; a guard calls this when it stops."""
        with self._condition:
            self._rhythm.limit = self.maximum
            self._condition.notify_all()


_caps: weakref.WeakSet[ConcurrencyCap] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for cap in list(_caps):
        cap._renew()


os.register_at_fork(after_in_child=_after_fork_in_child)
