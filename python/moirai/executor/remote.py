"""The future of a call that another machine may run."""

from __future__ import annotations

import concurrent.futures
import threading
from typing import Any, TypeVar

from moirai._arguments import check_timeout
from moirai.errors import Disconnected, Timeout

__all__ = ["RemoteFuture", "not_run_here"]

_Result = TypeVar("_Result")


class RemoteFuture(concurrent.futures.Future[_Result]):
    """A `concurrent.futures.Future`; any thread may use it.

    In a forked child, waiting for a call that the parent queued and that had not ended raises
    Disconnected.
    """

    def result(self, timeout: float | None = None) -> _Result:
        """Wait for the call to end; what it returned, or raise what it raised.

        Raises:
            Timeout: It has not ended in time; it goes on.
            CancelledError: It was cancelled.
        """
        check_timeout("timeout", timeout)
        try:
            return super().result(timeout)
        except TimeoutError:
            if self.done():
                raise
            raise _timed_out(timeout) from None

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the call to end; what it raised, or None.

        Raises:
            Timeout: It has not ended in time; it goes on.
            CancelledError: It was cancelled.
        """
        check_timeout("timeout", timeout)
        try:
            return super().exception(timeout)
        except TimeoutError:
            raise _timed_out(timeout) from None

    def disconnect(self) -> None:
        """In a forked child: nobody here will end it. No callback is called."""
        self._condition = threading.Condition()
        self._waiters = []
        self._done_callbacks: list[Any] = []
        if not self.done():
            self.set_exception(not_run_here())


def not_run_here() -> Disconnected:
    """What becomes of a task in a forked child."""
    return Disconnected(
        "the task was queued in the parent process, and is not run in a forked child"
    )


def _timed_out(timeout: float | None) -> Timeout:
    return Timeout(f"timeout: the task has not ended within {timeout} s")
