"""How long a call may take, where another process or machine runs it."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

from moirai._arguments import LARGEST_FLOAT, check_number, check_seconds
from moirai.errors import InvalidArgument, Timeout

__all__ = ["TimeLimits", "late", "not_begun", "time_limits"]


class TimeLimits(NamedTuple):
    """The time limits of a call, as `submit` was given them.

    Attributes:
        timeout_seconds: How long it may run, from its start; infinity: as long as it likes.
        deadline: The moment of `time.monotonic()` by which it is to have ended; infinity: none.
    """

    timeout_seconds: float
    deadline: float

    def due(self, begun: float) -> float:
        """The moment at which the time of a call is over that began at another."""
        return min(self.deadline, begun + self.timeout_seconds)

    @property
    def has_passed(self) -> bool:
        """Whether the call is not to be begun any more."""
        return self.deadline <= time.monotonic()


def time_limits(timeout_seconds: float | None, deadline: float | None) -> TimeLimits | None:
    """Check the time limits of a call; None if it has none.

    Raises:
        WrongType: One of them is no number.
        InvalidArgument: One of them is outside its range.
    """
    if timeout_seconds is None and deadline is None:
        return None
    check_seconds("timeout_seconds", timeout_seconds)
    check_number("deadline", deadline, or_none=True)
    if timeout_seconds is None:
        timeout_seconds = math.inf
    if deadline is None:
        deadline = math.inf
    elif abs(deadline) > LARGEST_FLOAT:  # no float is, but an int may be
        deadline = math.inf if deadline > 0 else -math.inf
    elif math.isnan(deadline):
        raise InvalidArgument("deadline: must be a moment of time.monotonic(), got nan")
    return TimeLimits(float(timeout_seconds), float(deadline))


def not_begun() -> Timeout:
    """What becomes of a call whose deadline passed while it waited."""
    return Timeout("deadline: it passed before the task began; the task is not run")


def late(what_then: str = "its call goes on") -> Timeout:
    """What becomes of a call whose time is over while it runs."""
    return Timeout(f"the task has not ended in the time it was given; {what_then}")
