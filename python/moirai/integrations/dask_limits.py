"""How long calls in a Dask cluster take: workers say when they begin, the client keeps the time.

The clocks of two machines differ, so no moment is sent: time runs from when the message arrives.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import distributed

from moirai.errors import Timeout
from moirai.executor.time_limits import TimeLimits, late, not_begun

__all__ = ["Announcements", "Watch", "announcing", "has_told_late"]

_Result = TypeVar("_Result")

_LATE = "the call took longer than its timeout_seconds"
# How long the scheduler has to say where a call is, whose time seems to be over.
_ANSWER_SECONDS = 1.0
_numbers = itertools.count()


class Watch:
    """The time of one call, kept in the event loop of a client.

    It ends with its last reference: what a worker says of it afterwards is ignored.

    Attributes:
        number: By which workers name it.
        worker: The address of who runs the call now; None: nobody does.
    """

    def __init__(self, limits: TimeLimits) -> None:
        self.number = next(_numbers)
        self.worker: str | None = None
        self._limits = limits
        self._due = limits.deadline
        self._tell: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        _watches[self.number] = self

    def forget(self) -> None:
        """From any thread: nobody is to be told. A timer that is left keeps nothing else."""
        self._tell = None

    # --- in the event loop's thread -------------------------------------------------------------

    def start(self, tell: Callable[[], None]) -> None:
        """The call is out: tell when its time is over. A worker may have begun it already."""
        self._tell = tell
        self._set_timer()

    def begin(self, worker: str) -> None:
        """A worker begins the call; maybe not the first one."""
        self.worker = worker
        self._due = self._limits.due(time.monotonic())
        self._set_timer()

    def stop(self) -> None:
        """The call has ended, or who ran it is lost: if it begins again, so does its time."""
        self.worker = None
        self._due = self._limits.deadline
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def verdict(self, client: Any, key: str) -> Timeout | None:
        """When it told: what becomes of the call, or None if its time is not over after all."""
        worker, due = self.worker, self._due
        if worker is None:
            return not_begun()
        if self._limits.has_passed or await _is_running(client, worker, key):
            return late() if self._due == due else None
        if self._due == due:  # it waits again
            self.stop()
            self._set_timer()
        return None

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._tell is not None and self._due != math.inf:
            delay = max(0.0, self._due - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._ring)

    def _ring(self) -> None:
        self._timer = None
        tell = self._tell
        if tell is not None:
            tell()


_watches: weakref.WeakValueDictionary[int, Watch] = weakref.WeakValueDictionary()


class Announcements:
    """Has a client told when workers begin calls.

    All executors of a client share a topic: neither a scheduler nor a client ever forgets one.

    Attributes:
        topic: Where workers say so.
    """

    def __init__(self, client: Any) -> None:
        self.topic = f"moirai-begun-{client.id}"
        self._client = client
        self._connection: Any = None

    def watch(self, limits: TimeLimits, count: int) -> list[Watch]:
        """For so many calls that are to be sent: their watches."""
        connection = self._client.scheduler_comm
        if connection is None or connection is not self._connection:
            # A scheduler that was started anew does not know of it.
            self._client.subscribe_topic(self.topic, _has_begun)
            self._connection = connection
        return [Watch(limits) for _ in range(count)]


def announcing(
    fn: Callable[..., _Result], topic: str, timeout_seconds: float
) -> Callable[..., _Result]:
    """The function, with the number of a watch as its first argument, for a worker to call.

    It says when it begins, which a worker that uses other processes cannot, and fails at its end if
    it took too long.
    """
    late_text = _LATE

    # A function within a function is pickled with its code, so that workers need not have Moirai.
    def call(number: int, *args: Any) -> _Result:
        begun = time.monotonic()
        with contextlib.suppress(ValueError):  # not of a process with a worker
            worker = distributed.get_worker()
            worker.log_event(topic, [number, worker.address])
        try:
            return fn(*args)
        finally:
            if time.monotonic() - begun >= timeout_seconds:
                raise TimeoutError(late_text)

    return call


def has_told_late(error: BaseException | None) -> bool:
    """Whether it says that an announcing call took too long."""
    return type(error) is TimeoutError and error.args == (_LATE,)


def _has_begun(event: tuple[float, tuple[int, str]]) -> None:
    number, worker = event[1]
    watch = _watches.get(number)
    if watch is not None:
        watch.begin(worker)


async def _is_running(client: Any, worker: str, key: str) -> bool:
    """Whether a worker that began a call is there and still has it; yes if nobody can say."""
    try:
        found = await asyncio.wait_for(client.processing([worker]), _ANSWER_SECONDS)
    except KeyError:  # the scheduler's, which does not know the worker
        return False
    except Exception:
        return True
    return any(key in keys for keys in found.values())
