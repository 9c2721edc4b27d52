"""Tasks that end together: a block that is left when all of them have ended."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

from moirai._arguments import check_instance
from moirai.errors import Closed

__all__ = ["TaskGroup"]

_Result = TypeVar("_Result")


class TaskGroup:
    """Tasks of an executor that end with a `with` block, the first failure cancelling the rest.

    Made by `executor.group()`. Any thread may submit to it while the block lasts, its own tasks
    too. Not to be used in a forked child.

    Raises (at the end of the block):
        ExceptionGroup: With what the block and the tasks raised, in that order; a
            BaseExceptionGroup if one of them is no Exception. If what the block raised is no
            Exception, KeyboardInterrupt for instance, it is raised alone.
    """

    def __init__(self, executor: concurrent.futures.Executor) -> None:
        check_instance("executor", executor, concurrent.futures.Executor)
        self._executor = executor
        # Reentrant: a future that is cancelled calls back in the thread that cancels it.
        self._lock = threading.RLock()
        # Calls on their way to the executor, which may have them wait for room: not with the lock,
        # which whoever makes that room needs.
        self._entering_count = 0
        self._entered = threading.Condition(self._lock)
        self._pending: dict[concurrent.futures.Future[Any], None] = {}
        self._failures: list[BaseException] = []
        self._cancelled = self._ended = False

    @property
    def is_cancelled(self) -> bool:
        """Whether the rest is cancelled; for tasks that run for long to look at, and end."""
        return self._cancelled

    def submit(
        self, fn: Callable[..., _Result], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[_Result]:
        """Queue a call as a part of the group; as the executor's `submit`.

        In a group that is cancelled, the future is cancelled at once.

        Raises:
            Closed: The block has ended, or the executor is shut down; a RuntimeError.
        """
        with self._lock:
            if self._ended:
                raise Closed("submit: the block of this group has ended")
            self._entering_count += 1
        try:
            future = self._executor.submit(fn, *args, **kwargs)
            with self._lock:
                self._pending[future] = None
        finally:
            with self._lock:
                self._entering_count -= 1
                self._entered.notify_all()
        future.add_done_callback(self._done)
        if self._cancelled:
            future.cancel()
        return future

    def cancel(self) -> None:
        """Cancel what has not begun, and have `is_cancelled` tell the rest."""
        with self._lock:
            self._cancelled = True
            pending = list(self._pending)
        # The last first: a worker takes from the other end.
        for future in reversed(pending):
            future.cancel()

    def _done(self, future: concurrent.futures.Future[Any]) -> None:
        """Once for each future: by its callback, or by who waits, whichever comes first."""
        failure = None if future.cancelled() else future.exception()
        with self._lock:
            if future not in self._pending:
                return
            del self._pending[future]
            if failure is not None:
                self._failures.append(failure)
        if failure is not None:
            self.cancel()

    def _wait(self) -> None:
        """Until nothing is pending, and then for good."""
        while True:
            with self._lock:
                self._entered.wait_for(lambda: self._pending or not self._entering_count)
                future = next(iter(self._pending), None)
                if future is None:
                    self._ended = True
                    return
            with contextlib.suppress(concurrent.futures.CancelledError):
                future.exception()
            # It may be over a moment before its callback is called.
            self._done(future)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.cancel()
        try:
            self._wait()
        except BaseException:  # Ctrl-C: what has begun goes on
            self.cancel()
            self._ended = True
            raise
        if error is not None and not isinstance(error, Exception):
            return
        failures = ([] if error is None else [error]) + self._failures
        if failures:
            try:
                message = "what a group of tasks raised"
                raise BaseExceptionGroup(message, failures)
            finally:
                # Or the exceptions and this frame keep each other.
                self._failures = []
                del failures, error
