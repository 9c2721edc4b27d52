"""A thread that runs one function at a time for somebody who does not wait for ever."""

from __future__ import annotations

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
    """Runs functions on a thread of its own; one that does not come back is left behind."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[[], int | None], *, timeout_seconds: float) -> Call:
        """Run a function; its `done` is not set if the time has passed.

        Such a function goes on, on a thread that ends with it; the next gets another.
        """
        call = Call(function)
        with self._condition:
            if self._thread is None:
                self._start()
            self._calls.append(call)
            self._condition.notify()
        if not call.done.wait(timeout_seconds):
            self._abandon()
        return call

    def _abandon(self) -> threading.Thread | None:
        """Have the thread end after what it is at, and the next call start another."""
        with self._condition:
            thread, self._thread = self._thread, None
            self._calls.append(Call(_end))
            self._condition.notify()
            self._calls, self._condition = [], threading.Condition()
        return thread

    def _start(self) -> None:
        arguments = (self._calls, self._condition)
        self._thread = threading.Thread(
            target=_work, args=arguments, name="moirai-actions", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread once it has nothing to do; does not wait for what is stuck."""
        thread = self._abandon()
        if thread is not None and thread is not threading.current_thread():
            thread.join(1.0)


class _Ended(BaseException):
    """Ends a worker's thread."""


def _end() -> int | None:
    raise _Ended


def _work(calls: list[Call], condition: threading.Condition) -> None:
    while True:
        with condition:
            while not calls:
                condition.wait()
            call = calls.pop(0)
        call.run()
        if isinstance(call.error, _Ended):
            return
