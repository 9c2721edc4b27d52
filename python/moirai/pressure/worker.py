"""A thread that runs one function at a time for somebody who does not wait for ever."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Call", "Worker"]


@dataclass
class Call:
    """A function that was given to a worker, and what came of it once `done` is set."""

    function: Callable[[], int | None]
    done: threading.Event = field(default_factory=threading.Event)
    result: int | None = None
    error: BaseException | None = None

    def run(self) -> None:
        """Run it here and now; what it raises is kept."""
        try:
            self.result = self.function()
        except BaseException as error:  # Also SystemExit: an action must not end the thread.
            self.error = error
        finally:
            self.done.set()


class Worker:
    """Runs functions on a thread of its own; one that does not come back is left behind.

    `threading.Thread.start` waits until the thread runs, for ever if there is no memory for its
    first steps, and that is where actions are called. So threads are started without waiting; one
    that never runs leaves its call undone, as one that does not come back.
    """

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._condition = threading.Condition()
        self._is_started = False
        self._start()

    def call(self, function: Callable[[], int | None], *, timeout_seconds: float) -> Call:
        """Run a function; its `done` is not set if the time has passed.

        Such a function goes on, on a thread that ends with it; the next gets another. If no thread
        can be started, it runs here.
        """
        call = Call(function)
        with self._condition:
            if not self._is_started:
                self._start()
            if self._is_started:
                self._calls.append(call)
                self._condition.notify()
        if not self._is_started:
            call.run()
        elif not call.done.wait(timeout_seconds):
            self._abandon()
        return call

    def _abandon(self) -> None:
        """Have the thread end after what it is at, and the next call start another."""
        with self._condition:
            if self._is_started:
                self._calls.append(Call(_end))
                self._condition.notify()
            self._is_started = False
            self._calls, self._condition = [], threading.Condition()

    def _start(self) -> None:
        try:
            _thread.start_new_thread(_work, (self._calls, self._condition))
        except (MemoryError, RuntimeError):
            return
        self._is_started = True

    def stop(self) -> None:
        """End the thread once it has nothing to do, without waiting for it."""
        self._abandon()


class _Ended(BaseException):
    """Ends a worker's thread."""


def _end() -> int | None:
    raise _Ended


def _work(calls: list[Call], condition: threading.Condition) -> None:
    threading.current_thread().name = "moirai-actions"
    while True:
        with condition:
            while not calls:
                condition.wait()
            call = calls.pop(0)
        call.run()
        if isinstance(call.error, _Ended):
            return
