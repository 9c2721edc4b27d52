"""A thread that runs one function at a time for somebody who does not wait for ever."""

from __future__ import annotations

import _thread
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

__all__ = ["Call", "Worker"]


@dataclass
class Call:
    """A function that was given to a worker, and what came of it once `done` is set.

    `over` is set when nobody need wait for it any longer: it is done, or the worker was stopped.
    """

    function: Callable[[], int | None]
    done: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
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
            self.over.set()


_Calls: TypeAlias = "queue.SimpleQueue[Call | None]"


class Worker:
    """Runs functions on a thread of its own; one that does not come back is left behind.

    `threading.Thread.start` waits until the thread runs, for ever if there is no memory for its
    first steps, and that is where actions are called. So threads are started without waiting; one
    that never runs leaves its call undone, as one that does not come back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: _Calls | None = None  # Of the thread, if there is one.
        self._awaited: Call | None = None
        self._is_stopped = False
        self._start()

    def call(self, function: Callable[[], int | None], *, timeout_seconds: float) -> Call:
        """Run a function; its `done` is not set if the time has passed.

        Such a function goes on, on a thread that ends with it; the next gets another. If no thread
        can be started, it runs here. Once the worker is stopped, nothing is run.
        """
        call = Call(function)
        with self._lock:
            if self._is_stopped:
                return call
            self._awaited = call
            calls = self._calls or self._start()
            if calls is not None:
                calls.put(call)
        if calls is None:
            call.run()
            return call
        call.over.wait(timeout_seconds)
        if not call.done.is_set():
            with self._lock:
                self._abandon()
        return call

    def _start(self) -> _Calls | None:
        calls: _Calls = queue.SimpleQueue()
        try:
            _thread.start_new_thread(_work, (calls,))
        except (MemoryError, RuntimeError):
            return None
        self._calls = calls
        return calls

    def _abandon(self) -> None:
        """Have the thread end after what it is at, and the next call start another."""
        if self._calls is not None:
            self._calls.put(None)
            self._calls = None

    def stop(self) -> None:
        """End the thread once it has nothing to do, and the wait for it; waits for nothing."""
        with self._lock:
            self._is_stopped = True
            self._abandon()
            if self._awaited is not None:
                self._awaited.over.set()


def _work(calls: _Calls) -> None:
    threading.current_thread().name = "moirai-actions"
    while (call := calls.get()) is not None:
        call.run()
