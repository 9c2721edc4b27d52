"""queue.Queue on a channel's mechanism, for code that uses it already."""

from __future__ import annotations

import queue
from queue import Empty, Full
from typing import TYPE_CHECKING, Any, TypeVar

from moirai import _native
from moirai._arguments import LONGEST_SECONDS
from moirai.errors import Closed, InvalidArgument, Timeout

__all__ = ["Empty", "Full", "Queue", "ShutDown"]

_Item = TypeVar("_Item")
_HOOKS = ("_init", "_qsize", "_put", "_get")
_NATIVE = ("put", "get", "qsize", "empty", "full", "task_done", "join", "shutdown")

if TYPE_CHECKING:

    class ShutDown(Exception): ...

else:
    try:
        from queue import ShutDown
    except ImportError:  # before Python 3.13

        class ShutDown(Exception):
            """Raised by a queue that was shut down."""


def _waitable(timeout: float) -> float:
    """A timeout as the line takes it: `threading.TIMEOUT_MAX`, say, is longer than it waits."""
    return min(timeout, LONGEST_SECONDS)


class Queue(queue.Queue[_Item]):
    """A `queue.Queue` whose put and get are native, and wake one thread at most.

    It has no `mutex`, `not_empty`, `not_full`, `all_tasks_done` and `queue`. A subclass that
    overrides `_init`, `_qsize`, `_put` or `_get` has, and runs the standard library's own
    algorithm. A forked child has a copy, in which nobody waits.

    Args:
        maxsize: Items it holds before `put` waits; 0 or less is no limit.
    """

    _hooked = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if all(getattr(cls, hook) is getattr(queue.Queue, hook) for hook in _HOOKS):
            return
        cls._hooked = True
        for name in _NATIVE:
            if getattr(cls, name) is getattr(Queue, name) and hasattr(queue.Queue, name):
                setattr(cls, name, getattr(queue.Queue, name))
        # Plain attributes there, which the algorithm sets.
        cls.maxsize = cls.unfinished_tasks = 0  # type: ignore[method-assign, assignment]

    def __init__(self, maxsize: int = 0) -> None:
        if self._hooked:
            super().__init__(maxsize)
            return
        self._line: _native.BareQueue[_Item] = _native.BareQueue(maxsize)
        self._maxsize = maxsize
        self.is_shutdown = False

    @property
    def maxsize(self) -> int:
        """Items it holds before `put` waits; 0 or less is no limit. May be changed."""
        return self._maxsize

    @maxsize.setter
    def maxsize(self, maxsize: int) -> None:
        self._maxsize = maxsize
        self._line.set_maxsize(maxsize)

    @property
    def unfinished_tasks(self) -> int:  # type: ignore[override]
        """Items that were put in and not yet dealt with."""
        return self._line.unfinished_tasks

    def put(self, item: _Item, block: bool = True, timeout: float | None = None) -> None:
        """Put an item in, waiting while it is full.

        Raises:
            Full: There was no room in time, or at once if not `block`.
            ShutDown: The queue is shut down.
            ValueError: `timeout` is negative.
        """
        if not block:
            timeout = 0.0
        elif timeout is not None:
            # Where there is no limit nobody waits, whatever the timeout.
            timeout = _waitable(timeout) if self._maxsize > 0 else None
        try:
            self._line.put(item, timeout)
        except Timeout:
            raise Full from None
        except Closed:
            raise ShutDown from None
        except InvalidArgument:
            raise ValueError("'timeout' must be a non-negative number") from None

    def get(self, block: bool = True, timeout: float | None = None) -> _Item:
        """Take the oldest item, waiting while there is none.

        Raises:
            Empty: None came in time, or none is there if not `block`.
            ShutDown: The queue is shut down, and empty.
            ValueError: `timeout` is negative.
        """
        if not block:
            timeout = 0.0
        elif timeout is not None:
            timeout = _waitable(timeout)
        try:
            return self._line.get(timeout)
        except Timeout:
            raise Empty from None
        except Closed:
            raise ShutDown from None
        except InvalidArgument:
            raise ValueError("'timeout' must be a non-negative number") from None

    def qsize(self) -> int:
        """Items in it now."""
        return len(self._line)

    def empty(self) -> bool:
        """Whether it holds nothing now."""
        return len(self._line) == 0

    def full(self) -> bool:
        """Whether a `put` would wait now."""
        return 0 < self._maxsize <= len(self._line)

    def task_done(self) -> None:
        """Say that an item that was taken has been dealt with.

        Raises:
            ValueError: More were dealt with than were put in.
        """
        if not self._line.task_done():
            raise ValueError("task_done() called too many times")

    def join(self) -> None:
        """Wait until every item that was put in has been dealt with."""
        self._line.join()

    def shutdown(self, immediate: bool = False) -> None:
        """Refuse further items; `get` raises ShutDown once it is empty.

        Args:
            immediate: Whether to drop what is in it, and count it as dealt with.
        """
        self.is_shutdown = True
        self._line.shutdown(immediate)
