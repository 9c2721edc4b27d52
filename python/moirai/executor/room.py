"""How many tasks may wait to begin, and what becomes of those for which there is no room."""

from __future__ import annotations

import collections
import math
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Literal, get_args

from moirai.errors import InvalidArgument, Timeout

__all__ = ["Room", "WhenFull", "check_limit", "check_when_full"]

WhenFull = Literal["block", "raise", "caller_runs"]

_NAP_SECONDS = 1.0
"""A signal that comes just as a thread goes to sleep is heard after so long at most."""


def check_limit(max_pending: object, when_full: object, *, has_initializer: bool) -> None:
    """Refuse what no executor can be made with.

    Raises:
        InvalidArgument: An argument is outside its range.
    """
    check_when_full(when_full)
    if max_pending is None:
        return
    if isinstance(max_pending, bool) or not isinstance(max_pending, int) or max_pending < 1:
        raise InvalidArgument(
            f"max_pending: must be None or an int of at least 1, got {max_pending!r}"
        )
    if when_full == "caller_runs" and has_initializer:
        raise InvalidArgument(
            'when_full: must be "block" or "raise" with an initializer, as only workers run tasks '
            'then, got "caller_runs"'
        )


def check_when_full(when_full: object) -> None:
    """Refuse what is none of the choices.

    Raises:
        InvalidArgument: It is none.
    """
    if when_full not in get_args(WhenFull):
        choices = " or ".join(f'"{choice}"' for choice in get_args(WhenFull))
        raise InvalidArgument(f"when_full: must be {choices}, got {when_full!r}")


@dataclass(eq=False)
class _Waiter:
    """A thread that waits for room for so many tasks."""

    count: int
    is_served: bool = False
    is_told: threading.Event = field(default_factory=threading.Event)


class Room:
    """Counts tasks that wait, and lets those who have more wait in line. Any thread may use it.

    A forked child has a copy that nobody waits for; it makes its own.

    Args:
        most: How many tasks there is room for; None: any number.
    """

    def __init__(self, most: int | None) -> None:
        self.most = math.inf if most is None else most
        # Reentrant: dropping an object may call back in the thread that drops it. Nobody waits
        # with the lock held.
        self._lock = threading.RLock()
        self._taken = 0
        self._line: collections.deque[_Waiter] = collections.deque()
        self._is_closed = False

    def take(self, count: int, *, must: bool = False) -> bool:
        """Take room, not before those who are in line; false if there is none.

        Args:
            count: For how many tasks.
            must: Whether to take it even so.
        """
        with self._lock:
            if not must and (self._line or self._taken + count > self.most):
                return False
            self._taken += count
            return True

    def wait(self, count: int, deadline: float = math.inf) -> None:
        """Wait in line for room and take it; come back without it once the room is closed.

        Args:
            count: For how many tasks.
            deadline: The moment of `time.monotonic()` until which to wait.

        Raises:
            Timeout: It has passed.
        """
        waiter = _Waiter(count)
        try:
            with self._lock:
                self._line.append(waiter)
                self._serve()
            while not waiter.is_told.wait(_seconds_until(deadline)):
                if deadline <= time.monotonic():
                    raise Timeout(
                        "deadline: it passed while the submitter waited for room; nothing is queued"
                    )
        except BaseException:
            with self._lock:
                if waiter.is_served:
                    self._taken -= count
                elif waiter in self._line:
                    self._line.remove(waiter)
                self._serve()
            raise
        if not waiter.is_served:
            self.take(count, must=True)  # closed: whoever queues is refused, and gives it back

    def give_back(self, count: int) -> None:
        """So many tasks wait no more, or were not queued."""
        with self._lock:
            self._taken -= count
            self._serve()

    def close(self) -> None:
        """Wake all who wait."""
        with self._lock:
            self._is_closed = True
            self._serve()

    def full(self, count: int) -> queue.Full:
        """What says that there is no room."""
        return queue.Full(
            f"max_pending: {self._taken} of {self.most} tasks wait already, no room for {count}"
        )

    def _serve(self) -> None:
        while self._line:
            first = self._line[0]
            if not self._is_closed:
                if self._taken + first.count > self.most:
                    return
                self._taken += first.count
                first.is_served = True
            self._line.popleft()
            first.is_told.set()


def _seconds_until(deadline: float) -> float:
    return min(max(deadline - time.monotonic(), 0.0), _NAP_SECONDS)
